"""What the guard's own work costs in a step on a CPU, part by part, in microseconds.

    .venv/bin/python -m benchmarks.step [--steps 200] [--threads 1]

Decode steps of a model of 12 MoE layers with 64 experts each, 8 of them chosen. Kernels and torch take
turns step by step, on guards of their own, so that both see the same machine; medians are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.overhead.states import observing
from guard.device.kernels.choice import KERNELS_VARIABLE
from guard.device.layout import Capacity
from guard.device.readback import Readback
from guard.policy import parse_policies
from guard.program.compile import compile_policies
from guard.program.topology import MoELayer, Topology
from guard.runtime import Guard

LAYERS, EXPERTS, TOP_K = 12, 64, 8
POLICIES = (1, 16, 64)
REQUESTS = (1, 16, 256)
PARTS = ("begin_step", "end_step", "result")
WARM_UP_STEPS = 20


@dataclass
class Running:
    """A guard and what its parts took, in microseconds."""

    guard: Guard
    took: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def step(
        self,
        req_ids: Sequence[str],
        query_start_B1: torch.Tensor,
        position: int,
        ids_TLK: torch.Tensor,
        weights_TLK: torch.Tensor,
    ) -> None:
        num_rows = len(ids_TLK)
        position_T = torch.full((num_rows,), position, dtype=torch.int64)
        start = time.perf_counter()
        self.guard.begin_step(req_ids, query_start_B1, position_T)
        self._note("begin_step", start)
        self.guard.tap.topk_ids_TLK[:num_rows] = ids_TLK
        self.guard.tap.topk_weights_TLK[:num_rows] = weights_TLK
        start = time.perf_counter()
        readback = self.guard.end_step()
        self._note("end_step", start)
        assert isinstance(readback, Readback)
        start = time.perf_counter()
        report = readback.result()
        self._note("result", start)
        assert not report.failures, report.failures

    def _note(self, part: str, start: float) -> None:
        self.took[part].append((time.perf_counter() - start) * 1e6)

    def median(self, part: str) -> float:
        return statistics.median(self.took[part][WARM_UP_STEPS:])


def running(num_policies: int, num_requests: int, kernels: str) -> Running:
    topology = Topology(
        "BenchmarkForCausalLM",
        tuple(MoELayer(number, EXPERTS, TOP_K) for number in range(LAYERS)),
    )
    text = "---\n".join(map(observing, range(num_policies)))
    program = compile_policies(parse_policies(text), topology)
    os.environ[KERNELS_VARIABLE] = kernels
    return Running(Guard(program, Capacity(num_requests, num_requests), torch.device("cpu")))


def compare(num_policies: int, num_requests: int, steps: int) -> dict[str, Running]:
    both = {kernels: running(num_policies, num_requests, kernels) for kernels in ("torch", "auto")}
    req_ids = [f"r{number}" for number in range(num_requests)]
    for each in both.values():
        for req_id in req_ids:
            each.guard.add_request(req_id, prompt_tokens=4)
    query_start_B1 = torch.arange(num_requests + 1, dtype=torch.int32)
    weights_TLK = torch.rand(num_requests, LAYERS, TOP_K)
    ids_TLK = torch.rand(num_requests, LAYERS, EXPERTS).topk(TOP_K).indices.to(torch.int32)
    for position in range(WARM_UP_STEPS + steps):
        for each in both.values():
            each.step(req_ids, query_start_B1, position, ids_TLK, weights_TLK)
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table(
        "policies", "requests", *(f"{part}, {by}" for part in PARTS for by in ("torch", "auto"))
    )
    for num_policies in POLICIES:
        for num_requests in REQUESTS:
            both = compare(num_policies, num_requests, arguments.steps)
            medians = [f"{both[by].median(part):.0f}" for part in PARTS for by in ("torch", "auto")]
            table.add_row(str(num_policies), str(num_requests), *medians)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
