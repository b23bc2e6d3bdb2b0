"""How the guard's work in a step grows, one size at a time, and what that comes to on a large model.

    python -m benchmarks.scale [--steps 30]

Each size is varied while the others stay at those of a middling one; the guard's own work (step, report
and ledger, see `host_time`) is timed on this CPU, with one thread. Then the largest shape that is asked
about, 61 layers of 384 experts with 1,024 requests, is run itself; what 16 ranks add is modelled, since
there are no 16 ranks here.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.guards import DrivenGuard, Shape
from benchmarks.machine import machine
from guard.device.findings import FindingsForm

MIDDLING = Shape(layers=24, experts=128, policies=16, requests=64)
LARGE = Shape(layers=61, experts=384, policies=64, requests=1024)
AXES: dict[str, tuple[int, ...]] = {
    "prompt_rows": (1, 4, 16, 64),
    "layers": (12, 24, 48, 94),
    "experts": (64, 128, 256, 384),
    "policies": (1, 16, 64, 256),
    "requests": (1, 16, 64, 256, 1024),
    "kv_blocks": (2048, 16384, 131072),
}
PARTS = ("begin_step", "end_step", "report", "ledger")
WARM_UP_STEPS = 5


def step_us(shape: Shape, steps: int) -> dict[str, float]:
    driven = DrivenGuard(shape)
    for _ in range(WARM_UP_STEPS + steps):
        driven.step()
    return {part: statistics.median(driven.took_us[part][WARM_UP_STEPS:]) for part in PARTS}


def ranks_model(shape: Shape, ranks: int) -> str:
    """What tensor-parallel ranks add: `RankAgreement`'s one all-reduce a step, of a fixed size.

    Ring all-reduce: each rank sends 2 (n - 1) / n of the data, in 2 (n - 1) hops.
    """
    slots = 2 * shape.requests
    words = 2 * slots + FindingsForm(shape.layers, num_actions=0).size(slots)
    sent = 2 * (ranks - 1) / ranks * 8 * words
    return (
        f"modelled, {ranks} tensor-parallel ranks: an all-reduce of {8 * words / 1024:.0f} KiB a step, "
        f"of which each rank sends {sent / 1024:.0f} KiB in {2 * (ranks - 1)} hops of a ring; the "
        f"model's own all-reduces are {2 * shape.layers} a step, of {shape.requests} rows each"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120, highlight=False)
    table = Table("varied", "value", *PARTS, "all, µs", title=f"others as in {MIDDLING}")
    for axis, values in AXES.items():
        for value in values:
            took = step_us(replace(MIDDLING, **{axis: value}), options.steps)
            cells = [f"{took[part]:.0f}" for part in PARTS]
            table.add_row(axis, str(value), *cells, f"{sum(took.values()):.0f}")
    console.print(table)
    took = step_us(LARGE, options.steps)
    console.print(f"{LARGE}: {', '.join(f'{p} {us:.0f}' for p, us in took.items())} µs")
    console.print(
        f"all: {sum(took.values()):.0f} µs, {sum(took.values()) / LARGE.requests:.2f} a request"
    )
    console.print(ranks_model(LARGE, 16))
    console.print(str(machine()))


if __name__ == "__main__":
    main()
