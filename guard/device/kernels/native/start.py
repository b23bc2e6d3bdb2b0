"""The beginning of a step on a CPU: one call of machine code."""

from __future__ import annotations

import ctypes

import torch

from guard.device.kernels.native.interface import SlotAddresses, functions
from guard.device.mask import ExpertMask
from guard.device.rows import StepBatch
from guard.device.start import Started
from guard.device.state import SlotState
from guard.device.tap import RoutingTap


class NativeStart:
    """As `TorchStart`, with the masks in force in the row bits alone."""

    def __init__(self, tap: RoutingTap, mask: ExpertMask | None) -> None:
        self._begin = functions().moe_guard_begin
        self._mask = mask
        self._ids = tap.topk_ids_TLK
        self._tap_width = tap.topk_ids_TLK[0].numel()
        self._slots = SlotAddresses()

    def begin(
        self,
        slots_B: torch.Tensor,
        query_start_B1: torch.Tensor,
        position_T: torch.Tensor,
        state: SlotState,
    ) -> Started:
        query_start_B1 = query_start_B1.to(torch.int64).contiguous()
        position_T = position_T.to(torch.int64).contiguous()
        request_T = torch.empty_like(position_T)
        num_rows, num_actions = len(position_T), state.program.masks.num_actions
        bits, num_words, num_rows_before = 0, 0, 0
        if self._mask is not None and num_actions:
            row_bits_TW = self._mask.row_bits_TW
            bits, num_words = row_bits_TW.data_ptr(), row_bits_TW.shape[1]
            num_rows_before = self._mask.take_rows(num_rows)
        self._begin(
            ctypes.byref(self._slots.of(state)),
            slots_B.data_ptr(),
            query_start_B1.data_ptr(),
            position_T.data_ptr(),
            len(slots_B),
            num_rows,
            num_rows_before,
            self._ids.data_ptr(),
            self._tap_width,
            bits,
            num_words,
            num_actions,
            request_T.data_ptr(),
        )
        return Started(StepBatch(slots_B, query_start_B1, position_T, request_T), None)
