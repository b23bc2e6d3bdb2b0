"""/v1/messages, the Anthropic API: a blocked message is a refusal."""

from __future__ import annotations

import warnings
from typing import Any

import anthropic
import pytest

from tests.integration.frontend.asked import PARAMETERS, block, letters_then_block

pytestmark = pytest.mark.vllm

USER: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [{"name": "f", "input_schema": PARAMETERS}]


@pytest.mark.parametrize("passed", [0, 2])
def test_blocked_message_is_a_refusal(messages_client: anthropic.Anthropic, passed: int) -> None:
    message = messages_client.messages.create(
        model="tiny", max_tokens=20, messages=USER, extra_body=letters_then_block(passed)
    )
    assert (message.stop_reason, message.stop_sequence) == ("refusal", None)
    assert message.usage.output_tokens == passed


@pytest.mark.parametrize("passed", [0, 2])
def test_streamed_message_ends_as_a_refusal(messages_client: anthropic.Anthropic, passed: int) -> None:
    with messages_client.messages.stream(
        model="tiny", max_tokens=20, messages=USER, extra_body=letters_then_block(passed)
    ) as stream:
        message = stream.get_final_message()
    assert (message.stop_reason, message.stop_sequence) == ("refusal", None)
    assert message.usage.output_tokens == passed


@pytest.mark.parametrize("passed", [2, 60])
def test_blocked_message_with_tools_on_offer_uses_none(
    messages_client: anthropic.Anthropic, passed: int
) -> None:
    extra = block(passed)  # this API takes no grammar, so no call can be brought about
    message = messages_client.messages.create(
        model="tiny", max_tokens=300, messages=USER, tools=TOOLS, extra_body=extra
    )
    assert message.stop_reason == "refusal"
    assert {part.type for part in message.content} == {"text"}


@pytest.mark.parametrize("passed", [2, 60])
def test_streamed_message_with_tools_on_offer_ends_as_a_refusal(
    messages_client: anthropic.Anthropic, passed: int
) -> None:
    extra = block(passed)  # this API takes no grammar, so no call can be brought about
    events = list(
        messages_client.messages.create(
            model="tiny",
            max_tokens=300,
            messages=USER,
            tools=TOOLS,
            stream=True,
            extra_body=extra,
        )
    )
    ends = [event.delta.stop_reason for event in events if event.type == "message_delta"]
    assert ends == ["refusal"]


def test_unblocked_message_ends_as_ever(messages_client: anthropic.Anthropic) -> None:
    message = messages_client.messages.create(
        model="tiny", max_tokens=5, messages=USER, extra_body=letters_then_block(1000)
    )
    assert message.stop_reason == "max_tokens"


def test_models_of_the_api_take_refusal_without_a_warning() -> None:
    from guard_vllm.frontend.messages_api import install_messages

    install_messages()
    from vllm.entrypoints.anthropic.protocol import AnthropicDelta, AnthropicStreamEvent

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        event = AnthropicStreamEvent(type="message_delta", delta=AnthropicDelta(stop_reason="refusal"))
        assert '"stop_reason":"refusal"' in event.model_dump_json(exclude_unset=True)
