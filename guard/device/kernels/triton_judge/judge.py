"""The judge on a GPU: two launches a step, behind the interface of `StepEvaluator`."""

from __future__ import annotations

import torch

from guard.device.evaluate import StepEvaluator
from guard.device.kept_evidence import KeepRows, KeptEvidence
from guard.device.kernels.triton_judge.decide import decide_kernel
from guard.device.kernels.triton_judge.flat_tables import flat_tables
from guard.device.kernels.triton_judge.reducer import TritonReducer
from guard.device.layout import MAX_EVENTS_PER_STEP, NULL_SLOT, Capacity
from guard.device.packed import PackedDecisions, Packing
from guard.device.readback import StepDecisions
from guard.device.rows import StepBatch
from guard.device.state import SlotState
from guard.device.tap import RoutingTap
from guard.program.program import Program

MOST_ROWS_PER_REQUEST = 8
"""A kernel goes through a request's rows one by one, so steps that bring more of them, prompts that
is, are the twin's: its many launches take no longer than the forward of a prompt."""

_BLOCK = 128
_PACK_BLOCK = 1024
_WARPS = 4


class TritonJudge:
    """Decides on the same state as its twin, so that each step can be either's.

    A step is the twin's as a whole if it brings more than `MOST_ROWS_PER_REQUEST` rows a request; all
    steps are if conditions read distributions, or if the server speculates.
    """

    def __init__(self, program: Program, device: torch.device, max_draft_tokens: int = 0) -> None:
        self.twin = StepEvaluator(program, device, max_draft_tokens)
        self._program = program
        self._covers = not program.distributions.num_conditions and not max_draft_tokens
        self._tables = flat_tables(program, device)
        self._reducer = TritonReducer(program, device)
        self._scratch = torch.empty(0, dtype=torch.int64, device=device)
        self._counters = torch.zeros(2, dtype=torch.int64, device=device)

    def warm_up(self) -> None:
        """Compile what a step may launch, or load it from Triton's cache, before there is a step.

        Raises what Triton raises where it cannot.
        """
        device, one = self._scratch.device, Capacity(max_rows=1, max_slots=1)
        state, tap = (
            SlotState(self._program, one, device),
            RoutingTap(self._program.topology, one, device),
        )
        nobody_B = torch.full((1,), NULL_SLOT, device=device)
        batch = StepBatch.of(nobody_B, torch.arange(2, device=device), torch.zeros_like(nobody_B))
        kept = KeptEvidence(self._program.signals, self._program.topology, 1, 1, device)
        trusted = torch.ones((), dtype=torch.bool, device=device)
        for rejected_B in (None, nobody_B.to(torch.int32)):
            keep = KeepRows(kept, nobody_B, batch, rejected_B)
            self.kept_signals(tap, 1, trusted, keep)
        evidence_TX = self.signals(tap, 1)
        for rejected_B in (None, nobody_B, nobody_B.to(torch.int32)):
            self.evaluate(evidence_TX, batch, state, rejected_B)
        self.evaluate(evidence_TX, batch, state, computed_B=nobody_B)

    def signals(self, tap: RoutingTap, num_rows: int) -> torch.Tensor:
        """int64 [T, columns]: the evidence of the tap's first `num_rows` rows."""
        if not self._reducer.covers:
            return self.twin.signals(tap, num_rows)
        return self._reducer.reduce(tap, num_rows)

    def kept_signals(
        self, tap: RoutingTap, num_rows: int, trusted_T1: torch.Tensor, keep: KeepRows | None
    ) -> torch.Tensor:
        """As `KeepsSignals.kept_signals`."""
        if self._reducer.covers:
            return self._reducer.reduce(tap, num_rows, trusted_T1, keep)
        signal_TX = self.twin.signals(tap, num_rows) * trusted_T1
        if keep is not None:
            keep.write(signal_TX)
        return signal_TX

    def covers(self, batch: StepBatch) -> bool:
        """Whether a step's rows are the kernels' to decide on."""
        num_requests = len(batch.slots_B)
        return self._covers and len(batch.position_T) <= MOST_ROWS_PER_REQUEST * num_requests

    def evaluate(
        self,
        evidence_TX: torch.Tensor,
        batch: StepBatch,
        state: SlotState,
        rejected_B: torch.Tensor | None = None,
        *,
        computed_B: torch.Tensor | None = None,
    ) -> StepDecisions:
        """As `StepEvaluator.evaluate`."""
        num_rows, num_requests = len(batch.position_T), len(batch.slots_B)
        if not self.covers(batch):
            return self.twin.evaluate(evidence_TX, batch, state, rejected_B, computed_B=computed_B)
        packing = Packing.of(self._program, num_rows, num_requests, MAX_EVENTS_PER_STEP)
        buffer = torch.empty(packing.all_words, dtype=torch.int64, device=evidence_TX.device)
        decisions = StepDecisions(*packing.views(buffer))
        decide_kernel[(num_requests,)](
            evidence_TX.contiguous(),
            batch.slots_B,
            batch.query_start_B1,
            batch.position_T,
            batch.request_T,
            batch.slots_B if rejected_B is None else rejected_B,
            batch.slots_B if computed_B is None else computed_B,
            *self._tables,
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
            self._scratch_for(num_rows),
            self._counters,
            decisions.requests_B,
            decisions.masked_BW,
            decisions.extremes_BC,
            decisions.events_V,
            decisions.values_V,
            decisions.num_events,
            num_rows,
            num_requests,
            len(decisions.events_V),
            len(decisions.values_V),
            HAS_REJECTED=rejected_B is not None,
            HAS_COMPUTED=computed_B is not None,
            BLOCK=_BLOCK,
            PACK_BLOCK=_PACK_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
        return decisions._replace(packed=PackedDecisions(buffer, packing, decisions.requests_B))

    def _scratch_for(self, num_rows: int) -> torch.Tensor:
        """Grows with the largest step so far; the steps of one stream follow one another."""
        program = self._program
        num_conditions, num_rules = program.conditions.num_conditions, program.rule_table.num_rules
        num_nodes = sum(len(level.children) for level in program.expressions.levels)
        words = program.signals.num_signals + num_rules + num_conditions
        words += -(-(1 + num_conditions + num_nodes + num_rules) // 8)
        if len(self._scratch) < num_rows * words:
            self._scratch = torch.empty(
                2 * num_rows * words, dtype=torch.int64, device=self._scratch.device
            )
        return self._scratch
