"""/v1/chat/completions: the refusal message, and never a tool call."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.integration.frontend.asked import (
    CALL_AND_LETTERS,
    CHAT_TOOLS,
    MESSAGE,
    STOP_REASON,
    block,
    letters_then_block,
)

pytestmark = pytest.mark.vllm

USER = [{"role": "user", "content": "hi"}]
NAMED = {"type": "function", "function": {"name": "f"}}


def chat(client: openai.OpenAI, extra: dict[str, Any], **fields: Any) -> Any:
    fields = {"max_tokens": 300, "messages": USER, **fields}
    return client.chat.completions.create(model="tiny", extra_body=extra, **fields)


def test_blocked_chat_keeps_its_text_and_carries_the_message(client: openai.OpenAI) -> None:
    answer = chat(client, letters_then_block(2), logprobs=True, top_logprobs=1)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("content_filter", STOP_REASON)
    assert choice.message.refusal == MESSAGE
    assert len(choice.message.content) == len(choice.logprobs.content) == 2
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize("reason", ["moe_guard:tiny/silent", "moe_guard:other/rule", "moe_guard"])
@pytest.mark.parametrize("stream", [False, True])
def test_without_a_message_there_is_no_refusal(
    client: openai.OpenAI, reason: str, stream: bool
) -> None:
    answer = chat(client, letters_then_block(2, test_stop_reason=reason), stream=stream)
    if stream:
        choice = list(answer)[-1].choices[0]
        said = choice.delta.refusal
    else:
        choice = answer.choices[0]
        said = choice.message.refusal
    assert (choice.finish_reason, choice.stop_reason, said) == ("content_filter", reason, None)


@pytest.mark.parametrize("passed", [0, 1, 7])
def test_streamed_chat_tells_its_end_once_with_the_message(client: openai.OpenAI, passed: int) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, usage = chat(client, letters_then_block(passed), stream=True, stream_options=options)
    ends = [chunk for chunk in chunks if chunk.choices[0].finish_reason]
    assert ends == [chunks[-1]]
    assert ends[0].choices[0].finish_reason == "content_filter"
    assert ends[0].choices[0].stop_reason == STOP_REASON
    assert ends[0].choices[0].delta.refusal == MESSAGE
    assert len("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == passed
    assert {chunk.id for chunk in chunks} == {usage.id}
    assert usage.usage.completion_tokens == passed


def test_streamed_choices_end_each_in_its_own_way(client: openai.OpenAI) -> None:
    extra = letters_then_block(0, test_only_choice=0)
    chunks = list(chat(client, extra, n=2, max_tokens=5, stream=True))
    ends = {
        chunk.choices[0].index: (chunk.choices[0].finish_reason, chunk.choices[0].delta.refusal)
        for chunk in chunks
        if chunk.choices[0].finish_reason
    }
    assert ends == {0: ("content_filter", MESSAGE), 1: ("length", None)}


@pytest.mark.parametrize("passed", [60, 135], ids=["inside the call", "behind the call"])
def test_blocked_chat_returns_no_call_for_auto_tools(client: openai.OpenAI, passed: int) -> None:
    extra = {**block(passed), "structured_outputs": CALL_AND_LETTERS}
    choice = chat(client, extra, tools=CHAT_TOOLS).choices[0]
    assert choice.finish_reason == "content_filter"
    assert not choice.message.tool_calls
    assert choice.message.refusal == MESSAGE


def test_the_same_chat_unblocked_returns_the_call(client: openai.OpenAI) -> None:
    extra = {**block(1000), "structured_outputs": CALL_AND_LETTERS}
    choice = chat(client, extra, tools=CHAT_TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert [call.function.name for call in choice.message.tool_calls] == ["f"]


@pytest.mark.parametrize("passed", [60, 135], ids=["inside the call", "behind the call"])
def test_streamed_call_never_ends_as_tool_calls(client: openai.OpenAI, passed: int) -> None:
    extra = {**block(passed), "structured_outputs": CALL_AND_LETTERS}
    chunks = list(chat(client, extra, tools=CHAT_TOOLS, stream=True))
    assert any(chunk.choices[0].delta.tool_calls for chunk in chunks), "no call was begun"
    last = chunks[-1].choices[0]
    assert last.finish_reason == "content_filter"
    assert not last.delta.tool_calls
    assert last.delta.refusal == MESSAGE


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("stream", [False, True])
def test_forced_call_is_not_returned_once_blocked(
    client: openai.OpenAI, choice: Any, stream: bool
) -> None:
    fields = {"tools": CHAT_TOOLS, "tool_choice": choice, "temperature": 0}
    answer = chat(client, block(40), stream=stream, **fields)
    if stream:
        last = list(answer)[-1].choices[0]
        assert (last.finish_reason, last.delta.tool_calls) == ("content_filter", None)
    else:
        assert answer.choices[0].finish_reason == "content_filter"
        assert not answer.choices[0].message.tool_calls


def test_batch_of_chats_reports_each_block(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": [USER, USER], "max_tokens": 9, **letters_then_block(2)}
    choices = http.post("/v1/chat/completions/batch", json=body).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["content_filter"] * 2
    assert [choice["message"]["refusal"] for choice in choices] == [MESSAGE] * 2


def test_derendered_chat_reports_the_block(http: httpx.Client) -> None:
    generate = {
        "token_ids": [1, 2, 3],
        "sampling_params": {"max_tokens": 9, "extra_args": {"test_block_after": 2}},
    }
    generated = http.post("/inference/v1/generate", json=generate).json()
    assert generated["choices"][0]["finish_reason"] == "content_filter"
    assert len(generated["choices"][0]["token_ids"]) == 2
    body = {
        "model": "tiny",
        "generate_response": generated,
        "chat_request": {"model": "tiny", "messages": USER, "tools": CHAT_TOOLS},
    }
    choice = http.post("/v1/chat/completions/derender", json=body).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["refusal"]) == ("content_filter", MESSAGE)
