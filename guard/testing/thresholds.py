"""Cases at, just below and just above a rule's threshold, made so that the value there is exact.

A case is so many *units* (selections of the set, or tokens that use it together) laid over a window.
What must happen follows from the policy language's text: a value for each position, compared as whole
fractions, then persistence. It shares nothing with the evaluators that it is held against.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, NamedTuple

from guard.policy.model import (
    Comparison,
    Condition,
    ConditionKind,
    Expert,
    NamedWindow,
    Not,
    Phase,
    TogetherIn,
)
from guard.program.verdict import Routing
from guard.testing.experts import NamedRule, SuiteError
from guard.testing.tokens import MAX_DENOMINATOR, TokenMaker, even, routing_of

MAX_WINDOW: Final = 512
"""Tokens of a named window that is stretched so that its value can meet the threshold."""
MASS_STEPS: Final = 64
SAME: Final = 1e-9
"""Numbers behind a logarithm that are so near count as equal."""

_Value = Callable[[int | Fraction, int], Fraction | float]
"""The condition's number of so many units in a window of so many tokens; it rises with the units."""
_Lay = Callable[[Sequence[int]], Routing]


class ThresholdCase(NamedTuple):
    """fires: what must happen by the policy language's text alone."""

    name: str
    routing: Routing
    fires: bool


def threshold_cases(rule: NamedRule, condition: Condition, maker: TokenMaker) -> list[ThresholdCase]:
    """Raises SuiteError where they cannot be made exactly."""
    shape = _Shape.read(rule, condition)
    if condition.kind is ConditionKind.MASS:
        cases = list(_mass_cases(shape, condition, maker))
    else:
        cases = list(_unit_cases(shape, condition, maker))
    if not any(case.fires for case in cases) or all(case.fires for case in cases):
        found = "never fires" if not any(case.fires for case in cases) else "always fires"
        text = (
            f"{rule.name} {found} around its threshold of {condition.threshold:g} in a case that can "
            "be made exactly; write its cases yourself"
        )
        raise SuiteError("rule", text)
    return cases


@dataclass(frozen=True)
class _Shape:
    """When a condition is evaluated, and over which positions."""

    condition: Condition
    phase: Phase
    hits: int
    of: int
    negated: bool

    @staticmethod
    def read(rule: NamedRule, condition: Condition) -> _Shape:
        when, persist = rule.rule.when, rule.rule.persist
        negated = isinstance(when, Not)
        inner = when.child if isinstance(when, Not) else when
        if not isinstance(inner, Condition):
            text = f"{rule.name} joins several conditions; write its cases yourself"
            raise SuiteError("rule", text)
        if condition.kind is ConditionKind.ALWAYS:
            raise SuiteError("rule", f"{rule.name} is `always`: it has no threshold")
        if condition.kind.reads_distribution:
            text = (
                f"`{condition.kind}` reads how all experts are used, so no tokens meet its threshold "
                "exactly; write cases on each side of it"
            )
            raise SuiteError("rule", text)
        if condition.over is NamedWindow.OUTPUT and rule.rule.phase is Phase.PROMPT:
            raise SuiteError("rule", f"{rule.name} looks at the output only where there is none yet")
        moving = (NamedWindow.OUTPUT, NamedWindow.REQUEST)
        if persist.hits > 1 and condition.over in moving and condition.kind is not ConditionKind.MASS:
            text = (
                f"{rule.name} must hold {persist.hits} times; over {condition.over} its value moves "
                "with every token; write its cases yourself"
            )
            raise SuiteError("rule", text)
        return _Shape(condition, rule.rule.phase, persist.hits, persist.of, negated)

    @property
    def in_prompt(self) -> bool:
        """Whether the window's tokens stand in the prompt."""
        over = self.condition.over
        return over is NamedWindow.PROMPT or (
            over is not NamedWindow.OUTPUT and self.phase is not Phase.OUTPUT
        )

    def window(self, position: int, prompt: int) -> range:
        match self.condition.over:
            case NamedWindow.TOKEN:
                return range(position, position + 1)
            case NamedWindow.PROMPT:
                return range(prompt) if position >= prompt - 1 else range(0)
            case NamedWindow.OUTPUT:
                return range(prompt, position + 1)
            case NamedWindow.REQUEST:
                return range(position + 1)
            case int(length):
                start = prompt if self.phase is Phase.OUTPUT else 0
                return range(max(start, position - length + 1), position + 1)

    def evaluates(self, position: int, prompt: int) -> bool:
        if self.phase is Phase.ANY:
            return True
        return (position < prompt) == (self.phase is Phase.PROMPT)

    def fires(self, units: Sequence[int], prompt: int, value: _Value) -> bool:
        """units: of each position."""
        before = [0]
        for number in units:
            before.append(before[-1] + number)
        results: list[bool] = []
        for position in range(len(units)):
            if not self.evaluates(position, prompt):
                continue
            window = self.window(position, prompt)
            known = len(window) >= max(1, self.condition.min_tokens)
            holds = known and self.negated is not self._meets(
                value(before[window.stop] - before[window.start], len(window))
            )
            results.append(holds)
            if sum(results[-self.of :]) >= self.hits:
                return True
        return False

    def _meets(self, value: Fraction | float) -> bool:
        side = _side(value, self.condition)
        match self.condition.comparison:
            case Comparison.ABOVE:
                return side > 0
            case Comparison.AT_LEAST:
                return side >= 0
            case Comparison.BELOW:
                return side < 0
            case Comparison.AT_MOST:
                return side <= 0


def _side(value: Fraction | float, condition: Condition) -> int:
    """-1, 0 or 1: the value is below its threshold, at it or above it."""
    if isinstance(value, float):
        difference = value - condition.threshold
        return 0 if abs(difference) < SAME else 1 if difference > 0 else -1
    limit = Fraction(str(condition.threshold))
    return (value > limit) - (value < limit)


def _unit_cases(shape: _Shape, condition: Condition, maker: TokenMaker) -> Iterator[ThresholdCase]:
    for tokens in _window_sizes(condition):
        for units in _units(condition, maker):
            lowest, highest = units.fewest * tokens, units.most * tokens
            span = range(lowest, highest + 1)

            def value(number: int, tokens: int = tokens, units: _Units = units) -> float | Fraction:
                return units.value(number, tokens)

            first_at = bisect_left(span, 0, key=lambda number: _side(value(number), condition))
            first_above = bisect_right(span, 0, key=lambda number: _side(value(number), condition))
            found = {
                "just below": first_at - 1,
                "at": first_at if first_at < first_above else -1,
                "just above": first_above,
            }
            numbers = {name: span[n] for name, n in found.items() if 0 <= n < len(span)}
            try:
                cases = [_laid(shape, units, name, number, tokens) for name, number in numbers.items()]
            except SuiteError:  # too few experts are left to fill top-k
                continue
            if len(cases) >= 2 and len({case.fires for case in cases}) == 2:
                yield from cases
                return
    text = f"no number of selections lies on each side of {condition.threshold:g}"
    raise SuiteError("rule", f"{text}: write cases yourself, or see whether the rule can fire at all")


def _laid(shape: _Shape, units: _Units, name: str, number: int, tokens: int) -> ThresholdCase:
    """`number` units over a window; again and again while the rule must hold on."""
    more = shape.of - 1 if shape.of > 1 and shape.condition.over is not NamedWindow.PROMPT else 0
    after = shape.of if shape.condition.over is NamedWindow.PROMPT else 0
    upward = shape.condition.comparison.upward is not shape.negated
    pattern = even(number, tokens)
    if not upward:
        pattern.reverse()  # so that no first part of the window has less than its share
    pattern = [pattern[position % tokens] for position in range(tokens + more)]
    quiet = units.fewest
    if shape.in_prompt:
        per_token, prompt = [*pattern, *[quiet] * after], len(pattern)
        if shape.phase is Phase.OUTPUT and not after:
            per_token = [*per_token, quiet]
    else:
        whole = shape.condition.over is NamedWindow.REQUEST
        per_token, prompt = (pattern, 1) if whole else ([quiet, *pattern], 1)
        if len(per_token) == 1:
            per_token = [*per_token, quiet]
    fires = shape.fires(per_token, prompt, units.value)
    routing = units.lay(per_token)._replace(num_prompt_tokens=prompt)
    return ThresholdCase(name, routing, fires)


def _window_sizes(condition: Condition) -> list[int]:
    """Of a named window, one whose value can be the threshold comes first."""
    match condition.over:
        case NamedWindow.TOKEN:
            return [1]
        case int(length):
            return [length]
    fewest = max(1, condition.min_tokens)
    sizes = [fewest, *(2**n for n in range(3, 10)), *(5 * 2**n for n in range(1, 7))]
    meeting = []
    if condition.kind is ConditionKind.RATE:
        assert condition.experts is not None, "a rate has a set"
        step = Fraction(str(condition.threshold)) * len(condition.experts.weights)
        exact = step.denominator * -(-fewest // step.denominator)
        meeting = [exact] if exact <= MAX_WINDOW else []
    return list(dict.fromkeys(size for size in [*meeting, *sizes] if size >= fewest))


@dataclass(frozen=True)
class _Units:
    """fewest, most: of one token; lay: a number for each token -> routing"""

    fewest: int
    most: int
    value: _Value
    lay: _Lay


def _units(condition: Condition, maker: TokenMaker) -> Iterator[_Units]:
    """Ways to bring the condition's number up and down, the coarsest first."""
    assert condition.experts is not None, f"`{condition.kind}` reads a set"
    weights = {expert: Fraction(str(w)) for expert, w in condition.experts.weights.items()}
    everyone = maker.fitting(weights)
    match condition.kind:
        case ConditionKind.COACTIVATION:
            yield _together(condition, everyone, maker)
        case ConditionKind.SCORE | ConditionKind.PROBE:
            for weight in sorted(set(weights.values()), key=abs, reverse=True):
                if weight:
                    equal = [expert for expert in everyone if weights[expert] == weight]
                    yield _selections(_weighted(condition, weight), equal, everyone, maker)
            yield _swaps(condition, weights, maker)
        case ConditionKind.SUPPRESSED:
            yield _selections(_suppressed(condition, everyone), everyone, everyone, maker)
        case ConditionKind.RATE:
            size = len(everyone)
            yield _selections(lambda n, tokens: Fraction(n, tokens * size), everyone, everyone, maker)
        case _:
            yield _selections(lambda n, tokens: Fraction(n), everyone, everyone, maker)


def _weighted(condition: Condition, weight: Fraction) -> _Value:
    bias = Fraction(str(condition.bias))

    def value(number: int | Fraction, tokens: int) -> Fraction | float:
        score = weight * number / tokens + bias
        if condition.kind is ConditionKind.SCORE:
            return score
        return 1 / (1 + math.exp(-float(score)))

    return value


def _swaps(condition: Condition, weights: dict[Expert, Fraction], maker: TokenMaker) -> _Units:
    """Where weights leave no experts to fill with: tokens of two kinds, one step apart on the way from
    the experts of the least weights to those of the greatest, between which the threshold lies."""
    layers = maker.topology.layers
    in_order = [
        sorted(
            range(layer.num_experts),
            key=_weight_in(weights, layer.number),
        )
        for layer in layers
    ]
    kinds = [[ids[: layer.top_k] for ids, layer in zip(in_order, layers, strict=True)]]
    for index, (ids, layer) in enumerate(zip(in_order, layers, strict=True)):
        for start in range(1, layer.num_experts - layer.top_k + 1):
            kind = [*kinds[-1]]
            kind[index] = ids[start : start + layer.top_k]
            kinds.append(kind)
    scores = [
        sum(
            (
                weights.get(Expert(layer.number, id_), Fraction(0))
                for layer, ids in zip(layers, kind, strict=True)
                for id_ in ids
            ),
            Fraction(0),
        )
        for kind in kinds
    ]
    weighted = _weighted(condition, Fraction(1))
    sides = [_side(weighted(score, 1), condition) for score in scores]
    above = min(max(1, bisect_left(sides, 1)), len(kinds) - 1)
    low, high = scores[above - 1], scores[above]

    def value(number: int | Fraction, tokens: int) -> Fraction | float:
        return weighted(low * (tokens - number) + high * number, tokens)

    def lay(per_token: Sequence[int]) -> Routing:
        return routing_of([maker.fill([kinds[above - 1 + number] for number in per_token])], [])

    return _Units(0, 1, value, lay)


def _weight_in(weights: Mapping[Expert, Fraction], layer: int) -> Callable[[int], Fraction]:
    return lambda id_: weights.get(Expert(layer, id_), Fraction(0))


def _suppressed(condition: Condition, experts: Sequence[Expert]) -> _Value:
    baselines = condition.baselines
    assert baselines is not None, "`suppressed` has a profile"
    size = len(experts)
    baseline = sum(baselines.rate(expert) for expert in experts) / size

    def value(number: int | Fraction, tokens: int) -> float:
        smallest = 0.5 / (tokens * size)
        return math.log((baseline + smallest) / (number / (tokens * size) + smallest))

    return value


def _selections(
    value: _Value, used: Sequence[Expert], avoided: Sequence[Expert], maker: TokenMaker
) -> _Units:
    """Selections of the used experts; none of the avoided fills the rest. A number that falls with
    them is counted from the most that a window can have."""
    fewest, most = maker.bounds(used)
    falls = value(most, 1) < value(fewest, 1)

    def counted(number: int | Fraction, tokens: int) -> Fraction | float:
        return value((most * tokens - number) + fewest * tokens if falls else number, tokens)

    def lay(per_token: Sequence[int]) -> Routing:
        numbers = [most + fewest - number for number in per_token] if falls else per_token
        return routing_of([maker.fill(maker.spread(used, numbers), avoided)], [])

    return _Units(fewest, most, counted, lay)


def _together(condition: Condition, experts: Sequence[Expert], maker: TokenMaker) -> _Units:
    """Tokens that use just enough of the set together; the others use one member, or layer, less."""
    together = condition.together
    assert together is not None, "`coactivation` says how much of the set"
    chosen: Sequence[Expert] = experts
    if together.of is TogetherIn.LAYERS:
        first_of_layer = {expert.layer: expert for expert in reversed(experts)}
        chosen = sorted(first_of_layer.values())
    fewest, most = maker.bounds(chosen)
    if not fewest < together.least <= most:
        text = f"a token can use from {fewest} to {most} of the set together, not {together.least}"
        raise SuiteError("rule", text)

    def lay(per_token: Sequence[int]) -> Routing:
        numbers = [together.least - (not number) for number in per_token]
        return routing_of([maker.fill(maker.spread(chosen, numbers), experts)], [])

    return _Units(0, 1, lambda number, tokens: Fraction(number), lay)


def _constant(number: Fraction) -> _Value:
    return lambda units, tokens: number


def _mass_cases(shape: _Shape, condition: Condition, maker: TokenMaker) -> Iterator[ThresholdCase]:
    """Every token has the share of gate weight that is asked for, so every window has it."""
    assert condition.experts is not None, "`mass` reads a set"
    limit = Fraction(str(condition.threshold))
    step = Fraction(1, limit.denominator * MASS_STEPS)
    if step.denominator > MAX_DENOMINATOR:
        text = f"{condition.threshold!r} has too many digits to be met exactly; give at most four"
        raise SuiteError("rule", text)
    tokens = condition.over if isinstance(condition.over, int) else condition.min_tokens
    length = max(tokens, condition.min_tokens) + shape.of
    experts = maker.fitting(condition.experts.weights)
    for name, share in (("just below", limit - step), ("at", limit), ("just above", limit + step)):
        if 0 < share <= 1:
            made = maker.with_share(experts, 2 * length, share)
            routing = routing_of([made], [])._replace(num_prompt_tokens=length)
            fires = shape.fires([1] * 2 * length, length, _constant(share))
            yield ThresholdCase(name, routing, fires)
