"""The beginning of a step on a CPU: one call of machine code."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from guard.device.kernels.numba_judge.begin import begin
from guard.device.kernels.numba_judge.compiled import compiled
from guard.device.layout import NULL_SLOT
from guard.device.mask import ExpertMask
from guard.device.rows import StepBatch
from guard.device.start import Started
from guard.device.state import SlotState
from guard.device.tap import RoutingTap


class NumbaStart:
    """As `TorchStart`, with the masks in force in the row bits alone."""

    def __init__(self, tap: RoutingTap, mask: ExpertMask | None, state: SlotState) -> None:
        self._ids_TLK = tap.topk_ids_TLK.numpy()
        self._mask = mask
        self._no_bits_TW = np.zeros((0, 1), dtype=np.int64)
        self._row_bits_TW = self._no_bits_TW if mask is None else mask.row_bits_TW.numpy()
        self._arrays_of: torch.Tensor | None = None
        self._masks: tuple[Any, Any] = (None, None)
        nobody_B = np.full(1, NULL_SLOT)
        arguments = self._arguments(nobody_B, np.arange(2), nobody_B, state, nobody_B.copy())
        self._begin = compiled(begin, arguments)

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
        self._begin(
            *self._arguments(
                slots_B.numpy(), query_start_B1.numpy(), position_T.numpy(), state, request_T.numpy()
            )
        )
        return Started(StepBatch(slots_B, query_start_B1, position_T, request_T), None)

    def _arguments(
        self,
        slots_B: Any,
        query_start_B1: Any,
        position_T: Any,
        state: SlotState,
        request_T: Any,
    ) -> tuple[Any, ...]:
        if self._arrays_of is not state.mask_from_SIA:  # another program's, or slots were added
            self._arrays_of = state.mask_from_SIA
            self._masks = state.mask_from_SIA.numpy(), state.mask_to_SIA.numpy()
        is_masking = self._mask is not None and state.program.masks.num_actions > 0
        num_rows_before = 0
        if is_masking:
            assert self._mask is not None
            num_rows_before = self._mask.take_rows(len(position_T))
        return (
            slots_B,
            query_start_B1,
            position_T,
            *self._masks,
            num_rows_before,
            self._ids_TLK,
            self._row_bits_TW if is_masking else self._no_bits_TW,
            request_T,
        )
