"""/v1/completions, and what every API has from the same place: nothing of the withheld token."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.integration.frontend.asked import STOP_REASON, block, letters_then_block

pytestmark = pytest.mark.vllm

ALL_AT_ONCE = {"min_tokens": 20, "ignore_eos": True, "return_token_ids": True}


def complete(client: openai.OpenAI, extra: dict[str, Any], **fields: Any) -> Any:
    return client.completions.create(
        model="tiny", prompt="hello", max_tokens=20, extra_body=extra, **fields
    )


def test_blocked_completion_shows_nothing_of_the_withheld_position(client: openai.OpenAI) -> None:
    answer = complete(client, {**letters_then_block(3), **ALL_AT_ONCE}, logprobs=2)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("content_filter", STOP_REASON)
    assert len(choice.text) == 3
    assert len(choice.token_ids) == len(choice.logprobs.tokens) == 3
    assert len(choice.logprobs.top_logprobs) == len(choice.logprobs.token_logprobs) == 3
    assert answer.usage.completion_tokens == 3


def test_completion_blocked_at_its_first_token_is_empty(client: openai.OpenAI) -> None:
    answer = complete(client, letters_then_block(0), logprobs=2)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.text) == ("content_filter", "")
    assert choice.logprobs.tokens == []
    assert answer.usage.completion_tokens == 0


def test_streamed_completion_ends_with_content_filter(client: openai.OpenAI) -> None:
    fields = {"stream": True, "logprobs": 1, "stream_options": {"include_usage": True}}
    *chunks, usage = complete(client, letters_then_block(2), **fields)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "content_filter"]
    assert chunks[-1].choices[0].stop_reason == STOP_REASON
    assert len("".join(chunk.choices[0].text for chunk in chunks)) == 2
    assert sum(len(chunk.choices[0].logprobs.tokens) for chunk in chunks) == 2
    assert usage.usage.completion_tokens == 2


def test_stream_of_a_choice_blocked_at_its_first_token_still_tells_its_end(
    client: openai.OpenAI,
) -> None:
    extra = letters_then_block(0, test_only_choice=1)
    chunks = list(complete(client, extra, n=2, stream=True))
    ends = {
        chunk.choices[0].index: chunk.choices[0].finish_reason
        for chunk in chunks
        if chunk.choices[0].finish_reason
    }
    assert ends == {0: "length", 1: "content_filter"}
    assert "".join(c.choices[0].text for c in chunks if c.choices[0].index == 1) == ""
    assert len("".join(c.choices[0].text for c in chunks if c.choices[0].index == 0)) == 20


def test_stream_of_two_prompts_counts_choices_over_both(client: openai.OpenAI) -> None:
    with client.completions.create(
        model="tiny",
        prompt=["a", "b"],
        max_tokens=4,
        stream=True,
        extra_body=letters_then_block(0),
    ) as chunks:
        ends = [(c.choices[0].index, c.choices[0].finish_reason) for c in chunks]
    assert sorted(ends) == [(0, "content_filter"), (1, "content_filter")]


def test_one_choice_of_three_is_blocked_and_the_others_are_not(client: openai.OpenAI) -> None:
    answer = complete(client, letters_then_block(5, test_only_choice=1), n=3)
    ends = {choice.index: (choice.finish_reason, len(choice.text)) for choice in answer.choices}
    assert ends == {0: ("length", 20), 1: ("content_filter", 5), 2: ("length", 20)}


def test_text_held_back_for_a_stop_string_comes_out_as_for_any_finish(
    client: openai.OpenAI,
) -> None:
    chunks = list(complete(client, letters_then_block(4), stop=["0123456789"], stream=True))
    assert len("".join(chunk.choices[0].text for chunk in chunks)) == 4
    assert chunks[-1].choices[0].finish_reason == "content_filter"


def test_stop_string_before_the_block_is_an_ordinary_stop(client: openai.OpenAI) -> None:
    extra = {**block(10), "structured_outputs": {"regex": "abcd[a-z]{30}"}}
    choice = complete(client, extra, stop=["cd"]).choices[0]
    assert (choice.finish_reason, choice.stop_reason, choice.text) == ("stop", "cd", "ab")


def test_token_kept_in_the_step_of_the_block_keeps_its_text(client: openai.OpenAI) -> None:
    extra = {**letters_then_block(3, test_block_keeps=1), "return_token_ids": True}
    choice = complete(client, extra).choices[0]
    assert (choice.finish_reason, len(choice.text), len(choice.token_ids)) == (
        "content_filter",
        3,
        3,
    )


def test_bytes_of_an_unfinished_character_are_not_completed(client: openai.OpenAI) -> None:
    extra = {**block(1), "structured_outputs": {"regex": "é{20}"}, "return_token_ids": True}
    choice = complete(client, extra).choices[0]
    assert (choice.finish_reason, len(choice.token_ids)) == ("content_filter", 1)
    assert "é" not in choice.text


def test_request_that_nothing_blocks_ends_as_ever(client: openai.OpenAI) -> None:
    choice = complete(client, letters_then_block(1000)).choices[0]
    assert (choice.finish_reason, choice.stop_reason, len(choice.text)) == ("length", None, 20)


@pytest.mark.parametrize(
    "body",
    [{"prompt": "hello"}, {"messages": [{"role": "user", "content": "hi"}]}],
    ids=["completion", "chat"],
)
def test_invocations_report_the_block(http: httpx.Client, body: dict[str, Any]) -> None:
    answer = http.post(
        "/invocations", json={"model": "tiny", "max_tokens": 9, **body, **letters_then_block(2)}
    ).json()
    assert answer["choices"][0]["finish_reason"] == "content_filter"
    assert answer["usage"]["completion_tokens"] == 2
