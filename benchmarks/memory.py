"""Memory that a guard takes on the model's device, part by part.

    python -m benchmarks.memory [--rows 2048]

94 layers of 128 experts, 8 chosen (Qwen3-235B-A22B's shape), 64 policies of linear signals, 1,024
slots. What is kept beside the KV cache is by the token, and bounded when a program is compiled.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.guards import CPU, Shape
from benchmarks.machine import machine
from guard.device.kept_evidence import KeptEvidence
from guard.device.layout import Capacity
from guard.runtime import Guard

SHAPE = Shape(layers=94, experts=128, policies=64)
SLOTS = 1024
MIB = 2**20


def tensors_in(value: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Each storage once, whatever holds it."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage().data_ptr()
        if storage not in seen:
            seen.add(storage)
            yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each, seen)
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from tensors_in(each, seen)
    elif type(value).__module__.startswith("guard.device"):
        names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
        for name in names:
            yield from tensors_in(getattr(value, name, None), seen)


def bytes_by_part(guard: Guard) -> dict[str, int]:
    seen: set[int] = set()
    parts = {
        "tap of a step's rows": guard.tap,
        "masks of a step's rows and of experts": guard.mask,
        "slots": guard._state,
        "running check": guard._check,
        "tables of the program": guard._evaluator,
    }
    return {
        name: sum(tensor.untyped_storage().nbytes() for tensor in tensors_in(part, seen))
        for name, part in parts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048, help="of the largest step")
    options = parser.parse_args()
    program = SHAPE.program()
    table = Table("part", "C++ (CPU), MiB", "torch, MiB")
    columns = []
    for kernels in ("auto", "torch"):
        os.environ["MOE_GUARD_KERNELS"] = kernels
        columns.append(bytes_by_part(Guard(program, Capacity(options.rows, SLOTS), CPU)))
    for name in columns[0]:
        table.add_row(name, *(f"{column[name] / MIB:.2f}" for column in columns))
    table.add_row("all", *(f"{sum(column.values()) / MIB:.2f}" for column in columns))
    console = Console(width=100, highlight=False)
    console.print(table)
    token_bytes = KeptEvidence.token_bytes(program.signals, program.topology)
    console.print(
        f"{program.signals.num_signals} signals, {program.rule_table.num_rules} rules, "
        f"{options.rows} rows, {SLOTS} slots; beside the KV cache {token_bytes} bytes a token"
    )
    console.print(str(machine()))


if __name__ == "__main__":
    main()
