"""What a worker says of how its experts were used, when the engine core asks.

No call ever raises, for with several workers an answer of one would be taken for another's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.device.load import LoadReading
from guard.events.load import baseline_of
from guard.failures import Stage
from guard.program.program import Program
from guard.runtime import Guard

LOAD_METHOD = "moe_guard_load"


class LoadFacts(NamedTuple):
    """What the counts of a worker are to be read by.

    every: a step in so many is counted
    experts: of each layer
    baseline_LE: float64, the shares of the program's profiles; None where it reads none
    """

    every: int
    experts: tuple[int, ...]
    baseline_LE: NDArray[np.float64] | None

    @staticmethod
    def of(program: Program, every: int) -> LoadFacts:
        experts = tuple(layer.num_experts for layer in program.topology.layers)
        return LoadFacts(every, experts, baseline_of(program.distributions.shares))


class WorkerLoad:
    """Hangs on one worker. reads: another rank does not say the same"""

    def __init__(self, guard: Guard, *, reads: bool) -> None:
        self._guard = guard
        self._reads = reads

    def hook(self, worker: object) -> None:
        setattr(worker, LOAD_METHOD, self.load)

    def load(self, now: bool = False) -> LoadReading | None:
        """None where another rank speaks, or nothing is known yet.

        now: as of all steps so far, for which it waits
        """
        if not self._reads:
            return None
        reading = None
        with self._guard.failures.caught(Stage.METRICS):
            reading = self._guard.load.read() if now else self._guard.load.poll()
        return reading
