"""What operators watch while it happens: the stream of decisions, and a page that shows it all."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, HTTPException
from fastapi.responses import HTMLResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from guard_vllm.admin import bodies
from guard_vllm.admin.context import admin_context
from guard_vllm.admin.routes import PREFIX, Viewer
from guard_vllm.admin.stream import MAX_SUBSCRIBERS, Subscription, event_stream

PAGE: Final = Path(__file__).parent / "page.html"
_INLINE: Final = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)
_STREAM: Final[dict[str, Any]] = {
    "response_class": StreamingResponse,
    "responses": {
        200: {
            "content": {"text/event-stream": {}},
            "description": "`event: decision` with the decision's id, `event: dropped` with a count.",
        },
        401: {"model": bodies.Problem, "description": "No key, or one that is not known."},
        404: {"model": bodies.Problem, "description": "There is no admin API."},
        503: {"model": bodies.Problem, "description": "Too many read it already."},
    },
}


def build_live_router() -> APIRouter:
    router = APIRouter(tags=["MoE Guard"])
    router.get(f"{PREFIX}/events/stream", **_STREAM)(stream)
    router.get("/guard/events", **_STREAM)(stream)
    router.get("/guard/", response_class=HTMLResponse, include_in_schema=False)(page)
    return router


async def stream(known: Viewer) -> StreamingResponse:
    """Decisions as they reach this process, as server-sent events."""
    subscription = event_stream(known.context.bus).subscribe()
    if subscription is None:
        raise HTTPException(503, f"{MAX_SUBSCRIBERS} clients read the events already; close one")
    return _Stream(subscription)


def page() -> HTMLResponse:
    """It holds no data: what it shows it asks for, with the key that it is given."""
    context = admin_context()
    if context is None or context.keys is None:
        raise HTTPException(404, "Not Found")
    html, headers = _page()
    return HTMLResponse(html, headers=headers)


class _Stream(StreamingResponse):
    """Leaves its place to another client however it ends."""

    def __init__(self, subscription: Subscription) -> None:
        super().__init__(
            subscription.lines(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._subscription = subscription

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._subscription.close()


@cache
def _page() -> tuple[str, dict[str, str]]:
    """The page, and headers that allow it its own script and style and nothing else."""
    html = PAGE.read_text("utf-8")
    allowed: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed[kind].append(f"'sha256-{digest}'")
    policy = [
        "default-src 'none'",
        f"script-src {' '.join(allowed['script'])}",
        f"style-src {' '.join(allowed['style'])}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return html, {
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-store",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
