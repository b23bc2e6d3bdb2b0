"""Writes down how long an engine's steps take, and which of them waited for a reload.

Has a class for vLLM's `--scheduler-cls`: importing it in the engine core is what counts. One JSON
line a step goes to the file that MOE_GUARD_STEP_CLOCK names: when it ended, and
seconds from when the engine had work to do until its result was out, calls of API servers in between
included.
"""

from __future__ import annotations

import functools
import json
import os
import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCoreProc

VARIABLE = "MOE_GUARD_STEP_CLOCK"
RELOAD_CALLS = ("moe_guard_prepare_reload", "moe_guard_commit_reload")


class ClockedScheduler(Scheduler):
    """vLLM's own."""


class _Clock:
    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - for the process
        self._waited_s = 0.0
        self._reload_s: dict[str, float] = {}

    def handle(self, stock: Any, core: Any, request_type: Any, request: Any) -> Any:
        name = request[2] if request_type.name == "UTILITY" else ""
        begun = time.perf_counter()
        try:
            return stock(core, request_type, request)
        finally:
            took = time.perf_counter() - begun
            self._waited_s += took
            if name in RELOAD_CALLS:
                self._reload_s[name] = self._reload_s.get(name, 0.0) + took

    def step(self, stock: Any, core: Any) -> Any:
        begun = time.perf_counter()
        executed = stock(core)
        if executed:
            seconds = time.perf_counter() - begun + self._waited_s
            at, running = time.monotonic(), len(core.scheduler.running)
            record = {"at": at, "seconds": seconds, "running": running}
            if self._reload_s:
                record["reload"] = self._reload_s
            self._file.write(json.dumps(record) + "\n")
            self._reload_s = {}
        self._waited_s = 0.0
        return executed


def _install(clock: _Clock) -> None:
    handle, step = EngineCoreProc._handle_client_request, EngineCoreProc._process_engine_step
    if getattr(step, "is_clocked", False):
        return

    @functools.wraps(handle)
    def clocked_handle(core: Any, request_type: Any, request: Any) -> Any:
        return clock.handle(handle, core, request_type, request)

    @functools.wraps(step)
    def clocked_step(core: Any) -> Any:
        return clock.step(step, core)

    clocked_step.is_clocked = True  # type: ignore[attr-defined]
    EngineCoreProc._handle_client_request = clocked_handle  # type: ignore[method-assign]
    EngineCoreProc._process_engine_step = clocked_step  # type: ignore[method-assign]


if VARIABLE in os.environ:
    _install(_Clock(os.environ[VARIABLE]))
