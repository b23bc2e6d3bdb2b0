"""How experts are used, in an engine core: asked of the workers now and then, summed up, passed on.

Ranks of a pipeline count the layers that they have, so their counts add up; of tensor-parallel ranks
the first one answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from guard.device.load import LoadReading
from guard.events.load import ExpertCounts, LayerCounts, LoadWindow, encode_counts, layer_load
from guard.events.message import Load
from guard_vllm.worker import WorkerStatus
from guard_vllm.worker_load import LOAD_METHOD

LOAD_SECONDS = 5.0
"""Between two questions."""

CORE_LOAD_METHOD = "moe_guard_load"


class CoreLoad:
    """Hangs on one engine core.

    tell: takes a summary to the first API server; None where another engine core does, and then the
        workers are not asked
    """

    def __init__(
        self,
        core: Any,
        engine: int,
        status: WorkerStatus,
        tell: Callable[[Load], None] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._tell = tell
        self._clock = clock
        self._layers = status.layers
        self._asked_at = clock()
        self._answer: Future[Sequence[LoadReading | None]] | None = None
        self._facts = status.load
        max_experts = 0 if status.load is None else max(status.load.experts, default=0)
        self._window = LoadWindow(engine, status.layers, max_experts)
        setattr(core, CORE_LOAD_METHOD, self.load)

    def follow(self, status: WorkerStatus) -> None:
        """Another program is in force, with baselines of its own."""
        self._facts = status.load

    def load(self) -> bytes:
        """`ExpertCounts`, from the start on; between two steps, for which it waits."""
        if self._facts is None:
            return encode_counts(ExpertCounts(0, 0, []))
        readings = self._core.model_executor.collective_rpc(LOAD_METHOD, args=(True,))
        reading = _sum(readings)
        if reading is None:
            return encode_counts(ExpertCounts(0, self._facts.every, []))
        layers = []
        for row, (number, experts) in enumerate(zip(self._layers, self._facts.experts, strict=True)):
            counts_E, baseline_LE = reading.counts_LE[row], self._facts.baseline_LE
            shares_E = None if baseline_LE is None else baseline_LE[row]
            load = layer_load(number, counts_E, shares_E)
            layers.append(LayerCounts(number, counts_E[:experts].tolist(), load))
        return encode_counts(ExpertCounts(reading.tokens, self._facts.every, layers))

    def ask_if_due(self) -> None:
        """Between two steps. Nothing here waits: the answer comes back with a later step's."""
        if self._facts is None or self._tell is None:
            return
        if self._answer is not None and self._answer.done():
            answer, self._answer = self._answer, None
            self._take(_sum(answer.result()))
        now = self._clock()
        if self._answer is None and now - self._asked_at >= LOAD_SECONDS:
            self._asked_at = now
            executor = self._core.model_executor
            self._answer = executor.collective_rpc(LOAD_METHOD, args=(False,), non_block=True)

    def _take(self, reading: LoadReading | None) -> None:
        if reading is None or self._tell is None or self._facts is None:
            return
        summary = self._window.summary(*reading, self._facts.baseline_LE)
        if summary is not None:
            self._tell(summary)
            self._window.close(*reading)


def _sum(readings: Sequence[LoadReading | None]) -> LoadReading | None:
    """Of ranks that have other layers of the same rows."""
    found = [reading for reading in readings if reading is not None]
    if not found:
        return None
    counts_LE = found[0].counts_LE.copy()
    for reading in found[1:]:
        counts_LE += reading.counts_LE
    return LoadReading(max(reading.tokens for reading in found), counts_LE)
