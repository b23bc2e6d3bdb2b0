"""Persistence and firing: when a rule's result turns true, and what it was before."""

from __future__ import annotations

from typing import NamedTuple

import torch

from guard.device.rows import FreshRows, StepBatch
from guard.device.state import SlotState
from guard.device.windows import RunningSums
from guard.program.program import TOKEN_SIGNAL, RuleTable


class RuleResults(NamedTuple):
    """evaluated_TR: the rule applies to the row's request, the row is in its phase, and some signal of
        the rule saw it
    fired_TR: the result turned true at this row
    active_BR: the result behind the request's last accepted row
    """

    evaluated_TR: torch.Tensor
    fired_TR: torch.Tensor
    active_BR: torch.Tensor


class RuleEvaluator:
    def __init__(self, table: RuleTable, device: torch.device) -> None:
        self._in_prompt = torch.from_numpy(table.in_prompt).to(device)
        self._in_output = torch.from_numpy(table.in_output).to(device)
        self._hits = torch.from_numpy(table.hits).to(device)
        self._of = torch.from_numpy(table.of).to(device)
        self._column_R = torch.arange(table.num_rules, device=device)
        self._oldest_tokens = torch.from_numpy(table.oldest_tokens).to(device)
        self._has_newer = bool((table.oldest_tokens > TOKEN_SIGNAL).any())

    def evaluate(
        self,
        holds_TR: torch.Tensor,
        signal_TX: torch.Tensor,
        batch: StepBatch,
        fresh: FreshRows,
        state: SlotState,
    ) -> RuleResults:
        """signal_TX: of which only the token signals are read"""
        position_T1, prompt_T1 = batch.position_T[:, None], fresh.prompt_T[:, None]
        in_phase_TR = torch.where(position_T1 < prompt_T1, self._in_prompt, self._in_output)
        evaluated_TR = in_phase_TR & fresh.judged_T[:, None] & state.applies_SR[batch.slot_T]
        if self._has_newer:
            evaluated_TR = evaluated_TR & (signal_TX[:, self._oldest_tokens] != 0)
        hit_TR = holds_TR & evaluated_TR
        persists_TR = hit_TR
        if state.needs_recent_hits:
            hits = RunningSums(
                hit_TR.to(torch.int64), batch, fresh, state.hits_SR, state.recent_hits_SHR
            )
            # Positions before a rule's phase are misses, so a window may reach back over them.
            before_TR = (position_T1 - self._of).clamp(min=-1)
            recent_TR = hits.at_row_TX - hits.at(before_TR, self._column_R)
            persists_TR = evaluated_TR & (recent_TR >= self._hits)
            hits.keep()
        was_active_TR = state.active_SR[batch.slot_T]
        result_TR = _carried_on(persists_TR, evaluated_TR, was_active_TR, fresh)
        is_first_T1 = (fresh.row_T == fresh.first_row_T)[:, None]
        before_TR = was_active_TR.where(is_first_T1, result_TR.roll(1, dims=0))
        fired_TR = evaluated_TR & result_TR & ~before_TR
        active_BR = result_TR[fresh.last_row_B].where(
            (fresh.after_B > fresh.next_B)[:, None], state.active_SR[batch.slots_B]
        )
        state.active_SR[batch.slots_B] = active_BR
        return RuleResults(evaluated_TR, fired_TR, active_BR)


def _carried_on(
    persists_TR: torch.Tensor,
    evaluated_TR: torch.Tensor,
    was_active_TR: torch.Tensor,
    fresh: FreshRows,
) -> torch.Tensor:
    """The result behind each row: of the last row of its request at which the rule was evaluated, else
    what it was before the step. Rows in another phase, or unseen, leave it as it is."""
    row_TR = fresh.row_T[:, None].where(evaluated_TR, -1).cummax(dim=0).values
    in_step_TR = row_TR >= fresh.first_row_T[:, None]
    return persists_TR.gather(0, row_TR.clamp(min=0)).where(in_step_TR, was_active_TR)
