"""What stands before every path under `/guard`: who calls, how often, how much, and what leaves.

It is the outermost of the server's middlewares, so that none of them answers for these paths, reads a
body for somebody without a key, or adds a header to what is said here.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Final

from starlette.responses import JSONResponse

from guard_vllm.admin.context import AdminContext, admin_context
from guard_vllm.admin.keys import Person
from guard_vllm.admin.limits import caller_of

logger = logging.getLogger(__name__)

ROOT: Final = "/guard"
PERSON: Final = "moe_guard.person"
"""Where the scope of a request says who was let in; nothing but the gate writes it."""

MAX_BODY_BYTES: Final = 64 << 10
_PAGES: Final = (ROOT, f"{ROOT}/")
_KILL_SWITCH: Final = f"{ROOT}/v1/kill-switch"
_LOOKING: Final = ("GET", "HEAD")
_HEADERS: Final = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)


def stand_before(app: Any) -> None:
    """Hang the gate around all that the app consists of when it is first asked. app: FastAPI's"""
    stock = app.build_middleware_stack  # Starlette's, so no seam of vLLM
    app.build_middleware_stack = lambda: AdminGate(stock())


class AdminGate:
    """ASGI. Other paths pass it as they are.

    No other site's page gets to read or change anything: a key travels in a header, which no browser
    sends by itself; and what vLLM's CORS middleware would say, whatever it is told to allow, is not
    asked for in a preflight, which has no key, and is taken out of every other answer.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not _is_ours(path := _path(scope)):
            await self._app(scope, receive, send)
            return
        send = _sealed(send)
        context = admin_context()
        if context is None or context.keys is None:
            await _answer(404, "Not Found")(scope, receive, send)
            return
        method = scope["method"]
        if path in _PAGES and method in _LOOKING:
            await self._app(scope, receive, send)
            return
        person = _let_in(context, scope)
        if isinstance(person, JSONResponse):
            await person(scope, receive, send)
            return
        if method not in _LOOKING and person.may_change:
            wait_s = context.limits.change(
                caller_of(scope.get("client")), is_urgent=path == _KILL_SWITCH
            )
            if wait_s:
                await _too_many("changes", wait_s)(scope, receive, send)
                return
        body = await _body(receive)
        if body is None:
            await _answer(413, f"a body has at most {MAX_BODY_BYTES} bytes")(scope, receive, send)
            return
        await self._app({**scope, PERSON: person}, _given(body, receive), send)


def _let_in(context: AdminContext, scope: Any) -> Person | JSONResponse:
    """Who calls, or what to say to somebody unknown.

    A right key is held up by wrong ones from its own address alone. A request without any key tries
    none, and costs nobody anything.
    """
    assert context.keys is not None
    caller = caller_of(scope.get("client"))
    if wait_s := context.limits.guess_wait_s(caller):
        return _too_many("wrong keys", wait_s)
    person = context.keys.person(scope["headers"])
    if person is not None:
        return person
    if any(name.lower() == b"authorization" for name, _ in scope["headers"]):
        if wait_s := context.limits.fail(caller):
            return _too_many("wrong keys", wait_s)
        logger.warning("MoE Guard: a wrong key for /guard/v1 from %s", caller)
    return _answer(
        401,
        "give a key of admin_keys: Authorization: Bearer KEY",
        {"WWW-Authenticate": "Bearer"},
    )


async def _body(receive: Any) -> bytes | None:
    """All of it; None where it is too large, which is seen before it is read to its end."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":  # the client is gone
            return bytes(body)
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _given(body: bytes, receive: Any) -> Any:
    """Receives the body in one piece, and then what else comes."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Any:
        return waiting.pop() if waiting else await receive()

    return receive_again


def _sealed(send: Any) -> Any:
    """Every answer bears the headers above, unless it has its own, and lets no other origin read it."""

    async def send_sealed(message: Any) -> None:
        if message["type"] == "http.response.start":
            given = [
                (name, value)
                for name, value in message.get("headers", ())
                if not name.lower().startswith(b"access-control-")
            ]
            names = {name.lower() for name, _ in given}
            added = [header for header in _HEADERS if header[0] not in names]
            message = {**message, "headers": [*given, *added]}
        await send(message)

    return send_sealed


def _path(scope: Any) -> str:
    """Without the prefix that a proxy gave it, as the router sees it."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _is_ours(path: str) -> bool:
    return path == ROOT or path.startswith(f"{ROOT}/")


def _too_many(what: str, wait_s: float) -> JSONResponse:
    seconds = max(math.ceil(wait_s), 1)
    message = f"too many {what}; try again in {seconds} s"
    return _answer(429, message, {"Retry-After": str(seconds)})


def _answer(code: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """As vLLM's own errors read."""
    error = {"message": message, "type": "guard_admin_error", "param": None, "code": code}
    return JSONResponse({"error": error}, code, headers)
