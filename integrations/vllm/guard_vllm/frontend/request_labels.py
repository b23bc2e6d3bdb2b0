"""The labels of HTTP requests, from where the server receives them to where the engine is called.

A middleware inside vLLM's own reads them and leaves them in a context variable, which reaches the
handler, the tasks that it starts and the stream that it answers with. Where the variable is not set,
a program calls the engine itself, and is trusted with the labels that it gives.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from starlette.responses import JSONResponse

from guard_vllm.frontend.blocked import Sources
from guard_vllm.frontend.patching import Argument, Function, wrap
from guard_vllm.labels import LabelError
from guard_vllm.request_facts import LABELS

_labels: ContextVar[Mapping[str, str] | None] = ContextVar("moe_guard_labels", default=None)


class GivenLabels(dict[str, str]):
    """Labels that the middleware put into a request. A body holds none of this class."""


def is_over_http() -> bool:
    """Whether the code that asks answers an HTTP request."""
    return _labels.get() is not None


def with_given_labels(params: Any) -> Any:
    """The sampling parameters with the labels of the HTTP request that is being answered."""
    labels = _labels.get()
    if not labels or not hasattr(params, "extra_args"):
        return params
    labelled = copy.copy(params)  # what the caller has may be used for other requests, too
    labelled.extra_args = {**(params.extra_args or {}), LABELS: GivenLabels(labels)}
    return labelled


def install_request_labels(sources: Sources) -> None:
    wrap(
        "vllm.entrypoints.launchers.app",
        "init_entrypoints_middleware",
        lambda f: _with_middleware(f, sources),
    )


def _with_middleware(original: Function, sources: Sources) -> Function:
    app_argument = Argument(original, "app")

    def init_entrypoints_middleware(*args: Any, **kwargs: Any) -> Any:
        # Before vLLM's and the operator's, so inside them: behind authentication, and after a
        # middleware that sets a header.
        app_argument.of(args, kwargs).add_middleware(LabelMiddleware, sources=sources)
        return original(*args, **kwargs)

    return init_entrypoints_middleware


class LabelMiddleware:
    """ASGI: sets the context variable for a request, or refuses it."""

    def __init__(self, app: Any, sources: Sources) -> None:
        self._app = app
        self._sources = sources

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            labels = self._sources.labels.labels_of(scope["headers"])
        except LabelError as error:
            await _refuse(str(error), scope, receive, send)
            return
        token = _labels.set(labels)
        try:
            await self._app(scope, receive, send)
        finally:
            _labels.reset(token)


async def _refuse(message: str, scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": message})
        return
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": 400}
    # As OpenAI's clients read it, and as Anthropic's do.
    await JSONResponse({"type": "error", "error": error}, 400)(scope, receive, send)
