"""Signals summed over windows that end at each row: part from this step's rows, part from the slot."""

from __future__ import annotations

import torch

from guard.device.layout import NULL_SLOT
from guard.device.rows import FreshRows, StepBatch
from guard.device.state import SlotState
from guard.program.program import ReadingTable, WindowKind


class RunningSums:
    """Sums from a request's first seen position up to each row's, of any whole number per row.

    A sum over a window is the difference of two of these, wherever the window begins: in this step,
    in the last `Q` positions that the slot keeps, or before anything was seen.
    """

    def __init__(
        self,
        values_TX: torch.Tensor,
        batch: StepBatch,
        fresh: FreshRows,
        before_SX: torch.Tensor,
        recent_SQX: torch.Tensor,
    ) -> None:
        self._batch, self._fresh, self._recent_SQX = batch, fresh, recent_SQX
        total_TX = values_TX.cumsum(0)
        before_request_BX = (total_TX - values_TX)[batch.query_start_B1[:-1]]
        self._before_SX = before_SX
        self.at_row_TX = total_TX - before_request_BX[batch.request_T] + before_SX[batch.slot_T]

    def at(self, position_TM: torch.Tensor, column_M: torch.Tensor) -> torch.Tensor:
        """Sum up to and with a position not behind the row's own: [T, M], 0 before the first seen.

        Right for positions of this step's fresh rows, and for the Q positions before them.
        """
        fresh = self._fresh
        back_TM = self._batch.position_T[:, None] - position_TM
        row_TM = (fresh.row_T[:, None] - back_TM).clamp(min=0)
        in_step_TM = position_TM >= fresh.begin_T[:, None]
        here_TM = self.at_row_TX[row_TM, column_M]
        # Nothing was seen between the slot's last position and this step's first.
        still_TM = position_TM >= fresh.next_T[:, None] - 1
        before_TM = self._before_SX[self._batch.slot_T[:, None], column_M]
        kept = self._recent_SQX.shape[1]
        past_TM = self._recent_SQX[self._batch.slot_T[:, None], position_TM.remainder(kept), column_M]
        past_TM = past_TM.where(position_TM >= 0, 0)
        return here_TM.where(in_step_TM, before_TM.where(still_TM, past_TM))

    def keep(self) -> None:
        """Write the step's sums into the slots: the last one, and the recent ones."""
        batch, fresh = self._batch, self._fresh
        self._before_SX[batch.slots_B] = self.at_row_TX[fresh.last_row_B]
        kept = self._recent_SQX.shape[1]
        if kept > 1:
            # Of rows that share a place, only the last may write it.
            is_last_T = batch.position_T >= fresh.after_B[batch.request_T] - kept
            slot_T = fresh.slot_T.where(is_last_T, NULL_SLOT)
            self._recent_SQX[slot_T, batch.position_T.remainder(kept)] = self.at_row_TX


class WindowReader:
    """Evaluates a program's readings for every row of a step."""

    def __init__(self, readings: ReadingTable, device: torch.device) -> None:
        def columns(kind: WindowKind) -> torch.Tensor:
            return torch.from_numpy((readings.window == kind).nonzero()[0]).to(device)

        self._signal_M = torch.from_numpy(readings.signal).to(device)
        self._recent = columns(WindowKind.RECENT)
        self._prompt = columns(WindowKind.PROMPT)
        self._output = columns(WindowKind.OUTPUT)
        self._recent_tokens = torch.from_numpy(readings.tokens).to(device)[self._recent]
        self._recent_in_output = torch.from_numpy(readings.in_output).to(device)[self._recent]

    def read(
        self, sums: RunningSums, batch: StepBatch, fresh: FreshRows, state: SlotState
    ) -> torch.Tensor:
        """int64 [T, M]; 0 where the window does not exist yet, its |W| being 0 as well."""
        value_TM = sums.at_row_TX[:, self._signal_M]
        position_T1 = batch.position_T[:, None]
        prompt_T1 = fresh.prompt_T[:, None]
        # Always: a program that comes later may ask for them.
        prompt_sum_TX = self._prompt_sums(sums, batch, fresh, state)
        if len(self._prompt):
            signal = self._signal_M[self._prompt]
            value_TM[:, self._prompt] = prompt_sum_TX[:, signal].where(position_T1 >= prompt_T1 - 1, 0)
        if len(self._output):
            signal = self._signal_M[self._output]
            value_TM[:, self._output] = (value_TM[:, self._output] - prompt_sum_TX[:, signal]).where(
                position_T1 >= prompt_T1, 0
            )
        if len(self._recent):
            signal = self._signal_M[self._recent]
            before_TM = position_T1 - self._recent_tokens
            reaches_back_TM = self._recent_in_output & (before_TM < prompt_T1)
            start_TM = sums.at(before_TM.clamp(min=-1), signal)
            start_TM = prompt_sum_TX[:, signal].where(reaches_back_TM, start_TM)
            value_TM[:, self._recent] = value_TM[:, self._recent] - start_TM
        return value_TM

    def _prompt_sums(
        self, sums: RunningSums, batch: StepBatch, fresh: FreshRows, state: SlotState
    ) -> torch.Tensor:
        """[T, X] sums up to position P-1, for rows at or behind it; the slots' are kept up to date."""
        last_prompt_B = fresh.prompt_B - 1
        in_step_B = (last_prompt_B >= fresh.begin_B) & (last_prompt_B < fresh.after_B)
        row_B = fresh.last_row_B - (fresh.after_B - 1 - last_prompt_B)
        here_BX = sums.at_row_TX[row_B.clamp(min=0).minimum(fresh.last_row_B)]
        prompt_sum_BX = here_BX.where(in_step_B[:, None], state.prompt_sum_SX[batch.slots_B])
        state.prompt_sum_SX[batch.slots_B] = prompt_sum_BX
        return prompt_sum_BX[batch.request_T]
