"""From readings to truth: conditions, their trees, and whether a rule's result holds."""

from __future__ import annotations

from typing import NamedTuple

import torch

from guard.program.distribution_table import DistributionTable
from guard.program.program import ConditionTable, ExpressionTable, Floats, Transform

FALSE, UNKNOWN, TRUE = 0, 1, 2


class ConditionValues(NamedTuple):
    """value_TC: float64, NaN where unknown; truth_TC: int8 of FALSE, UNKNOWN, TRUE."""

    value_TC: torch.Tensor
    truth_TC: torch.Tensor


class ConditionEvaluator:
    """value = transform(numerator / denominator + bias), compared with the threshold, in float64."""

    def __init__(
        self,
        table: ConditionTable,
        distributions: DistributionTable,
        scale_M: Floats,
        device: torch.device,
    ) -> None:
        """scale_M: [M] what a reading's whole number is divided by."""

        def put(array: object) -> torch.Tensor:
            return torch.as_tensor(array, device=device)

        self._numerator = put(table.numerator)
        self._tokens = put(table.tokens)
        self._has_mass = bool((table.mass_denominator >= 0).any())
        self._mass = put(table.mass_denominator)
        scale_C = scale_M[table.numerator]
        self._offset = put(table.offset * scale_C)
        self._per_token = put(table.per_token * scale_C)
        self._constant = put(table.constant * scale_C)
        self._bias = put(table.bias)
        self._min_tokens = put(table.min_tokens.clip(min=1))
        limit_C = table.limit * table.sign
        self._highest_met = put(limit_C + table.tolerance)
        self._lowest_met = put(limit_C - table.tolerance)
        self._distribution_D = put(distributions.condition)
        self._is_log = put(table.transform == Transform.NEGATIVE_LOG)
        self._is_logistic = put(table.transform == Transform.LOGISTIC)
        self._transforms = bool(table.transform.any())
        self._sign = put(table.sign)
        self._strict = put(table.strict)
        self._always = put(table.always)

    def evaluate(
        self, reading_TM: torch.Tensor, distribution_TD: torch.Tensor | None = None
    ) -> ConditionValues:
        """distribution_TD: what the conditions on distributions are compared by; NaN where unknown"""
        tokens_TC = reading_TM[:, self._tokens]
        denominator_TC = tokens_TC * self._per_token + self._constant
        if self._has_mass:
            mass_TC = reading_TM[:, self._mass.clamp(min=0)].to(torch.float64)
            denominator_TC = mass_TC.where(self._mass >= 0, denominator_TC)
        known_TC = (tokens_TC >= self._min_tokens) & (denominator_TC > 0)
        numerator_TC = reading_TM[:, self._numerator] + self._offset
        quotient_TC = numerator_TC / denominator_TC.where(known_TC, 1.0)
        if self._transforms:
            quotient_TC = torch.where(self._is_log, -quotient_TC.log(), quotient_TC)
        if distribution_TD is not None:
            known_TC[:, self._distribution_D] &= ~distribution_TD.isnan()
            quotient_TC[:, self._distribution_D] = distribution_TD
        signed_TC = quotient_TC * self._sign
        holds_TC = torch.where(
            self._strict, signed_TC > self._highest_met, signed_TC >= self._lowest_met
        )
        truth_TC = (holds_TC.to(torch.int8) * TRUE).where(known_TC, UNKNOWN)
        value_TC = quotient_TC + self._bias
        if self._transforms:
            value_TC = torch.where(self._is_logistic, value_TC.sigmoid(), value_TC)
        value_TC = value_TC.where(known_TC, float("nan"))
        return ConditionValues(
            torch.where(self._always, 1.0, value_TC),
            truth_TC.where(~self._always, TRUE),
        )


class ExpressionEvaluator:
    """Kleene's all, any and not for every rule at once, a level of the trees at a time."""

    def __init__(self, table: ExpressionTable, device: torch.device) -> None:
        self._levels = [
            (
                torch.from_numpy(level.children).to(device),
                torch.from_numpy(level.negated).to(device),
            )
            for level in table.levels
        ]
        self._root = torch.from_numpy(table.root).to(device)
        self._root_negated = torch.from_numpy(table.root_negated).to(device)

    def holds(self, truth_TC: torch.Tensor) -> torch.Tensor:
        """bool [T, R]: the rule's expression is true; unknown is not."""
        true_T1 = torch.full_like(truth_TC[:, :1], TRUE) if truth_TC.shape[1] else None
        if true_T1 is None:
            return torch.zeros(
                (len(truth_TC), len(self._root)), dtype=torch.bool, device=truth_TC.device
            )
        columns = torch.cat([true_T1, truth_TC], dim=1)
        for children, negated in self._levels:
            values = columns[:, children]
            least = torch.where(negated, TRUE - values, values).amin(dim=-1)
            columns = torch.cat([columns, least], dim=1)
        root_TR = columns[:, self._root]
        return torch.where(self._root_negated, root_TR == FALSE, root_TR == TRUE)
