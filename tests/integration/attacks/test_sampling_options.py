"""No option of a request gets more out of it than its policy allows, nor hides that it was blocked."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.integration.attacks.asking import (
    ALLOWED_TOKENS,
    CHAT,
    COMPLETIONS,
    OUTPUT,
    PROMPT,
    body_of,
    choices_of,
    complete,
    only_choice,
    parts_of,
    post,
    user,
)
from tests.integration.attacks.policies import MESSAGE

pytestmark = pytest.mark.vllm

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]

# What the attacker hopes: that a block goes by the sampler, by a stop condition, by a grammar or by
# what is streamed, so that this option outruns it, wins over it or disguises it.
BOTH_APIS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "stream": {"stream": True},
    "usage in every chunk": {
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    "n": {"n": 4, "temperature": 0.9},
    "n streamed": {"n": 4, "temperature": 0.9, "stream": True},
    "seed": {"seed": 7, "temperature": 1.0},
    "logit_bias": {"logit_bias": {"70": 100, "71": 99}},
    "allowed_token_ids": {"allowed_token_ids": [70, 71]},
    "bad_words": {"bad_words": ["a", "b"]},
    "stop_token_ids": {"stop_token_ids": [271]},
    "stop": {"stop": ["0123456789"], "include_stop_str_in_output": True},
    "min_tokens": {"min_tokens": 12},
    "eos": {"ignore_eos": False, "min_tokens": 12},
    "many tokens": {"max_tokens": 300},
    "penalties": {"repetition_penalty": 2.0, "frequency_penalty": 2.0, "presence_penalty": 2.0},
    "regex": {"structured_outputs": {"regex": "[a-z]{12}"}},
    "json": {"structured_outputs": {"json": SCHEMA}},
    "choice": {"structured_outputs": {"choice": ["abcdefgh", "ijklmnop"]}},
    "grammar": {"structured_outputs": {"grammar": 'root ::= "abcdefghijkl"'}},
    "json schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    },
    "cache_salt": {"cache_salt": "mine-alone"},
    "user": {"user": "somebody else"},
    "kv_transfer_params": {"kv_transfer_params": {"do_remote_decode": True, "moe_guard_off": 1}},
    "special tokens": {"skip_special_tokens": False, "spaces_between_special_tokens": False},
    "truncated prompt": {"truncate_prompt_tokens": 4},
    "token ids as text": {"return_tokens_as_token_ids": True},
    "priority": {"priority": -1_000},
    "best_of": {"best_of": 8},
}


@pytest.mark.parametrize("option", BOTH_APIS)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT], ids=["completion", "chat"])
def test_no_option_gets_a_fourth_token_out(http: httpx.Client, path: str, option: str) -> None:
    fields = BOTH_APIS[option]
    answer = post(http, path, OUTPUT, body_of(path, **fields))
    assert answer.status_code == 200, answer.text
    choices = choices_of(answer)
    assert len(choices) == fields.get("n", 1)
    for choice in choices:
        assert choice.finish_reason == "content_filter"
        assert choice.stop_reason == "moe_guard:stop-output/third"
        assert len(choice.token_ids) == ALLOWED_TOKENS
        assert choice.refusal == (MESSAGE if path == CHAT else None)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("path", "fields"),
    [(COMPLETIONS, {"logprobs": 5}), (CHAT, {"logprobs": True, "top_logprobs": 5})],
    ids=["completion", "chat"],
)
def test_no_logprobs_are_shown_of_a_blocked_position(
    http: httpx.Client, path: str, fields: dict[str, Any], stream: bool
) -> None:
    answer = post(http, path, OUTPUT, body_of(path, stream=stream, **fields))
    [choice] = choices_of(answer)
    assert choice.finish_reason == "content_filter"
    assert choice.num_logprobs == len(choice.token_ids) == ALLOWED_TOKENS


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT], ids=["completion", "chat"])
def test_usage_counts_no_blocked_position_in_any_chunk(http: httpx.Client, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = post(http, path, OUTPUT, body_of(path, stream=True, stream_options=options))
    told = [part["usage"]["completion_tokens"] for part in parts_of(answer) if part.get("usage")]
    assert max(told) == told[-1] == ALLOWED_TOKENS
    whole = post(http, path, OUTPUT, body_of(path)).json()
    assert whole["usage"]["completion_tokens"] == ALLOWED_TOKENS


def test_echo_shows_the_prompt_and_no_blocked_position(http: httpx.Client) -> None:
    choice = only_choice(complete(http, OUTPUT, echo=True, logprobs=3, return_token_ids=False))
    assert choice["finish_reason"] == "content_filter"
    assert choice["text"].startswith(PROMPT)
    assert len(choice["logprobs"]["tokens"]) == len(PROMPT) + ALLOWED_TOKENS


@pytest.mark.parametrize(
    "fields",
    [{"tool_choice": "auto"}, {"tool_choice": "required"}, {"tool_choice": "none"}, {"stream": True}],
    ids=["auto", "required", "none", "streamed"],
)
def test_a_blocked_chat_calls_no_tool(http: httpx.Client, fields: dict[str, Any]) -> None:
    """Calls that are cut in their middle or end right before the block: tests/integration/frontend."""
    answer = post(http, CHAT, OUTPUT, body_of(CHAT, tools=TOOLS, **fields))
    [choice] = choices_of(answer)
    assert choice.finish_reason == "content_filter"
    assert not choice.has_tool_calls
    assert len(choice.token_ids) == ALLOWED_TOKENS


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_beam_search": True, "n": 2}, "beam search is not served"),
        ({"stop": ["moe_guard:stop-output/third"]}, "cannot be a stop string"),
        ({"stop": ["x", "moe_guard"]}, "cannot be a stop string"),
        ({"prompt_embeds": "AAAA", "prompt": None}, "prompt_embeds"),
    ],
    ids=["beam search", "forged reason", "forged redacted reason", "prompt_embeds"],
)
def test_what_could_not_be_judged_or_would_read_like_a_block_is_refused(
    http: httpx.Client, fields: dict[str, Any], said: str
) -> None:
    answer = post(http, COMPLETIONS, OUTPUT, body_of(COMPLETIONS, **fields))
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]


def test_a_lora_adapter_cannot_be_named(http: httpx.Client) -> None:
    """Hope: an adapter has other experts than the policy knows. None can be loaded either."""
    answer = post(http, COMPLETIONS, OUTPUT, body_of(COMPLETIONS, model="my-adapter"))
    assert answer.status_code == 404
    named = {"lora_name": "my-adapter", "lora_path": "/nowhere"}
    assert http.post("/v1/load_lora_adapter", json=named).status_code == 404


def test_a_batch_of_chats_is_judged_chat_by_chat(http: httpx.Client) -> None:
    chats = [[user(PROMPT)], [user("another")]]
    body = body_of(CHAT) | {"messages": chats}
    answer = post(http, "/v1/chat/completions/batch", OUTPUT, body)
    choices = choices_of(answer)
    assert [choice.finish_reason for choice in choices] == ["content_filter"] * len(chats)
