"""The one place where a fault of the guard is caught: named by stage, counted, never swallowed."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from types import TracebackType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)


class Stage(StrEnum):
    """Where a fault or a loss happened; the label `stage` of the metrics."""

    ADMIT = "admit"
    BEGIN_STEP = "begin_step"
    EVALUATE = "evaluate"
    RANKS = "ranks"
    ROUTING = "routing"  # a report of the routers that cannot be true, found by the running check
    READBACK = "readback"
    LEDGER = "ledger"
    DELIVER = "deliver"
    METRICS = "metrics"
    DECISION_LOG = "decision_log"
    EVENT_BUFFER = "event_buffer"
    RELOAD = "reload"
    RECORD = "record"


class Failures:
    """Counts faults by stage. What follows from one is the caller's business, by the fail mode.

    has_new: there were some since `take` was called last

    Safe to call from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()
        self.has_new = False

    def take(self) -> dict[str, int]:
        """Faults since the last call, by stage."""
        if not self.has_new:
            return {}
        with self._lock:
            self.has_new = False
            new = self.count - self._taken
            self._taken += new
        return dict(new)

    def caught(self, stage: Stage) -> Attempt:
        """For `with`: runs guard code beside the engine's. An exception ends here, never a step."""
        return _make_attempt(self, stage)

    def tried(self, stage: Stage, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What `work` returns, or None where it failed. As a block of `caught`, for what comes in every
        step: it takes a fourth of the calls."""
        if _make_attempt is Attempt:
            try:
                return work(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - as in `Attempt`
                self.note(stage, error)
                return None
        with self.caught(stage):
            return work(*args, **kwargs)
        return None

    def note(self, stage: Stage, error: BaseException) -> None:
        """Count a fault. Of a stage the 1st, 2nd, 4th, 8th … is logged, the first with its trace."""
        with self._lock:
            self.count[stage] += 1
            self.has_new = True
            count = self.count[stage]
        if count.bit_count() > 1:
            return
        logger.error(
            "MoE Guard fault %d in stage %s: %s",
            count,
            stage,
            error,
            exc_info=error if count == 1 else None,
        )


class Attempt:
    """A block of guard code. `failed` says afterwards whether an exception ended it; what then
    follows is the fail mode's business."""

    def __init__(self, failures: Failures, stage: Stage) -> None:
        self._failures = failures
        self._stage = stage
        self.failed = False

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False  # none, or one that is meant to end the process
        self.failed = True
        self._failures.note(self._stage, error)
        return True


_make_attempt: Callable[[Failures, Stage], Attempt] = Attempt


def make_attempts(make: Callable[[Failures, Stage], Attempt]) -> None:
    """What `caught` gives from now on, in this process: `Attempt`, or what a drill makes."""
    global _make_attempt
    _make_attempt = make
