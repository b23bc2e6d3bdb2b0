"""Requests under way pass from one program's slots to the next one's, between two steps.

A slot keeps its number. Letters: N live slots, others as in `layout`.
"""

from __future__ import annotations

import numpy as np
import torch

from guard.device.state import SlotState
from guard.program.program import ActionKind, Ints, Program
from guard.program.step_report import NEVER
from guard.program.succession import Succession


class _Columns:
    """The earlier program's columns in the order of the later one's.

    earlier_X: where the earlier program has it; -1: nowhere
    """

    def __init__(self, earlier_X: Ints, num_earlier: int, device: torch.device) -> None:
        self._size = len(earlier_X)
        self._are_the_same = np.array_equal(earlier_X, np.arange(num_earlier))
        self._source_X = torch.from_numpy(earlier_X.clip(min=0)).to(device)
        self._is_there_X = torch.from_numpy(earlier_X >= 0).to(device)

    def taken(self, values_NX: torch.Tensor, fill: float) -> torch.Tensor:
        """`fill` where there is none."""
        if self._are_the_same:
            return values_NX
        if not values_NX.shape[-1]:
            shape = (*values_NX.shape[:-1], self._size)
            return torch.full(shape, fill, dtype=values_NX.dtype, device=values_NX.device)
        return values_NX[..., self._source_X].where(self._is_there_X, fill)


class CarryOver:
    """Made ahead, when a program is prepared; `apply` is the short part between two steps.

    What a rule that goes on has counted stays. Of a rule that acts and was in audit for a request
    and now is enforced, the last result is forgotten: if it still holds it fires again, and acts.
    """

    def __init__(self, earlier: Program, later: Program, device: torch.device) -> None:
        succession = Succession.of(earlier, later)

        def put(array: Ints) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        signals, distributions = earlier.signals, earlier.distributions
        self._signal_X = _Columns(succession.signal, signals.num_signals, device)
        self._histogram_H = _Columns(succession.histogram, distributions.num_histograms, device)
        self._rule_R = _Columns(succession.rule, earlier.rule_table.num_rules, device)
        self._condition_C = _Columns(succession.condition, earlier.conditions.num_conditions, device)
        self._action_A = _Columns(succession.action, earlier.masks.num_actions, device)
        self._mask_rule_A = put(later.masks.rule)
        self._static_A = torch.from_numpy(later.masks.static).to(device)
        self._tokens_A = put(later.masks.tokens)
        self._mask_in_prompt_A = torch.from_numpy(later.rule_table.in_prompt[later.masks.rule]).to(
            device
        )
        acts = [rule.action is not ActionKind.OBSERVE for rule in later.rules]
        self._acts_R = torch.tensor(acts, dtype=torch.bool, device=device)

    def apply(
        self,
        old: SlotState,
        new: SlotState,
        slots_N: torch.Tensor,
        applies_NR: torch.Tensor,
        enforced_NR: torch.Tensor,
        exempt_NR: torch.Tensor,
    ) -> None:
        """Write the live slots of `new`, all of it. The last three: by the later program."""
        next_N = old.next_position_S[slots_N]
        for name in ("next_position_S", "prompt_tokens_S", "unseen_S"):
            getattr(new, name)[slots_N] = getattr(old, name)[slots_N]
        new.applies_SR[slots_N] = applies_NR
        new.enforced_SR[slots_N] = enforced_NR
        new.exempt_SR[slots_N] = exempt_NR
        for total, recent, columns in (
            ("sum_SX", "recent_sum_SQX", self._signal_X),
            ("hits_SR", "recent_hits_SHR", self._rule_R),
        ):
            total_NX = getattr(old, total)[slots_N]
            recent_NQX = _ring(
                getattr(old, recent)[slots_N], total_NX, next_N - 1, getattr(new, recent).shape[1]
            )
            getattr(new, total)[slots_N] = columns.taken(total_NX, 0)
            getattr(new, recent)[slots_N] = columns.taken(recent_NQX, 0)
        if new.histogram_SHLE.numel():
            histogram_NLEH = old.histogram_SHLE[slots_N].permute(0, 2, 3, 1)
            taken_NLEH = self._histogram_H.taken(histogram_NLEH, 0)
            new.histogram_SHLE[slots_N] = taken_NLEH.permute(0, 3, 1, 2)
        _carry_recent_experts(old, new, slots_N, next_N)
        new.prompt_sum_SX[slots_N] = self._signal_X.taken(old.prompt_sum_SX[slots_N], 0)
        new.extreme_SC[slots_N] = self._condition_C.taken(old.extreme_SC[slots_N], float("nan"))
        was_enforced_NR = self._rule_R.taken(old.enforced_SR[slots_N], False)
        newly_NR = enforced_NR & ~was_enforced_NR & self._acts_R
        new.active_SR[slots_N] = self._rule_R.taken(old.active_SR[slots_N], False) & ~newly_NR
        # Blocks that were decided and have not taken place yet.
        block_at_NR = self._rule_R.taken(old.block_at_SR[slots_N], NEVER)
        new.block_at_SR[slots_N] = block_at_NR.where(enforced_NR, NEVER)
        self._carry_masks(old, new, slots_N, was_enforced_NR, enforced_NR)

    def _carry_masks(
        self,
        old: SlotState,
        new: SlotState,
        slots_N: torch.Tensor,
        was_enforced_NR: torch.Tensor,
        enforced_NR: torch.Tensor,
    ) -> None:
        """What was masked stays masked in a recompute, as long as there is the rule; what is no longer
        enforced ends at the next position, and static masks that are new begin there."""
        next_N11 = old.next_position_S[slots_N][:, None, None]
        from_NIA = self._action_A.taken(old.mask_from_SIA[slots_N], NEVER)
        to_NIA = self._action_A.taken(old.mask_to_SIA[slots_N], NEVER)
        enforced_NA = enforced_NR[:, self._mask_rule_A]
        was_enforced_NA = was_enforced_NR[:, self._mask_rule_A]
        to_NIA = to_NIA.where(enforced_NA[:, None], to_NIA.minimum(next_N11))
        begins_NA = self._static_A & enforced_NA & ~was_enforced_NA
        phase_NA = old.prompt_tokens_S[slots_N][:, None].where(~self._mask_in_prompt_A, 0)
        start_NA = torch.maximum(next_N11[:, 0], phase_NA)
        stop_NA = (start_NA + self._tokens_A).where(self._tokens_A > 0, NEVER)
        begins_N1A = begins_NA[:, None]
        new.mask_from_SIA[slots_N] = torch.where(
            begins_N1A, torch.cat([start_NA[:, None], from_NIA[:, :-1]], dim=1), from_NIA
        )
        new.mask_to_SIA[slots_N] = torch.where(
            begins_N1A, torch.cat([stop_NA[:, None], to_NIA[:, :-1]], dim=1), to_NIA
        )


def _carry_recent_experts(
    old: SlotState, new: SlotState, slots_N: torch.Tensor, next_N: torch.Tensor
) -> None:
    """What is there of the tokens that the new ring has room for. Windows that are new do not count
    them, by their epoch; one that goes on found them all in the old ring."""
    kept, size = old.recent_position_SQ.shape[1], new.recent_position_SQ.shape[1]
    if not kept or not size:
        return
    last_N1 = next_N[:, None] - 1
    place_Q = torch.arange(size, device=next_N.device)
    position_NQ = last_N1 - (last_N1 - place_Q).remainder(size)
    slots_N1, place_NQ = slots_N[:, None], position_NQ.remainder(kept)
    is_there_NQ = old.recent_position_SQ[slots_N1, place_NQ] == position_NQ
    new.recent_position_SQ[slots_N] = position_NQ.where(is_there_NQ, -1)
    new.recent_epoch_SQ[slots_N] = old.recent_epoch_SQ[slots_N1, place_NQ]
    new.recent_chosen_SQC[slots_N] = old.recent_chosen_SQC[slots_N1, place_NQ]


def _ring(
    kept_NQX: torch.Tensor, total_NX: torch.Tensor, last_N: torch.Tensor, size: int
) -> torch.Tensor:
    """[N, size, X]: sums up to position p at p % size, from a ring of another size.

    total_NX: the sum up to position `last_N`
    Positions that the old ring no longer has count as if nothing had been seen up to them: they
    get the sum of the oldest one that it has, so that a longer window grows from there.
    """
    kept = kept_NQX.shape[1]
    if kept == size:
        return kept_NQX
    place_Q = torch.arange(size, device=last_N.device)
    last_N1 = last_N[:, None]
    position_NQ = last_N1 - (last_N1 - place_Q).remainder(size)
    oldest_N1 = (last_N1 - kept + 1).clamp(min=0)
    source_NQ = torch.maximum(position_NQ, oldest_N1)
    past_NQX = kept_NQX.gather(
        1, source_NQ.remainder(kept)[:, :, None].expand(-1, -1, kept_NQX.shape[2])
    )
    is_last_NQ1 = (source_NQ >= last_N1)[:, :, None]
    return total_NX[:, None].where(is_last_NQ1, past_NQX)
