"""What masking and tapping one MoE layer takes on a CPU, by itself, in microseconds.

    python -m benchmarks.layer_routing [--repeats 200]

64 experts, 8 chosen, bfloat16 logits, eager and warm: the one operation of the kernels, and torch's way
of the same, which Inductor fuses in part where vLLM compiles. The least of many repeats of each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from guard.device.kernels.layer_routing import make_layer_routing
from guard.device.layout import Capacity
from guard.device.mask import ExpertMask
from guard.device.routing import route_masked
from guard.device.tap import RoutingTap
from guard.program.topology import MoELayer, Topology

ROWS = (1, 32, 256, 2048)
LAYER = MoELayer(0, 64, 8)
CPU = torch.device("cpu")


class OneLayer:
    """Every second row is masked, or none."""

    def __init__(self, num_rows: int, *, is_masking: bool) -> None:
        topology, capacity = Topology("Benchmark", (LAYER,)), Capacity(num_rows, 1)
        self._tap = RoutingTap(topology, capacity, CPU)
        self._mask = ExpertMask(topology, capacity, CPU)
        if is_masking:
            self._mask.row_bits_TW[::2] = 1
            self._mask.expert_bits_LEW[0, :8] = 1
            self._mask.method_bits_MW[0] = 1
        self._logits = torch.randn(num_rows, LAYER.num_experts, dtype=torch.bfloat16)
        self._weights, ids = self._logits.float().softmax(dim=-1).topk(LAYER.top_k)
        self._ids = ids.to(torch.int32)
        self._routing = make_layer_routing(LAYER, 0, self._tap, self._mask, 1.0)

    def kernel(self) -> None:
        assert self._routing is not None, "there are no kernels here"
        self._routing.apply(self._logits, self._weights, self._ids)

    def torch(self) -> None:
        masked = self._mask.wanted(0, self._mask.row_bits_TW)
        own_weights, own_ids = route_masked(LAYER, self._logits, masked)
        weights = torch.where(masked.applies_T1, own_weights, self._weights)
        self._tap.record(0, torch.where(masked.applies_T1, own_ids, self._ids), weights)


def least_us(work: Callable[[], None], repeats: int) -> float:
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(10):
            work()
        took.append((time.perf_counter() - began) / 10)
    return 1e6 * min(took)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    table = Table("rows", "C++", "C++, every second row masked", "torch", "torch, as many masked")
    for rows in ROWS:
        both = [OneLayer(rows, is_masking=is_masking) for is_masking in (False, True)]
        ways = [each.kernel for each in both] + [each.torch for each in both]
        table.add_row(str(rows), *(f"{least_us(way, options.repeats):.1f}" for way in ways))
    console = Console(width=110, highlight=False)
    console.print(table)
    console.print(str(machine()))


if __name__ == "__main__":
    main()
