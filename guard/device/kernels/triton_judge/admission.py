"""Writing the slots of new requests on a GPU: one copy and one launch, however many there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from guard.device.kernels.triton_judge.admit import admit_kernel

if TYPE_CHECKING:
    from guard.device.state import SlotState

_BLOCK = 128
_WARPS = 4


def write_slots(state: SlotState, facts_N: torch.Tensor) -> None:
    """Of a program that reads no distributions. facts_N: int64 [N, columns] on the device, as `admit`
    says."""
    admit_kernel[(len(facts_N),)](
        facts_N,
        state.next_position_S,
        state.prompt_tokens_S,
        state.unseen_S,
        state.sum_SX,
        state.prompt_sum_SX,
        state.recent_sum_SQX,
        state.hits_SR,
        state.recent_hits_SHR,
        state.active_SR,
        state.applies_SR,
        state.enforced_SR,
        state.exempt_SR,
        state.mask_from_SIA,
        state.mask_to_SIA,
        state.block_at_SR,
        state.extreme_SC,
        state.sum_SX.shape[1],
        state.recent_sum_SQX[0].numel(),
        state.hits_SR.shape[1],
        state.recent_hits_SHR[0].numel(),
        state.mask_from_SIA.shape[2],
        state.extreme_SC.shape[1],
        BLOCK=_BLOCK,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
