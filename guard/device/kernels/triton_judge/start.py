"""The beginning of a step on a GPU: one launch, beside the copy of its slots."""

from __future__ import annotations

import numpy as np
import torch

from guard.device.kernels.triton_judge.admission import write_slots
from guard.device.kernels.triton_judge.begin import begin_kernel
from guard.device.layout import NULL_SLOT
from guard.device.mask import ExpertMask
from guard.device.rows import StepBatch
from guard.device.start import Started
from guard.device.state import SlotState, host_to_device
from guard.device.tap import RoutingTap
from guard.program.step_report import NEVER

_ROWS = 16
_FILL = 512
_WARPS = 4


class TritonStart:
    """As `TorchStart`."""

    def __init__(self, tap: RoutingTap, mask: ExpertMask | None) -> None:
        self._tap, self._mask = tap, mask

    def warm_up(self, state: SlotState) -> None:
        """Compile what a step may launch, or load it from a cache, with a row that is nobody's."""
        nobody_B = torch.full((1,), NULL_SLOT, device=self._tap.topk_ids_TLK.device)
        for dtype in (torch.int32, torch.int64):
            start_B1 = torch.arange(2, dtype=dtype, device=nobody_B.device)
            self.begin(nobody_B, start_B1, torch.zeros_like(nobody_B), state)
        num_rules, num_actions = state.hits_SR.shape[1], state.mask_from_SIA.shape[2]
        facts_np = np.zeros((1, 3 + 3 * num_rules + 2 * num_actions), dtype=np.int64)
        facts_np[:, 3 + 3 * num_rules :] = NEVER
        write_slots(state, host_to_device(facts_np, nobody_B.device))

    def begin(
        self,
        slots_B: torch.Tensor,
        query_start_B1: torch.Tensor,
        position_T: torch.Tensor,
        state: SlotState,
    ) -> Started:
        num_rows, num_requests = len(position_T), len(slots_B)
        mask = self._mask
        if not state.program.masks.num_actions:
            mask = None
        num_rows_before = 0 if mask is None else mask.take_rows(num_rows)
        room = torch.empty(2 * num_rows + num_requests + 1, dtype=torch.int64, device=position_T.device)
        query_start, position, request = room.split([num_requests + 1, num_rows, num_rows])
        ids_TLK = self._tap.topk_ids_TLK
        begin_kernel[(-(-max(num_rows, num_rows_before, 1) // _ROWS),)](
            slots_B,
            query_start_B1,
            position_T,
            state.mask_from_SIA,
            state.mask_to_SIA,
            ids_TLK,
            query_start,
            position,
            request,
            room if mask is None else mask.row_bits_TW,
            num_rows,
            num_requests,
            num_rows_before,
            state.program.masks.num_actions,
            0 if mask is None else mask.row_bits_TW.shape[1],
            ids_TLK[0].numel(),
            ROWS=_ROWS,
            FILL=_FILL,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
        return Started(StepBatch(slots_B, query_start, position, request), None)
