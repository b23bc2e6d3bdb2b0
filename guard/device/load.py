"""How often each expert was chosen by the traffic, in the steps that are sampled.

Letters as in `layout`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from guard.device.kernels.choice import has_kernels
from guard.device.kernels.native.load import NativeLoad
from guard.device.layout import LOAD_EVERY_STEPS, NULL_SLOT
from guard.device.rows import StepBatch, last_rows
from guard.device.tap import RoutingTap
from guard.program.topology import Topology

_ROWS_AT_ONCE = 2048
"""What torch computes in between is no larger than for so many rows."""


class LoadReading(NamedTuple):
    """From the start on. tokens: rows counted; counts_LE: int64, logical ids, layers of this rank"""

    tokens: int
    counts_LE: NDArray[np.int64]


class ExpertLoad:
    """Counts rows that are judged: real, accepted, trusted, and not evaluated before. An id without
    weight was not chosen. It goes on under the programs that follow: the layers stay the same.

    every: a step in so many; 0: none
    is_due: the step that was begun is counted; whoever begins it says so
    counts: int64 [L * E + 2], those of each layer and expert, then the rows that were counted, then a
        place for choices that do not count
    """

    def __init__(self, topology: Topology, device: torch.device, every: int = LOAD_EVERY_STEPS) -> None:
        num_layers, max_experts = len(topology.layers), topology.max_experts
        self.every = every
        self.is_due = False
        self._shape = (num_layers, max_experts)
        self._nobody = num_layers * max_experts + 1
        self.counts = torch.zeros(self._nobody + 1, dtype=torch.int64, device=device)
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        experts = [[layer.num_experts] for layer in topology.layers]
        self._num_experts_L1 = torch.tensor(experts, dtype=torch.int32, device=device)
        self._layer_offset_L1 = torch.arange(num_layers, device=device)[:, None] * max_experts
        is_native = device.type == "cpu" and has_kernels(device)
        self._native = NativeLoad(topology, self.counts) if is_native else None
        self._copied: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def add(
        self,
        tap: RoutingTap,
        batch: StepBatch,
        next_position_S: torch.Tensor,
        rejected_B: torch.Tensor | None,
        trusted_T1: torch.Tensor,
    ) -> None:
        """Count a step's rows, before it is evaluated. No host synchronisation.

        next_position_S: the first position of each slot that was not evaluated yet
        trusted_T1: bool [T, 1], or one for all rows
        """
        if self._native is not None:
            self._native.add(tap, batch, next_position_S, rejected_B, trusted_T1)
            return
        slot_T, num_rows = batch.slot_T, len(batch.position_T)
        row_T = torch.arange(num_rows, device=slot_T.device)
        is_counted_T = (slot_T != NULL_SLOT) & (batch.position_T >= next_position_S[slot_T])
        is_counted_T &= row_T <= last_rows(batch, rejected_B)[batch.request_T]
        is_counted_T &= trusted_T1.flatten()
        for first in range(0, num_rows, _ROWS_AT_ONCE):
            rows = slice(first, min(first + _ROWS_AT_ONCE, num_rows))
            self._add_choices(tap.topk_ids_TLK[rows], tap.topk_weights_TLK[rows], is_counted_T[rows])
        self.counts[self._nobody - 1].add_(is_counted_T.sum())

    def _add_choices(
        self, ids_TLK: torch.Tensor, weights_TLK: torch.Tensor, is_counted_T: torch.Tensor
    ) -> None:
        is_chosen_TLK = (ids_TLK >= 0) & (ids_TLK < self._num_experts_L1) & (weights_TLK != 0)
        is_chosen_TLK &= is_counted_T[:, None, None]
        place_TLK = torch.where(is_chosen_TLK, ids_TLK + self._layer_offset_L1, self._nobody)
        self.counts.scatter_add_(0, place_TLK.flatten(), self._one.expand(place_TLK.numel()))

    def read(self) -> LoadReading:
        """As of all steps that were handed to the device: it waits for them."""
        return self._reading(self.counts.cpu())

    def poll(self) -> LoadReading | None:
        """Without waiting for the device: on a GPU what was there at the last call, and None at the
        first one."""
        if self.counts.device.type == "cpu":
            return self.read()
        reading = None
        if self._copied is not None:
            host, done = self._copied
            if not done.query():
                return None
            reading = self._reading(host)
        else:
            host = torch.empty_like(self.counts, device="cpu", pin_memory=True)
            done = torch.cuda.Event()
        # On the steps' own stream, so that it falls between two of them.
        host.copy_(self.counts, non_blocking=True)
        done.record(torch.cuda.current_stream())
        self._copied = host, done
        return reading

    def _reading(self, host: torch.Tensor) -> LoadReading:
        numbers = host.numpy()
        counts_LE = numbers[: self._nobody - 1].reshape(self._shape).copy()
        return LoadReading(int(numbers[self._nobody - 1]), counts_LE)
