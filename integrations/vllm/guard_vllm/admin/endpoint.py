"""vLLM's entry point for HTTP routes, `vllm.endpoint_plugins`; loaded where VLLM_PLUGINS names it."""

from __future__ import annotations

from typing import Any

from guard_vllm.admin.gate import stand_before
from guard_vllm.admin.live import build_live_router
from guard_vllm.admin.routes import build_router


class AdminEndpoint:
    """Without admin keys the routes answer 404, as if they were not there."""

    name = "moe_guard"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        app.include_router(build_router())
        app.include_router(build_live_router())
        stand_before(app)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Nothing: the routes find what they need once the engines are up."""
