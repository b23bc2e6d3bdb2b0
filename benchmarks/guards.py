"""Guards without an engine, driven as vLLM drives them: for what their own work costs."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from benchmarks.overhead.states import observing
from guard.device.kernels.choice import KERNELS_VARIABLE, Kernels
from guard.device.layout import Capacity
from guard.device.readback import Readback
from guard.events.ledger import Ledger
from guard.events.message import RuleFacts
from guard.events.rulebook import RuleBook
from guard.policy import parse_policies
from guard.program.compile import compile_policies
from guard.program.program import Program
from guard.program.step_report import PackedReport, StepReport
from guard.program.topology import MoELayer, Topology
from guard.runtime import Guard

CPU = torch.device("cpu")
BLOCK_SIZE = 16
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a guard is made for. prompt_rows: rows of each request in a step, 1 for decoding"""

    layers: int = 12
    experts: int = 64
    top_k: int = 8
    policies: int = 16
    requests: int = 16
    prompt_rows: int = 1
    kv_blocks: int = 2048

    @property
    def topology(self) -> Topology:
        layers = (MoELayer(number, self.experts, self.top_k) for number in range(self.layers))
        return Topology("BenchmarkForCausalLM", tuple(layers))

    @property
    def rows(self) -> int:
        return self.requests * self.prompt_rows

    def program(self, policies: str | None = None) -> Program:
        """policies: YAML, by default so many that observe"""
        text = policies or "---\n".join(map(observing, range(self.policies)))
        text = text.replace("ALL_LAYERS", f"0-{self.layers - 1}")
        return compile_policies(
            parse_policies(text.replace("ALL_EXPERTS", f"0-{self.experts - 1}")), self.topology
        )


class DrivenGuard:
    """A guard and its ledger, one step after another. took_us: of each part, microseconds by step"""

    def __init__(
        self, shape: Shape, *, kernels: Kernels = "auto", policies: str | None = None, rows: int = 0
    ) -> None:
        """rows: that a step can have, by default as many as these have"""
        self.shape = shape
        program = shape.program(policies)
        capacity = Capacity(max(rows, shape.rows), 2 * shape.requests)
        with _environment(KERNELS_VARIABLE, kernels):
            self.guard = Guard(program, capacity, CPU)
            self.guard.keep_evidence(shape.kv_blocks, BLOCK_SIZE)
        rules = tuple(RuleFacts.of(rule) for rule in program.rules)
        book = RuleBook(program.revision, rules, tuple(map(int, program.masks.rule)), len(program.sets))
        self.ledger = Ledger(0, book)
        self.took_us: dict[str, list[float]] = defaultdict(list)
        self._req_ids = [f"{number}-0badf00d" for number in range(shape.requests)]
        self._known = dict.fromkeys(self._req_ids)
        for req_id in self._req_ids:
            self.guard.add_request(req_id, prompt_tokens=4)
        self._query_start_B1 = torch.arange(shape.requests + 1, dtype=torch.int32) * shape.prompt_rows
        self._kv_slot_T = torch.arange(shape.rows) % (shape.kv_blocks * BLOCK_SIZE)
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(shape.rows, shape.layers, shape.experts, generator=generator)
        weights_TLK, ids_TLK = scores.topk(shape.top_k)
        self._ids_TLK, self._weights_TLK = ids_TLK.to(torch.int32), weights_TLK.softmax(dim=-1)
        self._position = 0

    @torch.inference_mode()  # as an engine's step
    def step(self) -> None:
        shape, guard, ledger = self.shape, self.guard, self.ledger
        position_T = self._position + torch.arange(shape.prompt_rows).repeat(shape.requests)
        self._position += shape.prompt_rows

        def begin() -> None:
            guard.idle()
            guard.begin_step(self._req_ids, self._query_start_B1, position_T)
            guard.place_rows(self._kv_slot_T)

        self._timed("begin_step", begin)
        guard.tap.topk_ids_TLK[: shape.rows] = self._ids_TLK
        guard.tap.topk_weights_TLK[: shape.rows] = self._weights_TLK
        readback = self._timed("end_step", guard.end_step)
        assert readback is not None
        took = readback.result if isinstance(readback, Readback) else lambda: readback
        report: PackedReport | StepReport = self._timed("report", took)
        assert not report.failures, report.failures

        def note() -> None:  # as in the engine core
            is_quiet = False
            if isinstance(report, PackedReport) and self._accepts_all(report.req_ids):
                is_quiet = ledger.take_quiet_step(report)
            if not is_quiet:
                ledger.note_step(report)
                ledger.begin_step(report, self._rows_of)
                ledger.mask_starts()
                if not ledger.has_seen_all:
                    opened = report.unpacked() if isinstance(report, PackedReport) else report
                    opened.unjudged()
            ledger.end_step()
            if not is_quiet or time.monotonic() >= ledger.due_at:
                ledger.take(idle=False)
                ledger.liveness.take()

        self._timed("ledger", note)

    def _accepts_all(self, req_ids: Sequence[str]) -> bool:
        return all(req_id in self._known for req_id in req_ids)

    def _rows_of(self, req_ids: tuple[str, ...]) -> dict[str, int]:
        return {req_id: row for row, req_id in enumerate(req_ids) if req_id in self._known}

    def _timed(self, part: str, work: Callable[[], Result]) -> Result:
        began = time.perf_counter()
        result = work()
        self.took_us[part].append((time.perf_counter() - began) * 1e6)
        return result


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
