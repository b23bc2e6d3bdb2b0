"""Which values a condition can have, and which of them its threshold takes.

Bounds hold for every routing of the model, masked or not: a mask can only take experts away. They
are rounded as the evaluator rounds a value that meets its threshold, so that at a bound both agree.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from guard.policy.lint.model_shape import ModelShape
from guard.policy.model import (
    Comparison,
    Condition,
    ConditionKind,
    Expert,
    NamedWindow,
    TogetherIn,
)

ROUNDING: Final = 1e-6
"""What a value behind a logarithm or an exponential may be off, for a bound that is not exact."""

_WHOLE: Final = (ConditionKind.COUNT, ConditionKind.COACTIVATION, ConditionKind.DORMANT)


@dataclass(frozen=True, slots=True)
class Interval:
    """Numbers from `low` to `high`; an open end is not among them."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    @property
    def is_empty(self) -> bool:
        return self.low > self.high or (
            self.low == self.high and (self.low_open or self.high_open) and math.isfinite(self.low)
        )

    def __and__(self, other: Interval) -> Interval:
        low, low_open = max((self.low, self.low_open), (other.low, other.low_open))
        high = min(self.high, other.high)
        high_open = any(part.high_open for part in (self, other) if part.high == high)
        return Interval(low, high, low_open, high_open)

    def whole(self) -> Interval:
        """The whole numbers among them, from the first to the last."""
        low, high = self.low, self.high
        if math.isfinite(low):
            low = math.floor(low) + 1 if self.low_open else math.ceil(low)
        if math.isfinite(high):
            high = math.ceil(high) - 1 if self.high_open else math.floor(high)
        return Interval(low, high)


@dataclass(frozen=True, slots=True)
class Values:
    """All values of a condition, its bias taken off, and in words where they end."""

    interval: Interval
    words: str


def is_whole(condition: Condition) -> bool:
    return condition.kind in _WHOLE


def most_tokens(condition: Condition) -> int | None:
    """Of its window; None for a named window, which grows with the request."""
    match condition.over:
        case NamedWindow.TOKEN:
            return 1
        case int(tokens):
            return tokens
        case _:
            return None


def taken(condition: Condition, negated: bool = False) -> Interval:
    """The values, bias taken off, for which the condition is true, or false if `negated`."""
    bias = Fraction(0) if condition.kind is ConditionKind.PROBE else Fraction(str(condition.bias))
    limit = float(Fraction(str(condition.threshold)) - bias)
    upward = condition.comparison.upward is not negated
    is_open = condition.comparison.strict is not negated
    if upward:
        return Interval(low=limit, low_open=is_open)
    return Interval(high=limit, high_open=is_open)


def values(condition: Condition, shape: ModelShape) -> Values:
    match condition.kind:
        case ConditionKind.COUNT | ConditionKind.DORMANT | ConditionKind.COACTIVATION:
            return _counted(condition, shape)
        case ConditionKind.RATE:
            chosen, size = _most_chosen(condition, shape), len(_weights(condition))
            most = Fraction(chosen, size)
            why = f", as a token can choose {chosen} of its {size} experts" if most < 1 else ""
            return Values(Interval(0.0, float(most)), f"a rate is 0 to {float(most):g}{why}")
        case ConditionKind.MASS:
            return Values(Interval(0.0, 1.0), "a mass is a share, 0 to 1")
        case ConditionKind.SCORE:
            low, high = _score(condition, shape)
            bias = Fraction(str(condition.bias))
            words = (
                f"this score is {float(low + bias):g} to {float(high + bias):g}, as a token's chosen "
                "experts can add up to no more"
            )
            return Values(Interval(float(low), float(high)), words)
        case ConditionKind.PROBE:
            least, most_likely = (
                _logistic(float(end) + condition.bias) for end in _score(condition, shape)
            )
            words = f"with its weights the probe is {least:.4g} to {most_likely:.4g}"
            ends = (max(0.0, least - ROUNDING), min(1.0, most_likely + ROUNDING))
            return Values(Interval(*ends), words)
        case ConditionKind.SUPPRESSED:
            return _suppressed(condition, shape)
        case ConditionKind.DIVERGENCE:
            return Values(Interval(0.0, math.log(2) + ROUNDING), "a divergence is 0 to ln 2, 0.693")
        case ConditionKind.ENTROPY | ConditionKind.CONCENTRATION:
            return _distribution(condition, shape)
        case ConditionKind.ALWAYS:
            return Values(Interval(), "")


def _weights(condition: Condition) -> dict[Expert, float]:
    assert condition.experts is not None, f"`{condition.kind}` reads a set"
    return dict(condition.experts.weights)


def _by_layer(weights: dict[Expert, float]) -> dict[int, list[float]]:
    layers: dict[int, list[float]] = defaultdict(list)
    for expert, weight in weights.items():
        layers[expert.layer].append(weight)
    return layers


def _at_once(size: int, top_k: int | None) -> int:
    return size if top_k is None else min(size, top_k)


def _most_chosen(condition: Condition, shape: ModelShape) -> int:
    """Experts of the set that one token can choose."""
    layers = _by_layer(_weights(condition))
    return sum(_at_once(len(layers[n]), shape.layer(n).top_k) for n in layers)


def _counted(condition: Condition, shape: ModelShape) -> Values:
    tokens, chosen = most_tokens(condition), _most_chosen(condition, shape)
    together = condition.together
    if together is not None:
        in_layers = together.of is TogetherIn.LAYERS
        available = len(_by_layer(_weights(condition))) if in_layers else chosen
        if together.least > available:
            what = "its set lies in" if in_layers else "a token can choose of its set"
            noun = "layers" if in_layers else "experts"
            words = f"it is always 0, as it asks for {together.least} {noun} and {what} {available}"
            return Values(Interval(0.0, 0.0), words)
        most = tokens
    else:
        most = None if tokens is None else tokens * chosen
    if most is None:
        return Values(Interval(low=0.0), "a count is at least 0")
    window = "one token" if tokens == 1 else f"a window of {tokens} tokens"
    return Values(Interval(0.0, float(most)), f"it is a whole number, 0 to {most} in {window}")


def _score(condition: Condition, shape: ModelShape) -> tuple[Fraction, Fraction]:
    """The least and the greatest sum of weights of one token, and so of a mean over tokens."""
    low = high = Fraction(0)
    for number, weights in _by_layer(_weights(condition)).items():
        exact = sorted(Fraction(str(weight)) for weight in weights)
        count = _at_once(len(exact), shape.layer(number).top_k)
        low += sum((weight for weight in exact[:count] if weight < 0), Fraction(0))
        high += sum((weight for weight in exact[-count:] if weight > 0), Fraction(0))
    return low, high


def _logistic(value: float) -> float:
    """Of no large argument: exp would overflow."""
    return 1 / (1 + math.exp(-max(-700.0, min(700.0, value))))


def _suppressed(condition: Condition, shape: ModelShape) -> Values:
    """ln((b+e)/(r+e)) rises with fewer selections; e = 0.5/(|W||F|) shrinks with the window."""
    assert condition.baselines is not None
    weights = _weights(condition)
    baseline = sum(condition.baselines.rate(expert) for expert in weights) / len(weights)
    greatest = _most_chosen(condition, shape) / len(weights)

    def value(tokens: float, rate: float) -> float:
        smoothing = 0.5 / (tokens * len(weights))
        return math.log((baseline + smoothing) / (rate + smoothing))

    # An endless window stands for one that grows with the request; both ends are monotone in it.
    longest = float(most_tokens(condition) or 10**12)
    windows = (float(condition.min_tokens), longest)
    low = min(value(tokens, greatest) for tokens in windows)
    high = math.inf if most_tokens(condition) is None else max(value(t, 0.0) for t in windows)
    if high == math.inf and baseline <= 0:
        high = 0.0
    end = "" if high == math.inf else f" to {high:.4g}"
    words = f"with this window and baseline it is {low:.4g}{end}" + ("" if end else " and more")
    return Values(Interval(low - ROUNDING, high + ROUNDING), words)


def _distribution(condition: Condition, shape: ModelShape) -> Values:
    """A mean, over layers that had any selections, of 1/Σp², from 1 to E, or of max p·E/k, from 1/k
    to E/k: shares of an even use are 1/E."""
    is_entropy = condition.kind is ConditionKind.ENTROPY
    layers = shape.all_layers()
    sizes = [layer.experts for layer in layers if layer.experts is not None]
    top_ks = [layer.top_k for layer in layers if layer.top_k is not None]
    known = len(sizes) == len(layers) and (is_entropy or len(top_ks) == len(layers))
    low, high = 1.0 if is_entropy else 0.0, math.inf
    if known:
        if not is_entropy:
            low = 1 / max(top_ks)
        per = [1] * len(sizes) if is_entropy else top_ks
        high = max(size / k for size, k in zip(sizes, per, strict=True))
    what = "effective experts are" if is_entropy else "a concentration is"
    end = f"to {high:g} in this model" if known else "or more"
    return Values(Interval(low - ROUNDING, high + ROUNDING), f"{what} {low:g} {end}")


def direction(condition: Condition, negated: bool) -> Comparison:
    """The comparison that holds where the condition is true, or false if `negated`."""
    opposite = {
        Comparison.ABOVE: Comparison.AT_MOST,
        Comparison.AT_LEAST: Comparison.BELOW,
        Comparison.BELOW: Comparison.AT_LEAST,
        Comparison.AT_MOST: Comparison.ABOVE,
    }
    return opposite[condition.comparison] if negated else condition.comparison
