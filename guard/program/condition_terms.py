"""What a condition reads, and how its number comes of it.

F is the condition's expert set, W its window, |W| the tokens of it that were seen, S(t,l) the experts
chosen for token t in layer l, g their gate weights.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from guard.policy.model import Condition, ConditionKind, Phase, Rule
from guard.program.distribution_table import DistributionTable
from guard.program.distributions import DistributionBuilder
from guard.program.program import ConditionTable, Transform
from guard.program.signals import TOKENS, Signal, SignalBuilder
from guard.program.topology import Topology
from guard.program.verdict import CLOSE


class Terms(NamedTuple):
    """A row of `ConditionTable`, as far as the condition's kind decides it."""

    numerator: int
    tokens: int
    offset: float = 0.0
    mass_denominator: int = -1
    per_token: float = 0.0
    constant: float = 0.0
    transform: Transform = Transform.NONE


class ConditionBuilder:
    """Numbers a rule's conditions and lays them out; a condition's phase is its rule's."""

    def __init__(self, builder: SignalBuilder, topology: Topology) -> None:
        self._builder = builder
        self._distributions = DistributionBuilder(builder, topology)
        self._number_of: dict[int, int] = {}
        self._rows: list[tuple[Terms, Condition]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def number_of(self, condition: Condition) -> int:
        return self._number_of[id(condition)]

    def add_rule(self, rule: Rule) -> None:
        for condition in rule.conditions():
            number = self._number_of[id(condition)] = len(self._rows)
            if condition.kind.reads_distribution:
                self._distributions.add(number, condition, rule.phase)
            self._rows.append((self._terms(condition, rule.phase), condition))

    def _terms(self, condition: Condition, phase: Phase) -> Terms:
        """The formulas. Sources: the table of policy conditions that this product started from, and
        the papers that are named.

        count: Σ over W of chosen experts in F. rate: count / (|W|·|F|), the mean activation rate of
            SAFEx (arXiv 2506.17368) and SteerMoE (2509.09660). dormant: count, of experts that
            benign traffic hardly ever uses; after BadMoE (2504.18598), which plants its backdoor there
        mass: Σ g on F / Σ g over all chosen experts of F's layers
        score: (Σ w over W of chosen experts in F) / |W| + bias. probe: the same, of a linear probe on
            expert loads (RouteScan, 2605.24817), as the probability σ(score). Compared as
            score against ln(p/(1-p)): what meets its threshold on paper, at p = 1/2, meets it here
        coactivation: tokens of W in which at least so many members of F, or members of F in at least
            so many layers, were chosen together: one expert alone is ambiguous
        divergence, entropy, concentration: see `Statistic`; only |W| is read here
        suppressed: ln((b+e)/(r+e)), b the mean baseline rate of F's experts, r their rate in W and
            e = 0.5/(|W||F|); by |W||F|, and with B = Σ of the baseline rates,
            -ln((count + 0.5) / (B|W| + 0.5)). After RouteHijack (2605.02946), which keeps safety
            experts from being chosen
        """
        builder, over = self._builder, condition.over

        def reading(signal: Signal) -> int:
            return builder.reading(signal, over, phase)

        def counted(signal: Signal) -> tuple[int, int]:
            """The signal, and the tokens that it has seen."""
            return reading(signal), reading(builder.tokens_of(signal))

        if condition.kind.reads_distribution:
            tokens = reading(builder.tokens_of(self._distributions.source(over, phase)))
            return Terms(tokens, tokens, constant=1.0)
        if condition.kind is ConditionKind.ALWAYS:
            tokens = reading(TOKENS)
            return Terms(tokens, tokens, constant=1.0)
        assert condition.experts is not None, f"`{condition.kind}` reads an expert set"
        weights = condition.experts.weights
        match condition.kind:
            case ConditionKind.COUNT | ConditionKind.DORMANT:
                return Terms(*counted(builder.members(weights)), constant=1.0)
            case ConditionKind.RATE:
                members = builder.members(weights)
                return Terms(*counted(members), per_token=float(len(weights)))
            case ConditionKind.MASS:
                mass, everyone = builder.mass(weights)
                return Terms(*counted(mass), mass_denominator=reading(everyone))
            case ConditionKind.SCORE:
                return Terms(*counted(builder.unit(weights)), per_token=1.0)
            case ConditionKind.PROBE:
                score = builder.unit(weights)
                return Terms(*counted(score), per_token=1.0, transform=Transform.LOGISTIC)
            case ConditionKind.COACTIVATION:
                assert condition.together is not None, "`coactivation` says how much of F is together"
                together = builder.together(weights, condition.together)
                return Terms(*counted(together), constant=1.0)
            case ConditionKind.SUPPRESSED:
                assert condition.baselines is not None, "`suppressed` reads baselines"
                rates = [condition.baselines.rate(expert) for expert in weights]
                smoothing = 0.5 if rates else 0.0  # of no expert there is no rate: 0/0
                return Terms(
                    *counted(builder.members(weights)),
                    offset=smoothing,
                    per_token=math.fsum(rates),
                    constant=smoothing,
                    transform=Transform.NEGATIVE_LOG,
                )
            case _:
                raise AssertionError(f"{condition.kind} has no terms")

    def distributions(self) -> DistributionTable:
        """Raises PolicyError where requests would have to keep too much for them."""
        return self._distributions.table()

    def table(self) -> ConditionTable:
        terms, conditions = [t for t, _ in self._rows], [c for _, c in self._rows]
        limit = np.array([_limit(condition) for condition in conditions], dtype=np.float64)
        exact = np.array([_is_exact(condition.kind) for condition in conditions], dtype=np.bool_)
        return ConditionTable(
            numerator=np.array([t.numerator for t in terms], dtype=np.int64),
            tokens=np.array([t.tokens for t in terms], dtype=np.int64),
            offset=np.array([t.offset for t in terms], dtype=np.float64),
            mass_denominator=np.array([t.mass_denominator for t in terms], dtype=np.int64),
            per_token=np.array([t.per_token for t in terms], dtype=np.float64),
            constant=np.array([t.constant for t in terms], dtype=np.float64),
            bias=np.array([c.bias for c in conditions], dtype=np.float64),
            transform=np.array([t.transform for t in terms], dtype=np.int64),
            tolerance=np.where(exact, 0.0, CLOSE * np.maximum(1.0, np.abs(limit))),
            min_tokens=np.array([c.min_tokens for c in conditions], dtype=np.int64),
            limit=limit,
            sign=np.array([1.0 if c.comparison.upward else -1.0 for c in conditions], dtype=np.float64),
            strict=np.array([c.comparison.strict for c in conditions], dtype=np.bool_),
            always=np.array([c.kind is ConditionKind.ALWAYS for c in conditions], dtype=np.bool_),
        )


def _is_exact(kind: ConditionKind) -> bool:
    return kind is not ConditionKind.SUPPRESSED and not kind.reads_distribution


def _limit(condition: Condition) -> float:
    """What the quotient is compared with: the bias is taken off the threshold, in decimals."""
    if condition.kind is ConditionKind.PROBE:
        return logit(condition.threshold) - condition.bias
    return float(Fraction(str(condition.threshold)) - Fraction(str(condition.bias)))


def logit(probability: float) -> float:
    """ln(p/(1-p)); infinite where p is no probability that σ reaches."""
    if probability <= 0.0:
        return -math.inf
    if probability >= 1.0:
        return math.inf
    return math.log(probability / (1.0 - probability))
