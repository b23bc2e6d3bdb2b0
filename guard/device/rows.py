"""Which request, and which position of it, each row of a step is."""

from __future__ import annotations

from typing import NamedTuple

import torch

from guard.device.layout import NULL_SLOT
from guard.device.state import SlotState


class StepBatch(NamedTuple):
    """A step's rows as the engine lays them out: each request a run of rows with rising positions.

    slots_B: int64 [B], `NULL_SLOT` for a request without one
    query_start_B1: [B+1] first row of each request, and the number of rows
    position_T: int64 [T] position of each row in its request
    request_T: int64 [T] row of `slots_B`
    """

    slots_B: torch.Tensor
    query_start_B1: torch.Tensor
    position_T: torch.Tensor
    request_T: torch.Tensor

    @property
    def slot_T(self) -> torch.Tensor:
        return self.slots_B[self.request_T]

    @staticmethod
    def of(slots_B: torch.Tensor, query_start_B1: torch.Tensor, position_T: torch.Tensor) -> StepBatch:
        query_start_B1 = query_start_B1.to(torch.int64)
        rows_T = torch.arange(len(position_T), device=position_T.device)
        request_T = torch.searchsorted(query_start_B1[1:], rows_T, right=True)
        return StepBatch(slots_B, query_start_B1, position_T.to(torch.int64), request_T)


def last_rows(batch: StepBatch, rejected_B: torch.Tensor | None) -> torch.Tensor:
    """int64 [B]: the last accepted row of each request."""
    last_row_B = batch.query_start_B1[1:] - 1
    return last_row_B if rejected_B is None else last_row_B - rejected_B


class FreshRows(NamedTuple):
    """The rows that are evaluated: real, accepted, and not evaluated in an earlier step.

    fresh_T: bool
    judged_T: bool, fresh and with evidence: a cached token may have none
    row_T: int64, 0..T-1
    slot_T: slots, the null slot where a row is not fresh
    first_row_T: the first fresh row of the row's request
    begin_T, begin_B: position of that row
    next_T, next_B: the position that was next before this step
    after_B: the position that is next after it
    last_row_B: last accepted row of each request
    prompt_T, prompt_B: P
    """

    fresh_T: torch.Tensor
    judged_T: torch.Tensor
    row_T: torch.Tensor
    slot_T: torch.Tensor
    first_row_T: torch.Tensor
    begin_T: torch.Tensor
    begin_B: torch.Tensor
    next_T: torch.Tensor
    next_B: torch.Tensor
    after_B: torch.Tensor
    last_row_B: torch.Tensor
    prompt_T: torch.Tensor
    prompt_B: torch.Tensor

    @staticmethod
    def of(
        batch: StepBatch, state: SlotState, seen_T: torch.Tensor, rejected_B: torch.Tensor | None
    ) -> FreshRows:
        """seen_T: bool, rows whose routing is known
        rejected_B: [B] rows at the end of a request whose draft token was not accepted
        """
        request_T, position_T = batch.request_T, batch.position_T
        row_T = torch.arange(len(position_T), device=position_T.device)
        start_B = batch.query_start_B1[:-1]
        last_row_B = last_rows(batch, rejected_B)
        next_B = state.next_position_S[batch.slots_B]
        position_of_start_B = position_T[start_B]
        begin_B = torch.maximum(next_B, position_of_start_B)
        after_B = torch.maximum(next_B, position_T[last_row_B] + 1)
        first_row_B = start_B + (begin_B - position_of_start_B)
        slot_T = batch.slots_B[request_T]
        fresh_T = (
            (slot_T != NULL_SLOT) & (row_T >= first_row_B[request_T]) & (row_T <= last_row_B[request_T])
        )
        prompt_B = state.prompt_tokens_S[batch.slots_B]
        return FreshRows(
            fresh_T,
            fresh_T & seen_T,
            row_T,
            slot_T.where(fresh_T, NULL_SLOT),
            first_row_B[request_T],
            begin_B[request_T],
            begin_B,
            next_B[request_T],
            next_B,
            after_B,
            last_row_B,
            prompt_B[request_T],
            prompt_B,
        )
