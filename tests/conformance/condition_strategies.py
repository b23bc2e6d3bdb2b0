"""Conditions of every kind, with thresholds that their values are likely to meet exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from hypothesis import strategies as st

from guard.policy.fault import Location
from guard.policy.model import (
    Baselines,
    Comparison,
    Condition,
    ConditionKind,
    ExpertSet,
    NamedWindow,
    Reduce,
    Together,
    TogetherIn,
    Window,
)
from guard.program.topology import Topology
from tests.conformance.drawing import GATE_NUMERATORS, WEIGHTS, digits, pick

LOCATION = Location("policies.yaml", 1, 1)
BASELINE_RATES = (0.5, 0.25, 1.0, 0.0, 0.1, 0.75)
PROBABILITIES = (0.5, 0.5, 0.5, 0.25, 0.6, 0.9, 0.01)
CONDITION_KINDS = [
    ConditionKind.ALWAYS,
    *[ConditionKind.COUNT, ConditionKind.RATE, ConditionKind.MASS, ConditionKind.SCORE] * 3,
    *[ConditionKind.COACTIVATION, ConditionKind.SUPPRESSED] * 2,
    ConditionKind.DORMANT,
    ConditionKind.PROBE,
    *[ConditionKind.DIVERGENCE, ConditionKind.ENTROPY, ConditionKind.CONCENTRATION] * 2,
]
COUNTING = (ConditionKind.COUNT, ConditionKind.COACTIVATION, ConditionKind.DORMANT)
WINDOWS: list[Window] = [*NamedWindow, *[NamedWindow.TOKEN] * 4, 1, 2, 2, 3, 3, 4, 6, 9, 30]


def condition(draw: st.DrawFn, topology: Topology, experts: Sequence[ExpertSet]) -> Condition:
    kind = pick(draw, CONDITION_KINDS)
    if kind is ConditionKind.ALWAYS:
        return Condition(kind, kind, LOCATION)
    expert_set, over = pick(draw, experts), pick(draw, WINDOWS)
    comparison = pick(draw, Comparison)
    default_floor = 1
    if isinstance(over, int) and not (kind in COUNTING and comparison.upward):
        default_floor = over
    highest_floor = min(over, 5) if isinstance(over, int) else 5
    has_bias = kind in (ConditionKind.SCORE, ConditionKind.PROBE)
    bias = pick(draw, WEIGHTS) if has_bias else 0.0
    has_baselines = kind in (ConditionKind.SUPPRESSED, ConditionKind.DIVERGENCE)
    baselines = _baselines(draw, topology) if has_baselines else None
    together = _together(draw, topology) if kind is ConditionKind.COACTIVATION else None
    return Condition(
        kind,
        kind,
        LOCATION,
        experts=None if kind.reads_distribution else expert_set,
        over=over,
        min_tokens=pick(draw, [default_floor, *range(1, highest_floor + 1)]),
        comparison=comparison,
        threshold=_threshold(draw, topology, kind, expert_set, over, bias, baselines),
        bias=bias,
        together=together,
        baselines=baselines,
        reduce=pick(draw, Reduce) if kind is ConditionKind.DIVERGENCE else Reduce.MAX,
    )


def _together(draw: st.DrawFn, topology: Topology) -> Together:
    return Together(draw(st.integers(1, 1 + len(topology.layers))), pick(draw, TogetherIn))


def _baselines(draw: st.DrawFn, topology: Topology) -> Baselines:
    """Of every expert; those of a layer need not add up to its top-k."""
    rates = {}
    for layer in topology.layers:
        choices = digits(draw, [len(BASELINE_RATES)] * layer.num_experts)
        rates[layer.number] = tuple(BASELINE_RATES[choice] for choice in choices)
    return Baselines(None, rates)


def _threshold(
    draw: st.DrawFn,
    topology: Topology,
    kind: ConditionKind,
    experts: ExpertSet,
    over: Window,
    bias: float,
    baselines: Baselines | None,
) -> float:
    """A number that the condition's value is likely to meet exactly, rounded as the value is."""
    num_tokens = over if isinstance(over, int) else 1 if over == "token" else draw(st.integers(1, 4))
    match kind:
        case ConditionKind.COUNT | ConditionKind.DORMANT | ConditionKind.COACTIVATION:
            return float(pick(draw, [1, 0, 2, *range(3, num_tokens + 2)]))
        case ConditionKind.RATE:
            selections = pick(draw, [1, 0, *range(2, num_tokens + 2)])
            return float(Fraction(selections, num_tokens * len(experts.weights)))
        case ConditionKind.MASS:
            if draw(st.booleans()):
                return pick(draw, [0.5, 1 / 3, 2 / 3, 0.25, 0.0, 1.0])
            inside = pick(draw, GATE_NUMERATORS)
            return float(Fraction(inside, inside + pick(draw, GATE_NUMERATORS)))
        case ConditionKind.SCORE:
            weights = [Fraction(str(weight)) for weight in experts.weights.values()]
            num_chosen = draw(st.integers(0, 2))
            total = sum((pick(draw, weights) for _ in range(num_chosen)), start=Fraction(0))
            return float(total / num_tokens + Fraction(str(bias)))
        case ConditionKind.PROBE:
            return pick(draw, PROBABILITIES)
        case ConditionKind.SUPPRESSED:
            assert baselines is not None
            selections = draw(st.integers(0, num_tokens))
            expected = sum(map(baselines.rate, experts.weights)) * num_tokens
            return pick(draw, [0.0, math.log((expected + 0.5) / (selections + 0.5))])
        case ConditionKind.ENTROPY:  # of so many experts, of which as many were chosen equally often
            return float(Fraction(pick(draw, [4, 2, 3, 6, 8]), pick(draw, [2, 1, 3])))
        case ConditionKind.CONCENTRATION:
            layer = pick(draw, topology.layers)
            share = Fraction(1, pick(draw, [1, 2, 3, layer.top_k]))
            return float(share * layer.num_experts / layer.top_k)
        case ConditionKind.DIVERGENCE:
            return pick(draw, [0.0, 0.1, 0.2, 0.3, 0.5, math.log(2)])
        case ConditionKind.ALWAYS:
            raise AssertionError("`always` has no threshold")
