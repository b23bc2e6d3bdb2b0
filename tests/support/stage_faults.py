"""A fault in each stage of the guard, once, in an engine that is one process: for tests only.

vLLM mixes `StageFaults` into its worker class (`worker_extension_cls`), and a test reaches it with
`LLM.collective_rpc`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import guard.events.tally
from guard.device.readback import Readback
from guard.events.ledger import Ledger
from guard.events.metrics import GuardMetrics


class StageFaults:
    """A method of the worker."""

    def fail_stage(self, stage: str) -> None:
        """The next call of what the stage does ends in an exception, and later ones do not."""
        hooks: Any = self.moe_guard_status.__self__._hooks  # type: ignore[attr-defined]
        guard = hooks.guard
        match stage:
            case "admit":
                _fail(guard._state, "add_request", times=2)  # of each request of the batch
            case "begin_step":
                _fail(guard._state, "apply_staged_writes")
            case "evaluate":
                _fail(guard._evaluator, "evaluate")
            case "readback":
                _fail(Readback, "result")
            case "ledger":
                _fail(Ledger, "begin_step")
            case "deliver":
                _fail(Ledger, "take")
            case "metrics":
                _fail(GuardMetrics, "apply", behind_it=True)
            case "decision_log":
                _fail(os, "write", OSError)
            case "event_buffer":
                _no_room_for_a_decision()
            case _:
                raise ValueError(stage)


def _fail(
    owner: Any,
    name: str,
    error: type[Exception] = RuntimeError,
    *,
    times: int = 1,
    behind_it: bool = False,
) -> None:
    """behind_it: what was to be done is done first"""
    stock: Callable[..., Any] = getattr(owner, name)
    left = [times]

    def failing(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            setattr(owner, name, stock)
        if behind_it:
            stock(*args, **kwargs)
        raise error("injected")

    setattr(owner, name, failing)


def _no_room_for_a_decision() -> None:
    """For one step."""
    stock = Ledger.begin_step
    room = guard.events.tally.MAX_PENDING_DECISIONS

    def begin_step(*args: Any, **kwargs: Any) -> Any:
        Ledger.begin_step = stock  # type: ignore[method-assign]
        guard.events.tally.MAX_PENDING_DECISIONS = 0
        try:
            return stock(*args, **kwargs)
        finally:
            guard.events.tally.MAX_PENDING_DECISIONS = room

    Ledger.begin_step = begin_step  # type: ignore[method-assign]
