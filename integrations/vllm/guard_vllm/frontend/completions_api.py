"""The completions API, streamed. Unstreamed, its response says all by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from guard_vllm.compat import seam
from guard_vllm.frontend.patching import Argument, Function, wrap
from guard_vllm.frontend.streams import BlockedChoices, Choice, Chunk, end_blocked_choices


def install_completions() -> None:
    completions = seam("vllm.entrypoints.openai.completion.serving", "OpenAIServingCompletion")
    wrap(completions, "completion_stream_generator", _streamed)


def _streamed(original: Function) -> Function:
    request = Argument(original, "request")
    results = Argument(original, "result_generator")
    request_id = Argument(original, "request_id")
    created_time = Argument(original, "created_time")
    model_name = Argument(original, "model_name")

    def completion_stream_generator(*args: Any, **kwargs: Any) -> AsyncIterator[str]:
        choices_per_prompt = request.of(args, kwargs).n or 1
        head = {
            "id": request_id.of(args, kwargs),
            "object": "text_completion",
            "created": created_time.of(args, kwargs),
            "model": model_name.of(args, kwargs),
        }

        def outputs(item: Any) -> list[tuple[int, Any]]:
            prompt_index, result = item
            first = prompt_index * choices_per_prompt
            return [(first + output.index, output) for output in result.outputs]

        def make_head(_first_line: str) -> Chunk:
            return head

        blocked = BlockedChoices()
        watched = blocked.watch(results.of(args, kwargs), outputs)
        args, kwargs = results.replaced(args, kwargs, watched)
        return end_blocked_choices(original(*args, **kwargs), blocked, make_head, _end)

    return completion_stream_generator


def _end(choice: Choice, _stop_reason: str) -> None:
    choice.setdefault("text", "")
