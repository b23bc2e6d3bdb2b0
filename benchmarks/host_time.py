"""The guard's own work in a step on the host, part by part, in microseconds.

    python -m benchmarks.host_time [--steps 200] [--kernels auto]

Decode steps of a model of 12 MoE layers with 64 experts each, 8 of them chosen, one process, nothing
else running: what a step of the worker and of the engine core adds, without the layers' own routing.
Medians; a step in 13 has the running check, one in 8 counts loads, and at times counters are due, so
the mean is beside them.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.guards import DrivenGuard, Shape
from benchmarks.machine import machine

POLICIES = (1, 16, 64)
REQUESTS = (1, 16, 64, 256)
PARTS = ("begin_step", "end_step", "report", "ledger")
WARM_UP_STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--kernels", choices=("auto", "torch"), default="auto")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("policies", "requests", *PARTS, "all, median", "all, mean")
    for policies in POLICIES:
        for requests in REQUESTS:
            driven = DrivenGuard(Shape(policies=policies, requests=requests), kernels=options.kernels)
            for _ in range(WARM_UP_STEPS + options.steps):
                driven.step()
            parts = [driven.took_us[part][WARM_UP_STEPS:] for part in PARTS]
            sums = [sum(step) for step in zip(*parts, strict=True)]
            cells = [f"{statistics.median(part):.0f}" for part in [*parts, sums]]
            table.add_row(str(policies), str(requests), *cells, f"{statistics.fmean(sums):.0f}")
    console = Console(width=120, highlight=False)
    console.print(table)
    console.print(str(machine()))


if __name__ == "__main__":
    main()
