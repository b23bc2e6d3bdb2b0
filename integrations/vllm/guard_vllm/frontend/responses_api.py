"""The responses API: a blocked response is incomplete for `content_filter`, and calls no tool."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from openai.types.responses import ResponseIncompleteEvent
from pydantic import create_model

from guard_vllm.compat import seam
from guard_vllm.frontend.blocked import CONTENT_FILTER, Sources
from guard_vllm.frontend.patching import Argument, Function, wrap
from guard_vllm.frontend.request_args import check_params, check_request_id

_CALLS = frozenset({"function_call", "custom_tool_call"})  # items that a client acts on
_CALL_EVENTS = ("response.function_call_arguments.", "response.custom_tool_call_input.")


def install_responses(sources: Sources) -> None:
    serving = seam("vllm.entrypoints.openai.responses.serving", "OpenAIServingResponses")
    wrap(serving, "_generate_with_builtin_tools", lambda f: _checked_first(f, sources))
    wrap(serving, "responses_full_generator", _full)
    wrap(serving, "responses_stream_generator", _streamed)
    wrap(serving, "responses_background_stream_generator", _background)
    for name in ("ParsableContext", "HarmonyContext"):
        context = seam("vllm.entrypoints.openai.responses.context", name)
        wrap(context, "need_builtin_tool_call", _no_tool_after_block)


def _blocked(context: Any) -> bool:
    """`content_filter` is a finish that only the guard gives."""
    if hasattr(context, "finish_reason"):
        return bool(context.finish_reason == CONTENT_FILTER)
    last = context.last_output
    return bool(last and last.outputs and last.outputs[0].finish_reason == CONTENT_FILTER)


def _checked_first(original: Function, sources: Sources) -> Function:
    """A request that asks for what it may not is refused before its stream is opened."""
    request_id = Argument(original, "request_id")
    sampling_params = Argument(original, "sampling_params")

    def _generate_with_builtin_tools(*args: Any, **kwargs: Any) -> Any:
        check_request_id(request_id.of(args, kwargs))
        check_params(sampling_params.of(args, kwargs), sources)
        return original(*args, **kwargs)

    return _generate_with_builtin_tools


def _no_tool_after_block(original: Function) -> Function:
    def need_builtin_tool_call(self: Any) -> Any:
        return not _blocked(self) and original(self)

    return need_builtin_tool_call


def _full(original: Function) -> Function:
    details = seam("vllm.entrypoints.openai.responses.protocol", "IncompleteDetails")
    context = Argument(original, "context")

    async def responses_full_generator(*args: Any, **kwargs: Any) -> Any:
        response = await original(*args, **kwargs)
        if hasattr(response, "incomplete_details") and _blocked(context.of(args, kwargs)):
            # The same object is in vLLM's store of responses.
            response.status = "incomplete"
            response.incomplete_details = details(reason=CONTENT_FILTER)
            response.output = [item for item in response.output if item.type not in _CALLS]
            if response.output:
                _cut_short(response.output[-1])
        return response

    return responses_full_generator


def _streamed(original: Function) -> Function:
    context = Argument(original, "context")
    incomplete = create_model(
        "ResponseIncompleteEvent",
        __base__=ResponseIncompleteEvent,
        response=(seam("vllm.entrypoints.openai.responses.protocol", "ResponsesResponse"), ...),
    )

    async def responses_stream_generator(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        session = context.of(args, kwargs)
        withheld = 0
        async with aclosing(original(*args, **kwargs)) as events:
            async for event in events:
                if _blocked(session):
                    if _is_about_a_call(event):
                        withheld += 1
                        continue
                    event.sequence_number -= withheld
                    if event.type == "response.output_item.done":
                        _cut_short(event.item)
                    elif event.type == "response.completed":
                        event = incomplete(
                            type="response.incomplete",
                            sequence_number=event.sequence_number,
                            response=event.response,
                        )
                yield event

    return responses_stream_generator


def _background(original: Function) -> Function:
    """vLLM follows a background response until `response.completed`; this one ends otherwise."""

    async def responses_background_stream_generator(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with aclosing(original(*args, **kwargs)) as events:
            async for event in events:
                yield event
                if event.type == "response.incomplete":
                    return

    return responses_background_stream_generator


def _is_about_a_call(event: Any) -> bool:
    if event.type.startswith(_CALL_EVENTS):
        return True
    item = getattr(event, "item", None)
    return item is not None and item.type in _CALLS


def _cut_short(item: Any) -> None:
    if getattr(item, "status", None) == "completed":
        item.status = "incomplete"
