"""What follows from firings: positions at which masks are in force, the first block, events."""

from __future__ import annotations

import numpy as np
import torch

from guard.device.layout import MAX_EVENTS_PER_STEP, NULL_SLOT
from guard.device.mask import pack_bits
from guard.device.readback import StepDecisions
from guard.device.rows import FreshRows, StepBatch
from guard.device.rules import RuleResults
from guard.device.state import SlotState
from guard.program.program import TOKEN_SIGNAL, ActionKind, MaskRelease, MaskTable, Program
from guard.program.step_report import NEVER, EventColumn, RequestColumn


class MaskSchedule:
    """Starts, extends and releases the masks of rules that are not static."""

    def __init__(self, masks: MaskTable, device: torch.device) -> None:
        self._rule_A = torch.from_numpy(masks.rule).to(device)
        self._dynamic_A = ~torch.from_numpy(masks.static).to(device)
        self._clears_A = torch.from_numpy(masks.release == MaskRelease.CLEAR).to(device)
        tokens = np.where(masks.release == MaskRelease.TOKENS, masks.tokens, NEVER)
        self._tokens_A = torch.from_numpy(tokens).to(device)

    def update(
        self,
        fired_BR: torch.Tensor,
        active_BR: torch.Tensor,
        fresh: FreshRows,
        batch: StepBatch,
        state: SlotState,
        computed_B: torch.Tensor | None,
    ) -> None:
        """A mask begins at the first output position that has not been computed yet."""
        slots_B = batch.slots_B
        start_B = torch.maximum(fresh.after_B, fresh.prompt_B)
        if computed_B is not None:
            start_B = torch.maximum(start_B, computed_B)
        start_B1 = start_B[:, None]
        from_BIA, to_BIA = state.mask_from_SIA[slots_B], state.mask_to_SIA[slots_B]
        from_BA, to_BA = from_BIA[:, 0], to_BIA[:, 0]
        enforced_BA = state.enforced_SR[slots_B][:, self._rule_A] & self._dynamic_A
        active_BA = active_BR[:, self._rule_A]
        begins_BA = enforced_BA & fired_BR[:, self._rule_A] & (active_BA | ~self._clears_A)
        in_force_BA = (from_BA <= start_B1) & (start_B1 < to_BA)
        released_BA = enforced_BA & self._clears_A & ~active_BA & in_force_BA
        stop_BA = (start_B1 + self._tokens_A).clamp(max=NEVER)
        new_from_BA = start_B1.where(begins_BA & ~in_force_BA, from_BA)
        new_to_BA = stop_BA.where(begins_BA, start_B1.where(released_BA, to_BA))
        # What was in force before goes one place back; an empty stretch is written over.
        is_new_B1A = (begins_BA & ~in_force_BA & (from_BA < to_BA))[:, None]
        state.mask_from_SIA[slots_B] = _pushed(from_BIA, new_from_BA, is_new_B1A)
        state.mask_to_SIA[slots_B] = _pushed(to_BIA, new_to_BA, is_new_B1A)

    def first_masked(self, slots_B: torch.Tensor, state: SlotState) -> torch.Tensor:
        """int64 [B]: where the first mask that is not static begins, or NEVER."""
        from_BIA, to_BIA = state.mask_from_SIA[slots_B], state.mask_to_SIA[slots_B]
        begins_BIA = from_BIA.where((from_BIA < to_BIA) & self._dynamic_A, NEVER)
        return begins_BIA.flatten(1).amin(dim=1)


def _pushed(kept_BIA: torch.Tensor, latest_BA: torch.Tensor, is_new_B1A: torch.Tensor) -> torch.Tensor:
    """The latest value in front: before the others where it is new, else in place of the first."""
    latest_B1A = latest_BA[:, None]
    return torch.where(
        is_new_B1A,
        torch.cat([latest_B1A, kept_BIA[:, :-1]], dim=1),
        torch.cat([latest_B1A, kept_BIA[:, 1:]], dim=1),
    )


class StepActions:
    """Applies a step's firings to the slots and writes down what the host has to know."""

    def __init__(
        self, program: Program, device: torch.device, max_events: int | None = MAX_EVENTS_PER_STEP
    ) -> None:
        """max_events: firings of a step that are reported with their values; None: all"""
        self._max_events = max_events
        self._num_rules = program.rule_table.num_rules
        self._rule_R = torch.arange(self._num_rules, device=device)
        self._blocks_R = torch.from_numpy(program.rule_table.blocks).to(device)
        acts = [rule.action is not ActionKind.OBSERVE for rule in program.rules]
        self._acts_R = torch.tensor(acts, dtype=torch.bool, device=device)
        self._conditions_RC = torch.from_numpy(program.rule_table.conditions).to(device)
        self._set_signal_N = torch.tensor(
            [named.signal for named in program.sets], dtype=torch.int64, device=device
        )
        self._newest_tokens_R = torch.from_numpy(program.rule_table.newest_tokens).to(device)
        self._masks = MaskSchedule(program.masks, device) if program.masks.num_actions else None

    def apply(
        self,
        results: RuleResults,
        value_TC: torch.Tensor,
        sum_TX: torch.Tensor,
        seen_BX: torch.Tensor,
        batch: StepBatch,
        fresh: FreshRows,
        state: SlotState,
        computed_B: torch.Tensor | None = None,
    ) -> StepDecisions:
        """sum_TX: each signal of the request up to each row
        seen_BX: what each signal grew by in this step
        computed_B: see `StepEvaluator.evaluate`
        """
        slots_B = batch.slots_B
        enforced_TR = state.enforced_SR[batch.slot_T]
        if self._masks is not None:
            fired_BR = self._any_of_request(results.fired_TR, batch)
            self._masks.update(fired_BR, results.active_BR, fresh, batch, state, computed_B)
        self._block(results.fired_TR & self._blocks_R & enforced_TR, batch, fresh, state)
        exempt_TR = state.exempt_SR[batch.slot_T]
        events_V, values_V, num_events = self._events(
            results.fired_TR, enforced_TR, exempt_TR, value_TC, sum_TX, batch, fresh
        )
        in_prompt_T = batch.position_T < fresh.prompt_T
        prompt_tokens_B = _count_by_request(fresh.judged_T & in_prompt_T, batch)
        output_tokens_B = _count_by_request(fresh.judged_T & ~in_prompt_T, batch)
        # Neither a gap before what came now was seen, nor a row without evidence.
        state.unseen_S[slots_B] += fresh.after_B - fresh.next_B - prompt_tokens_B - output_tokens_B
        state.next_position_S[slots_B] = fresh.after_B
        judged_B = (slots_B != NULL_SLOT).to(torch.int64)
        columns: list[torch.Tensor] = [torch.empty(0)] * RequestColumn.NUM
        columns[RequestColumn.BLOCK_KEY] = self._block_keys(state.block_at_SR[slots_B])
        columns[RequestColumn.MASK_FROM] = self._first_masked(slots_B, state)
        columns[RequestColumn.PROMPT_TOKENS] = prompt_tokens_B
        columns[RequestColumn.OUTPUT_TOKENS] = output_tokens_B
        columns[RequestColumn.UNSEEN] = state.unseen_S[slots_B] * judged_B
        columns[RequestColumn.JUDGED] = judged_B
        applies_BR = state.applies_SR[slots_B]
        newest_BR = self._newest_tokens_R.where(applies_BR, TOKEN_SIGNAL)
        seen_B = state.sum_SX[slots_B].gather(1, newest_BR.amax(dim=1, keepdim=True))[:, 0]
        is_asked_B = applies_BR.any(dim=1)
        columns[RequestColumn.LATE] = (fresh.after_B - seen_B) * judged_B * is_asked_B
        requests_B = torch.cat([torch.stack(columns, dim=1), seen_BX[:, self._set_signal_N]], dim=1)
        extremes_BC = state.extreme_SC[slots_B].to(torch.float32)
        masked_BW = pack_bits(state.masks_at(slots_B, fresh.after_B))
        return StepDecisions(requests_B, masked_BW, extremes_BC, events_V, values_V, num_events)

    def _any_of_request(self, flag_TR: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        any_BR = torch.zeros(
            (len(batch.slots_B), self._num_rules), dtype=torch.int8, device=flag_TR.device
        )
        index_TR = batch.request_T[:, None].expand_as(flag_TR)
        return any_BR.scatter_reduce(0, index_TR, flag_TR.to(torch.int8), "amax").bool()

    def _block(
        self, fired_TR: torch.Tensor, batch: StepBatch, fresh: FreshRows, state: SlotState
    ) -> None:
        """The least (position, rule) wins; a block decided in the prompt acts at its last position."""
        acts_at_T1 = torch.maximum(batch.position_T, fresh.prompt_T - 1)[:, None]
        acts_at_TR = acts_at_T1.where(fired_TR, NEVER)
        slot_TR = fresh.slot_T[:, None].expand_as(acts_at_TR)
        state.block_at_SR.scatter_reduce_(0, slot_TR, acts_at_TR, "amin")

    def _block_keys(self, block_at_BR: torch.Tensor) -> torch.Tensor:
        """int64 [B]: the first block as position·R + rule, or NEVER."""
        is_decided_BR = block_at_BR < NEVER
        key_BR = block_at_BR.where(is_decided_BR, 0) * self._num_rules + self._rule_R
        return key_BR.where(is_decided_BR, NEVER).amin(dim=1)

    def _first_masked(self, slots_B: torch.Tensor, state: SlotState) -> torch.Tensor:
        if self._masks is None:
            return torch.full_like(slots_B, NEVER)
        return self._masks.first_masked(slots_B, state)

    def _events(
        self,
        fired_TR: torch.Tensor,
        enforced_TR: torch.Tensor,
        exempt_TR: torch.Tensor,
        value_TC: torch.Tensor,
        sum_TX: torch.Tensor,
        batch: StepBatch,
        fresh: FreshRows,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Firings packed to the front of a buffer for as many as there can be: a rule that fires has to
        turn false again, so at most at every second row of a request. In front is the first one of each
        request and rule that acts, so that no request can crowd out another's masks and blocks. The
        first `max_events` have their values."""
        most = self._num_rules * ((len(batch.position_T) + len(batch.slots_B)) // 2)
        count_TR = fired_TR.to(torch.int64).cumsum(0)
        before_BR = (count_TR - fired_TR.to(torch.int64))[batch.query_start_B1[:-1]]
        is_first_TR = fired_TR & (count_TR - before_BR[batch.request_T] == 1)
        acting = (is_first_TR & enforced_TR & self._acts_R).flatten()
        other = fired_TR.flatten() & ~acting
        nth_acting, nth_other = acting.cumsum(0), other.cumsum(0)
        num_events = nth_acting[-1:] + nth_other[-1:]
        place = torch.where(acting, nth_acting, nth_acting[-1:] + nth_other) - 1
        place = place.where(acting | other, most)
        source = torch.full((most + 1,), -1, dtype=torch.int64, device=acting.device)
        source.scatter_(0, place, torch.arange(len(acting), device=acting.device))
        source = source[:most]
        used = torch.arange(most, device=acting.device) < num_events
        source = source.where(used, 0)
        row, rule = source // self._num_rules, source % self._num_rules
        columns: list[torch.Tensor] = [torch.empty(0)] * EventColumn.NUM
        columns[EventColumn.REQUEST] = batch.request_T[row].where(used, -1)
        columns[EventColumn.RULE] = rule
        columns[EventColumn.POSITION] = batch.position_T[row]
        columns[EventColumn.IN_PROMPT] = (batch.position_T < fresh.prompt_T)[row].to(torch.int64)
        columns[EventColumn.ENFORCED] = enforced_TR[row, rule].to(torch.int64)
        columns[EventColumn.UNSEEN] = (
            batch.position_T[row] + 1 - sum_TX[row, self._newest_tokens_R[rule]]
        )
        columns[EventColumn.EXEMPT] = exempt_TR[row, rule].to(torch.int64)
        row, rule = row[: self._max_events], rule[: self._max_events]
        conditions = self._conditions_RC[rule]
        values = value_TC[row[:, None], conditions.clamp(min=0)].where(conditions >= 0, float("nan"))
        return torch.stack(columns, dim=1), values, num_events


def _count_by_request(flag_T: torch.Tensor, batch: StepBatch) -> torch.Tensor:
    """int64 [B]: rows of each request for which the flag is set."""
    return torch.zeros_like(batch.slots_B).scatter_add(0, batch.request_T, flag_T.to(torch.int64))
