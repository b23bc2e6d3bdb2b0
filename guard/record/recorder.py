"""Takes each step's routing beside the guard, and writes a request when it has ended.

The engine's thread copies rows and puts them on a queue; a thread of the recorder's own does the
rest. What it cannot keep up with it leaves out and counts: serving never waits for it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import torch

from guard.device.tap import RoutingTap
from guard.errors import GuardError
from guard.failures import Failures, Stage
from guard.program.applicability import in_sample
from guard.record.assembly import Assembly
from guard.record.step_copy import StepCopy
from guard.trace.format import TracedRequest
from guard.trace.writer import TraceWriter

logger = logging.getLogger(__name__)

MAX_QUEUED_BYTES: Final = 512 << 20
MAX_HELD_BYTES: Final = 2 << 30
"""Routing of requests under way; rows beyond it are left out of the trace, as unseen."""
CLOSE_SECONDS: Final = 10.0


class RecordError(GuardError):
    """Something that a trace should hold and does not."""


class _Ended(NamedTuple):
    """num_positions: how many positions count; None where the engine did not say"""

    req_id: str
    num_positions: int | None


class _Began(NamedTuple):
    req_id: str
    prompt_tokens: int


class _Flush(NamedTuple):
    done: threading.Event


class TraceRecorder:
    """One for a worker. Its methods are called by the engine's thread, in the order of the engine.

    Its owner closes it: its thread holds the tap.
    """

    def __init__(
        self, writer: TraceWriter, tap: RoutingTap, failures: Failures, sample: float = 1.0
    ) -> None:
        """sample: the share of requests that are recorded, by a hash of their ids"""
        self._writer = writer
        self._tap = tap
        self._failures = failures
        self._sample = sample
        self._recorded: set[str] = set()
        self._step: tuple[tuple[str, ...], torch.Tensor, torch.Tensor] | None = None
        self._queue: queue.SimpleQueue[_Began | StepCopy | _Ended | _Flush | None] = queue.SimpleQueue()
        self._queued_bytes = 0
        self._held_bytes = 0
        self._lock = threading.Lock()
        self._under_way: dict[str, Assembly] = {}
        self.full = False
        self._thread = threading.Thread(target=self._work, name="moe-guard-record", daemon=True)
        self._thread.start()

    def add_request(self, req_id: str, prompt_tokens: int) -> None:
        """One that is recorded already goes on as it is: preemption keeps a request."""
        if req_id in self._recorded or self.full or prompt_tokens < 1:
            return
        if self._sample < 1.0 and not in_sample(req_id, self._sample):
            return
        if self._is_behind("a request is not"):
            return
        self._recorded.add(req_id)
        self._queue.put(_Began(req_id, prompt_tokens))

    def finish_requests(self, req_ids: Iterable[str], ends: dict[str, int] | None = None) -> None:
        """ends: how many positions of a request count, where the engine knows: an engine that works
        ahead may have computed more"""
        for req_id in req_ids:
            if req_id in self._recorded:
                self._recorded.discard(req_id)
                self._queue.put(_Ended(req_id, (ends or {}).get(req_id)))

    def begin_step(
        self, req_ids: Sequence[str], query_start_B1: torch.Tensor, position_T: torch.Tensor
    ) -> None:
        """As `Guard.begin_step`."""
        self._step = None
        if not self.full and not self._recorded.isdisjoint(req_ids):
            self._step = tuple(req_ids), query_start_B1, position_T

    def end_step(self, rejected_B: torch.Tensor | None = None) -> None:
        """Behind the forward, before the next one writes the tap."""
        step, self._step = self._step, None
        if step is None:
            return
        if self._is_behind("a step's rows are not"):
            return
        with self._failures.caught(Stage.RECORD):
            copy = StepCopy(step[0], self._tap, step[1], step[2], rejected_B)
            with self._lock:
                self._queued_bytes += copy.num_bytes
            self._queue.put(copy)

    def _is_behind(self, lost: str) -> bool:
        if self._queued_bytes <= MAX_QUEUED_BYTES:
            return False
        text = f"the trace's writer does not keep up: {lost} in the trace"
        self._failures.note(Stage.RECORD, RecordError(text))
        return True

    def flush(self, ends: dict[str, int] | None = None) -> None:
        """Write all requests that are under way as if they had ended, and wait for it."""
        self.finish_requests(tuple(self._recorded), ends)
        done = threading.Event()
        self._queue.put(_Flush(done))
        done.wait(CLOSE_SECONDS)

    def close(self) -> None:
        """Write what is under way, and end."""
        if self._thread.is_alive():
            self.finish_requests(tuple(self._recorded))
            self._queue.put(None)
            self._thread.join(CLOSE_SECONDS)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            with self._failures.caught(Stage.RECORD):
                self._take(item)
        with self._failures.caught(Stage.RECORD):
            self._writer.close()

    def _take(self, item: _Began | StepCopy | _Ended | _Flush) -> None:
        match item:
            case _Began(req_id, prompt_tokens):
                self._under_way[req_id] = Assembly(prompt_tokens)
            case StepCopy():
                with self._lock:
                    self._queued_bytes -= item.num_bytes
                self._add_rows(item.ready())
            case _Ended(req_id, num_positions):
                self._write(req_id, num_positions)
            case _Flush(done):
                done.set()

    def _add_rows(self, step: StepCopy) -> None:
        left_out = False
        for req_id, position, topk_ids, topk_weights in step.rows():
            assembly = self._under_way.get(req_id)
            if assembly is None:
                continue
            if self._held_bytes > MAX_HELD_BYTES:
                left_out = True
                continue
            self._held_bytes += assembly.add(position, topk_ids, topk_weights)
        if left_out:
            raise RecordError("requests under way hold too much routing: rows are not in the trace")

    def _write(self, req_id: str, num_positions: int | None) -> None:
        assembly = self._under_way.pop(req_id, None)
        if assembly is None:
            return
        self._held_bytes -= assembly.num_bytes
        if self.full:
            return
        routing = assembly.routing(self._writer.header.topology, num_positions)
        if not self._writer.write(TracedRequest(routing, req_id, time.time())):
            self.full = True
            logger.warning(
                "The trace %s is full after %d requests: MoE Guard records no more until the server is "
                "started again",
                self._writer.path,
                self._writer.num_requests,
            )
            raise RecordError("the trace is full")
