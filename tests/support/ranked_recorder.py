"""A recorder in an engine of several ranks, with faults on one of them alone: for tests only."""

from __future__ import annotations

from typing import Any

from tests.support.routing_recorder import RoutingRecorder


class RankedRecorder(RoutingRecorder):
    """vLLM mixes this into its worker class, where `rank` is the worker's own."""

    rank: int

    def fail_next_evaluation(self, rank: int) -> None:
        """The guard of one rank meets a fault in its next step, and none later."""
        if self.rank != rank:
            return
        guard = self.moe_guard_status.__self__._hooks.guard  # type: ignore[attr-defined]
        evaluator = guard._evaluator
        stock = evaluator.evaluate

        def fail_once(*_: Any, **__: Any) -> Any:
            evaluator.evaluate = stock
            raise RuntimeError("injected")

        evaluator.evaluate = fail_once
