"""/v1/responses: incomplete for content_filter, and no call that a client would run."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.integration.frontend.asked import (
    CALL_AND_LETTERS,
    LETTERS,
    PARAMETERS,
    block,
    letters_then_block,
)

pytestmark = pytest.mark.vllm

TOOLS = [{"type": "function", "name": "f", "parameters": PARAMETERS}]


def respond(client: openai.OpenAI, extra: dict[str, Any], **fields: Any) -> Any:
    return client.responses.create(
        model="tiny", input="hi", max_output_tokens=300, extra_body=extra, **fields
    )


def assert_incomplete(response: Any, output_tokens: int) -> None:
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "content_filter"
    assert response.usage.output_tokens == output_tokens


@pytest.mark.parametrize("passed", [0, 2])
def test_blocked_response_is_incomplete(client: openai.OpenAI, passed: int) -> None:
    response = respond(client, letters_then_block(passed))
    assert_incomplete(response, passed)
    assert len(response.output_text) == passed
    assert {item.status for item in response.output} <= {"incomplete"}


@pytest.mark.parametrize("passed", [0, 2])
def test_streamed_response_ends_with_response_incomplete(client: openai.OpenAI, passed: int) -> None:
    events = list(respond(client, letters_then_block(passed), stream=True))
    types = [event.type for event in events]
    assert types[-1] == "response.incomplete"
    assert "response.completed" not in types
    assert_incomplete(events[-1].response, passed)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len("".join(deltas)) == passed
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize("passed", [60, 135], ids=["inside the call", "behind the call"])
def test_blocked_response_holds_no_call(client: openai.OpenAI, passed: int) -> None:
    extra = {**block(passed), "structured_outputs": CALL_AND_LETTERS}
    response = respond(client, extra, tools=TOOLS)
    assert_incomplete(response, passed)
    assert {item.type for item in response.output} <= {"message"}


@pytest.mark.parametrize("passed", [60, 135], ids=["inside the call", "behind the call"])
def test_streamed_call_is_not_finished_after_the_block(client: openai.OpenAI, passed: int) -> None:
    extra = {**block(passed), "structured_outputs": CALL_AND_LETTERS}
    events = list(respond(client, extra, tools=TOOLS, stream=True))
    types = [event.type for event in events]
    assert "response.function_call_arguments.delta" in types, "no call was begun"
    assert "response.function_call_arguments.done" not in types
    assert "response.output_item.done" not in types
    assert types[-1] == "response.incomplete"
    assert events[-1].response.output == []
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_same_response_unblocked_holds_the_call(client: openai.OpenAI) -> None:
    extra = {**block(1000), "structured_outputs": CALL_AND_LETTERS}
    response = respond(client, extra, tools=TOOLS)
    assert (response.status, response.output[0].type) == ("completed", "function_call")


def test_response_cut_at_its_limit_still_says_so(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="tiny", input="hi", max_output_tokens=16, extra_body={"structured_outputs": LETTERS}
    )
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


def test_stored_and_background_responses_say_the_same(client: openai.OpenAI) -> None:
    stored = respond(client, letters_then_block(2), store=True)
    assert_incomplete(client.responses.retrieve(stored.id), 2)
    started = respond(client, letters_then_block(2), store=True, background=True, stream=True)
    first = next(iter(started))
    events = list(client.responses.retrieve(first.response.id, stream=True))
    assert events[-1].type == "response.incomplete"
