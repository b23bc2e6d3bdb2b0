"""The one place where a fault of the guard is caught: named by stage, counted, never swallowed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

logger = logging.getLogger(__name__)


class Stage(StrEnum):
    """Where a fault or a loss happened; the label `stage` of the metrics."""

    ADMIT = "admit"
    BEGIN_STEP = "begin_step"
    EVALUATE = "evaluate"
    READBACK = "readback"
    LEDGER = "ledger"
    DELIVER = "deliver"
    METRICS = "metrics"
    DECISION_LOG = "decision_log"
    EVENT_BUFFER = "event_buffer"


class Attempt:
    """A block that ran under `Failures.caught`."""

    failed = False


class Failures:
    """Counts faults by stage. What follows from one is the caller's business, by the fail mode."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()

    def take(self) -> dict[str, int]:
        """Faults since the last call, by stage."""
        new = self.count - self._taken
        self._taken += new
        return dict(new)

    @contextmanager
    def caught(self, stage: Stage) -> Iterator[Attempt]:
        """Run guard code beside the engine's: an exception ends here, so it never ends a step.

        What is yielded says afterwards whether that happened; what then follows is the fail mode's.
        """
        attempt = Attempt()
        try:
            yield attempt
        except Exception as error:  # noqa: BLE001 (a guard fault must not take the engine down)
            attempt.failed = True
            self.count[stage] += 1
            first = self.count[stage] == 1
            logger.error(
                "MoE Guard fault %d in stage %s: %s", self.count[stage], stage, error, exc_info=first
            )
