"""The chat API: a blocked choice keeps its text, calls no tool, and carries the rule's message.

The Anthropic and Cohere APIs are made of the same two generators.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from guard_vllm.compat import seam
from guard_vllm.frontend.blocked import CONTENT_FILTER, Sources, is_blocked
from guard_vllm.frontend.patching import Argument, Function, wrap
from guard_vllm.frontend.streams import (
    BlockedChoices,
    Choice,
    Chunk,
    chunk_of,
    end_blocked_choices,
)


def install_chat(sources: Sources) -> None:
    chat = seam("vllm.entrypoints.openai.chat_completion.serving", "OpenAIServingChat")
    batch = seam("vllm.entrypoints.openai.chat_completion.batch_serving", "OpenAIServingChatBatch")
    wrap(chat, "chat_completion_full_generator", lambda f: _full(f, sources))
    wrap(batch, "chat_completion_full_generator_batch", lambda f: _full(f, sources))
    wrap(chat, "chat_completion_stream_generator", lambda f: _streamed(f, sources))


def _full(original: Function, sources: Sources) -> Function:
    async def chat_completion_full_generator(*args: Any, **kwargs: Any) -> Any:
        response = await original(*args, **kwargs)
        for choice in getattr(response, "choices", ()):
            if is_blocked(choice.stop_reason):
                choice.finish_reason = CONTENT_FILTER
                choice.message.tool_calls = []
                choice.message.refusal = sources.message(choice.stop_reason) or None
        return response

    return chat_completion_full_generator


def _streamed(original: Function, sources: Sources) -> Function:
    results = Argument(original, "result_generator")

    def end(choice: Choice, stop_reason: str) -> None:
        delta = choice.setdefault("delta", {})
        delta.pop("tool_calls", None)
        if message := sources.message(stop_reason):
            delta["refusal"] = message

    def chat_completion_stream_generator(*args: Any, **kwargs: Any) -> AsyncIterator[str]:
        blocked = BlockedChoices()
        watched = blocked.watch(results.of(args, kwargs), _outputs)
        args, kwargs = results.replaced(args, kwargs, watched)
        return end_blocked_choices(original(*args, **kwargs), blocked, _head, end)

    return chat_completion_stream_generator


def _outputs(result: Any) -> list[tuple[int, Any]]:
    return [(output.index, output) for output in result.outputs]


def _head(first_line: str) -> Chunk:
    """A chat stream opens with a chunk that gives the role, so there is one to take this from."""
    chunk = chunk_of(first_line)
    return {
        name: chunk[name] for name in ("id", "object", "created", "model", "usage") if name in chunk
    }
