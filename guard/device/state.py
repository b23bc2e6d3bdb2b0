"""What the guard remembers of a request from one step to the next: a row, its slot, in each tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from guard.device.kernels.choice import has_kernels
from guard.device.layout import MASK_INTERVALS, NULL_SLOT, Capacity
from guard.program.applicability import RulesFor
from guard.program.program import Program, WindowKind
from guard.program.step_report import NEVER


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that takes a slot.

    rules: which apply to it, act on it, or are held back
    next_position: where it is followed from; what was computed before is unseen
    """

    slot: int
    prompt_tokens: int
    rules: RulesFor
    next_position: int = 0


class SlotState:
    """The per-request tensors of one program. Slot `NULL_SLOT` is a dustbin that nobody reads.

    next_position_S   first position not evaluated yet: what comes again after preemption is skipped
    prompt_tokens_S   P
    unseen_S          positions that were never routed here
    sum_SX            each signal from the first position seen to the last one
    prompt_sum_SX     the same up to position P-1
    recent_sum_SQX    the same up to position p, at p % Q, for the last Q positions
    hits_SR, recent_hits_SHR   the same two for "the rule's expression was true"
    active_SR         the rule's last result, persistence included
    applies_SR        whether the rule is evaluated for this request
    enforced_SR       whether the rule may act on this request
    exempt_SR         whether an exception withholds its action
    mask_from_SIA, mask_to_SIA   the positions at which a mask action is in force, the latest of
                      `MASK_INTERVALS` stretches first
    histogram_SHLE    int32, selections of each expert in a named window
    recent_chosen_SQC, recent_position_SQ, recent_epoch_SQ   for distributions over so many tokens: the
                      experts of position p at p % Q, each as its id + 1, p itself, and the latest epoch
                      that has seen it
    block_at_SR       where a rule that fired blocks the request, the earliest; NEVER: it does not
    extreme_SC        each condition's value nearest to, or furthest beyond, its threshold; NaN: none
    """

    def __init__(self, program: Program, capacity: Capacity, device: torch.device) -> None:
        self.program = program
        self._device = device
        num_slots = self.num_slots = capacity.max_slots + 1
        num_signals = program.signals.num_signals
        num_rules = program.rule_table.num_rules
        num_actions = program.masks.num_actions
        recent = program.readings.window == WindowKind.RECENT
        self.window_positions = max(1, program.readings.longest_tokens)
        self.persist_positions = max(1, program.rule_table.longest_persistence)
        self.needs_recent_sums = bool(recent.any())
        self.needs_recent_hits = self.persist_positions > 1

        def full(value: float, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.full((num_slots, *shape), value, dtype=dtype, device=device)

        self.next_position_S = full(0)
        self.prompt_tokens_S = full(0)
        self.unseen_S = full(0)
        self.sum_SX = full(0, num_signals)
        self.prompt_sum_SX = full(0, num_signals)
        self.recent_sum_SQX = full(
            0, self.window_positions if self.needs_recent_sums else 1, num_signals
        )
        self.hits_SR = full(0, num_rules)
        self.recent_hits_SHR = full(
            0, self.persist_positions if self.needs_recent_hits else 1, num_rules
        )
        self.active_SR = full(False, num_rules, dtype=torch.bool)
        self.applies_SR = full(False, num_rules, dtype=torch.bool)
        self.enforced_SR = full(False, num_rules, dtype=torch.bool)
        self.exempt_SR = full(False, num_rules, dtype=torch.bool)
        self.mask_from_SIA = full(NEVER, MASK_INTERVALS, num_actions)
        self.mask_to_SIA = full(NEVER, MASK_INTERVALS, num_actions)
        self.block_at_SR = full(NEVER, num_rules)
        self.extreme_SC = full(float("nan"), program.conditions.num_conditions, dtype=torch.float64)
        distributions = program.distributions
        layers, experts = len(program.topology.layers), program.topology.max_experts
        self.histogram_SHLE = full(0, distributions.num_histograms, layers, experts, dtype=torch.int32)
        kept = distributions.recent_positions
        self.recent_position_SQ = full(-1, kept)
        self.recent_epoch_SQ = full(0, kept, dtype=torch.int32)
        self.recent_chosen_SQC = torch.zeros(
            (num_slots, kept, distributions.chosen_per_token if kept else 0),
            dtype=getattr(torch, distributions.expert_type.name),
            device=device,
        )
        has_none = not distributions.num_histograms and not kept
        self.admits_by_kernel = device.type == "cuda" and has_none and has_kernels(device)
        self.staged_writes: dict[int, Admission] = {}  # by slot, which may change hands in between

    def grow(self) -> range:
        """Twice the slots, between two steps; returns the new ones. No captured graph reads a slot, so
        these tensors may move; the rows that graphs do read stay where they are."""
        new = range(self.num_slots, 2 * self.num_slots)
        for name, tensor in tuple(vars(self).items()):
            if isinstance(tensor, torch.Tensor):
                assert len(tensor) == self.num_slots, f"{name} is not per slot"
                setattr(self, name, torch.cat([tensor, torch.zeros_like(tensor)]))
        self.num_slots = new.stop
        return new

    def add_request(self, admission: Admission) -> None:
        """Give a slot to a request from the next `apply_staged_writes` on, rewriting all of it."""
        assert admission.slot != NULL_SLOT, "the null slot belongs to no request"
        self.staged_writes[admission.slot] = admission

    def apply_staged_writes(self) -> None:
        if not self.staged_writes:
            return
        staged = list(self.staged_writes.values())
        slots_np = np.array([a.slot for a in staged], dtype=np.int64)
        prompt_tokens_np = np.array([a.prompt_tokens for a in staged], dtype=np.int64)
        enforced_np = np.stack([a.rules.enforced_R for a in staged])
        next_position_np = np.array([a.next_position for a in staged], dtype=np.int64)
        mask_from_np, mask_to_np = self._static_masks(prompt_tokens_np, enforced_np, next_position_np)
        if self.admits_by_kernel:
            from guard.device.kernels.triton_judge.admission import write_slots

            applies_np = np.stack([a.rules.applies_R for a in staged])
            exempt_np = np.stack([a.rules.exempt_R for a in staged])
            facts_np = np.concatenate(
                [
                    np.stack([slots_np, prompt_tokens_np, next_position_np], axis=1),
                    applies_np,
                    enforced_np,
                    exempt_np,
                    mask_from_np,
                    mask_to_np,
                ],
                axis=1,
                dtype=np.int64,
            )
            write_slots(self, self._to_device(facts_np))
            self.staged_writes.clear()
            return
        slots = self._to_device(slots_np)
        for zeroed in (
            self.sum_SX,
            self.prompt_sum_SX,
            self.recent_sum_SQX,
            self.hits_SR,
            self.recent_hits_SHR,
            self.active_SR,
            self.histogram_SHLE,
        ):
            zeroed.index_fill_(0, slots, 0)
        self.recent_position_SQ.index_fill_(0, slots, -1)
        self.block_at_SR.index_fill_(0, slots, NEVER)
        self.extreme_SC.index_fill_(0, slots, float("nan"))
        self.next_position_S[slots] = self._to_device(next_position_np)
        self.unseen_S.index_fill_(0, slots, 0)  # what was computed before there were rules is no fault
        self.prompt_tokens_S[slots] = self._to_device(prompt_tokens_np)
        self.applies_SR[slots] = self._to_device(np.stack([a.rules.applies_R for a in staged]))
        self.enforced_SR[slots] = self._to_device(enforced_np)
        self.exempt_SR[slots] = self._to_device(np.stack([a.rules.exempt_R for a in staged]))
        self.mask_from_SIA.index_fill_(0, slots, NEVER)
        self.mask_to_SIA.index_fill_(0, slots, NEVER)
        self.mask_from_SIA[slots, 0] = self._to_device(mask_from_np)
        self.mask_to_SIA[slots, 0] = self._to_device(mask_to_np)
        # Last: what failed half-way is written again before the slots are used.
        self.staged_writes.clear()

    def masks_at(self, slots_N: torch.Tensor, position_N: torch.Tensor) -> torch.Tensor:
        """bool [N, A]: the mask actions in force at a position of each slot's request."""
        position_N11 = position_N[:, None, None]
        from_NIA, to_NIA = self.mask_from_SIA[slots_N], self.mask_to_SIA[slots_N]
        return ((from_NIA <= position_N11) & (position_N11 < to_NIA)).any(dim=1)

    def distrust(self, slots_B: torch.Tensor) -> None:
        """A step's evaluation broke off: what it noted as true may never have been acted on, so
        that rules which still hold fire again."""
        self.active_SR[slots_B] = False

    def fill_gaps(self, slots_B: torch.Tensor, start_B: torch.Tensor) -> None:
        """Let windows reach back over positions that a failed step did not evaluate.

        start_B: first position of each request in the step that comes
        """
        next_B1 = self.next_position_S[slots_B][:, None]
        last_B1 = torch.maximum(next_B1, start_B[:, None]) - 1
        for sum_SX, recent_SQX in (
            (self.sum_SX, self.recent_sum_SQX),
            (self.hits_SR, self.recent_hits_SHR),
        ):
            kept = recent_SQX.shape[1]
            place_Q = torch.arange(kept, device=self._device)
            position_BQ = last_B1 - (last_B1 - place_Q).remainder(kept)
            in_gap_BQ1 = (position_BQ >= next_B1)[:, :, None]
            recent_SQX[slots_B] = sum_SX[slots_B][:, None].where(in_gap_BQ1, recent_SQX[slots_B])

    def _static_masks(
        self, prompt_tokens_np: np.ndarray, enforced_np: np.ndarray, next_position_np: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masks of rules that are nothing but `always` hold from the first position of their phase."""
        masks, rules = self.program.masks, self.program.rule_table
        on = enforced_np[:, masks.rule] & masks.static
        first = np.where(rules.in_prompt[masks.rule], 0, prompt_tokens_np[:, None])
        first = np.maximum(first, next_position_np[:, None])
        start = np.where(on, first, NEVER)
        stop = np.where(on & (masks.tokens > 0), start + masks.tokens, NEVER)
        return start, stop

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return host_to_device(array, self._device)


def host_to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device that needs no synchronisation: its pinned source is never written again."""
    source = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return source.clone()
    return source.pin_memory().to(device, non_blocking=True)
