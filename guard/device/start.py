"""What a step begins with: whose each row is, which masks it is under, and an empty tap."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from guard.device.kernels.choice import has_kernels
from guard.device.mask import ExpertMask
from guard.device.rows import StepBatch
from guard.device.state import SlotState
from guard.device.tap import RoutingTap


class Started(NamedTuple):
    """in_force_TA: bool, the mask actions in force for each row, where they are at hand"""

    batch: StepBatch
    in_force_TA: torch.Tensor | None


class StepStart(Protocol):
    def begin(
        self,
        slots_B: torch.Tensor,
        query_start_B1: torch.Tensor,
        position_T: torch.Tensor,
        state: SlotState,
    ) -> Started:
        """Puts the masks in force for the rows, and empties their part of the tap."""


class TorchStart:
    """mask: None where nothing is masked"""

    def __init__(self, tap: RoutingTap, mask: ExpertMask | None) -> None:
        self._tap, self._mask = tap, mask

    def begin(
        self,
        slots_B: torch.Tensor,
        query_start_B1: torch.Tensor,
        position_T: torch.Tensor,
        state: SlotState,
    ) -> Started:
        self._tap.clear_rows(len(position_T))
        batch = StepBatch.of(slots_B, query_start_B1, position_T)
        if self._mask is None or not state.program.masks.num_actions:
            return Started(batch, None)
        in_force_TA = state.masks_at(batch.slot_T, batch.position_T)
        self._mask.set_rows(in_force_TA)
        return Started(batch, in_force_TA)


def make_start(tap: RoutingTap, mask: ExpertMask | None, state: SlotState) -> StepStart:
    device = tap.topk_ids_TLK.device
    if device.type == "cuda" and has_kernels(device):
        from guard.device.kernels.triton_judge.start import TritonStart

        start = TritonStart(tap, mask)
        start.warm_up(state)
        return start
    if device.type == "cpu" and has_kernels(device):
        from guard.device.kernels.native.start import NativeStart

        return NativeStart(tap, mask)
    return TorchStart(tap, mask)
