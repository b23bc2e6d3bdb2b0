"""The derender endpoints, which make chat responses of what /inference/v1/generate returned."""

from __future__ import annotations

from typing import Any

from guard_vllm.compat import seam
from guard_vllm.frontend.blocked import CONTENT_FILTER, Sources, is_blocked
from guard_vllm.frontend.patching import Function, wrap


def install_derender(sources: Sources) -> None:
    derenderer = seam("vllm.renderers.online_derenderer", "OnlineDerenderer")
    wrap(derenderer, "derender_chat", lambda f: _full(f, sources))
    wrap(derenderer, "derender_chat_stream", lambda f: _streamed(f, sources))


def _full(original: Function, sources: Sources) -> Function:
    async def derender_chat(*args: Any, **kwargs: Any) -> Any:
        choices = await original(*args, **kwargs)
        for choice in choices:
            _end(choice, choice.message, sources)
        return choices

    return derender_chat


def _streamed(original: Function, sources: Sources) -> Function:
    async def derender_chat_stream(*args: Any, **kwargs: Any) -> Any:
        chunk, state = await original(*args, **kwargs)
        for choice in chunk.choices:
            _end(choice, choice.delta, sources)
        return chunk, state

    return derender_chat_stream


def _end(choice: Any, message: Any, sources: Sources) -> None:
    if is_blocked(choice.stop_reason):
        choice.finish_reason = CONTENT_FILTER
        message.tool_calls = []
        if text := sources.message(choice.stop_reason):
            message.refusal = text
