"""One step, from its routing to its decisions. No host synchronisation anywhere in it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from guard.device.actions import StepActions
from guard.device.conditions import ConditionEvaluator, ConditionValues, ExpressionEvaluator
from guard.device.distributions import DistributionEvaluator, unpack_experts
from guard.device.drafts import DraftDecisions, split_drafts
from guard.device.evidence import SignalReducer
from guard.device.kept_evidence import KeepRows
from guard.device.layout import MAX_EVENTS_PER_STEP
from guard.device.readback import StepDecisions
from guard.device.rows import FreshRows, StepBatch
from guard.device.rules import RuleEvaluator, RuleResults
from guard.device.state import SlotState
from guard.device.tap import RoutingTap
from guard.device.windows import RunningSums, WindowReader
from guard.program.program import TOKEN_SIGNAL, Program


@runtime_checkable
class KeepsSignals(Protocol):
    """An evaluator that keeps the evidence beside the KV while it makes it."""

    def kept_signals(
        self, tap: RoutingTap, num_rows: int, trusted_T1: torch.Tensor, keep: KeepRows | None
    ) -> torch.Tensor:
        """int64 [T, columns]: the evidence of the tap's first `num_rows` rows, 0 in those that are not
        trusted.

        trusted_T1: bool [T, 1], or one for all rows
        """


class StepEvaluator:
    """Evaluates a program's rules at every fresh row, in position order.

    Each request's rows are a segment of a scan: what a row sees of earlier rows does not depend on
    whether they came in this step or before, so neither do the decisions. Nor does it matter where a
    row's signals come from: this step's tap, or what was kept of a token whose KV came from a cache.
    """

    def __init__(
        self,
        program: Program,
        device: torch.device,
        max_draft_tokens: int = 0,
        *,
        all_values: bool = False,
    ) -> None:
        """max_draft_tokens: that a request can have in a step; 0 where nothing is speculated
        all_values: report every firing with its evidence, where no fixed buffer has to hold them
        """
        readings = program.readings
        self._signals = SignalReducer(program.signals, program.distributions, program.topology, device)
        self._windows = WindowReader(readings, device)
        self._conditions = ConditionEvaluator(
            program.conditions, program.distributions, program.signals.scale[readings.signal], device
        )
        self._num_linear = program.signals.num_linear
        self._distribution_table = program.distributions
        self._distributions = (
            DistributionEvaluator(
                program.distributions, program.signals.token_epochs, device, max_draft_tokens
            )
            if program.distributions.num_conditions
            else None
        )
        self._expressions = ExpressionEvaluator(program.expressions, device)
        self._rules = RuleEvaluator(program.rule_table, device)
        self._actions = StepActions(program, device, None if all_values else MAX_EVENTS_PER_STEP)
        self._sign_C = torch.from_numpy(program.conditions.sign).to(device)
        self._rule_of_condition_C = _rule_of_condition(program).to(device)
        self._max_draft_tokens = max_draft_tokens
        self._set_signal_N = torch.tensor(
            [named.signal for named in program.sets], dtype=torch.int64, device=device
        )

    def signals(self, tap: RoutingTap, num_rows: int) -> torch.Tensor:
        """int64 [T, columns]: the evidence of the tap's first `num_rows` rows."""
        return self._signals.reduce(tap, num_rows)

    def evaluate(
        self,
        evidence_TX: torch.Tensor,
        batch: StepBatch,
        state: SlotState,
        rejected_B: torch.Tensor | None = None,
        *,
        computed_B: torch.Tensor | None = None,
    ) -> StepDecisions:
        """Advance `state` by the rows of `batch`.

        evidence_TX: int64; a row whose `TOKEN_SIGNAL` is 0 was not seen and is all 0
        rejected_B: [B] draft rows at the end of each request that were not accepted, if there are
            drafts; they were computed but do not count
        computed_B: [B] the first position that the forward has not computed, where that lies behind
            these rows; a mask that begins now begins there
        """
        fresh = FreshRows.of(batch, state, evidence_TX[:, TOKEN_SIGNAL] != 0, rejected_B)
        signal_TX = self._signals.signals(evidence_TX) * fresh.fresh_T[:, None]
        sums = RunningSums(signal_TX, batch, fresh, state.sum_SX, state.recent_sum_SQX)
        reading_TM = self._windows.read(sums, batch, fresh, state)
        chosen_TC, distribution_TD = None, None
        if self._distributions is not None:
            words_TX = evidence_TX[:, self._num_linear :]
            chosen_TC = unpack_experts(words_TX, self._distribution_table)
            distribution_TD = self._distributions.read(chosen_TC, signal_TX, batch, fresh, state)
        values = self._conditions.evaluate(reading_TM, distribution_TD)
        holds_TR = self._expressions.holds(values.truth_TC)
        results = self._rules.evaluate(holds_TR, signal_TX, batch, fresh, state)
        signed_TC = self._signed(values, results)
        drafts = None
        if self._max_draft_tokens:
            drafts = self._split_drafts(signal_TX, signed_TC, batch, fresh, state)
        self._keep_extremes(signed_TC, fresh, state)
        before_BX = state.sum_SX[batch.slots_B]
        sums.keep()
        if self._distributions is not None and chosen_TC is not None:
            self._distributions.keep(chosen_TC, signal_TX, batch, fresh, state)
        seen_BX = state.sum_SX[batch.slots_B] - before_BX
        decisions = self._actions.apply(
            results, values.value_TC, sums.at_row_TX, seen_BX, batch, fresh, state, computed_B
        )
        return decisions._replace(drafts=drafts)

    def _signed(self, values: ConditionValues, results: RuleResults) -> torch.Tensor:
        """float64 [T, C]: turned so that the largest is furthest beyond; -inf where not known."""
        evaluated_TC = results.evaluated_TR[:, self._rule_of_condition_C]
        known_TC = evaluated_TC & ~values.value_TC.isnan()
        return (values.value_TC * self._sign_C).where(known_TC, float("-inf"))

    def _signed_extremes(self, extreme_NC: torch.Tensor) -> torch.Tensor:
        signed_NC = extreme_NC * self._sign_C
        return signed_NC.where(~signed_NC.isnan(), float("-inf"))

    def _split_drafts(
        self,
        signal_TX: torch.Tensor,
        signed_TC: torch.Tensor,
        batch: StepBatch,
        fresh: FreshRows,
        state: SlotState,
    ) -> DraftDecisions:
        before_BC = (state.extreme_SC[batch.slots_B] * self._sign_C).nan_to_num_(
            float("-inf"), float("inf"), float("-inf")
        )
        sets_TN = signal_TX[:, self._set_signal_N]
        drafts = split_drafts(self._max_draft_tokens, sets_TN, signed_TC, before_BC, batch, fresh)
        signed_BKC = drafts.extremes_BKC
        extremes_BKC = (signed_BKC * self._sign_C).where(signed_BKC != float("-inf"), float("nan"))
        return drafts._replace(extremes_BKC=extremes_BKC.to(torch.float32))

    def _keep_extremes(self, signed_TC: torch.Tensor, fresh: FreshRows, state: SlotState) -> None:
        signed_SC = (state.extreme_SC * self._sign_C).nan_to_num_(
            float("-inf"), float("inf"), float("-inf")
        )
        signed_SC.scatter_reduce_(0, fresh.slot_T[:, None].expand_as(signed_TC), signed_TC, "amax")
        state.extreme_SC.copy_(
            (signed_SC * self._sign_C).where(signed_SC != float("-inf"), float("nan"))
        )


def _rule_of_condition(program: Program) -> torch.Tensor:
    rule_of_condition = torch.zeros(program.conditions.num_conditions, dtype=torch.int64)
    for rule, conditions in enumerate(program.rule_table.conditions):
        rule_of_condition[conditions[conditions >= 0]] = rule
    return rule_of_condition
