"""Whether an expression can be true: its conditions as intervals of values, in every combination."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from guard.policy.lint.model_shape import ModelShape
from guard.policy.lint.values import Interval, direction, is_whole, taken, values
from guard.policy.model import (
    All,
    AnyOf,
    Condition,
    ConditionKind,
    Expression,
    NamedWindow,
    Not,
    Phase,
)

MAX_WAYS: Final = 256
"""Ways in which an expression may come true that are gone through; with more, nothing is said."""


class Literal(NamedTuple):
    """A condition that must be true, or, if `negated`, known to be false."""

    condition: Condition
    negated: bool

    def __str__(self) -> str:
        comparison = direction(self.condition, self.negated)
        return f"{self.condition.label} {comparison} {self.condition.threshold:g}"


Way = tuple[Literal, ...]
"""Literals that together make an expression true."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Where an expression is evaluated."""

    phase: Phase
    shape: ModelShape


class Reason(NamedTuple):
    """Why something cannot be, and the condition to look at."""

    condition: Condition
    text: str


def ways(node: Expression, *, negated: bool = False) -> list[Way] | None:
    """All ways in which it comes true, or false if `negated`; None if there are more than MAX_WAYS."""
    match node:
        case Condition():
            return [(Literal(node, negated),)]
        case Not(child):
            return ways(child, negated=not negated)
        case All(children) | AnyOf(children):
            parts = [ways(child, negated=negated) for child in children]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                return None
            if isinstance(node, AnyOf) is not negated:
                joined = [way for part in known for way in part]
            else:
                joined = [()]
                for part in known:
                    joined = [(*way, *more) for way in joined for more in part]
                    if len(joined) > MAX_WAYS:
                        return None
            return joined if len(joined) <= MAX_WAYS else None


def why_never(
    node: Expression, setting: Setting, *, negated: bool = False
) -> tuple[Reason, ...] | None:
    """Why it is never true, or if `negated` never false or unknown once all is known that can be: a
    reason for each way. None: it can be."""
    found = ways(node, negated=negated)
    if found is None:
        return None
    reasons = []
    for way in found:
        if negated:  # what is never known is not true either
            way = tuple(one for one in way if not why_unknown(one.condition, setting.phase))
        reason = why_not(way, setting)
        if reason is None:
            return None
        reasons.append(reason)
    return tuple(reasons)


def why_not(way: Way, setting: Setting) -> Reason | None:
    """Why its literals never hold together, if so."""
    for literal in way:
        if reason := _alone(literal, setting):
            return reason
    together: dict[object, Interval] = {}
    first: dict[object, list[Literal]] = defaultdict(list)
    for literal in way:
        if literal.condition.kind is ConditionKind.ALWAYS:
            continue
        key = measure_key(literal.condition)
        interval = together.get(key, Interval()) & taken(*literal)
        interval = interval.whole() if is_whole(literal.condition) else interval
        first[key].append(literal)
        if interval.is_empty:
            names = " and ".join(str(one) for one in first[key])
            return Reason(literal.condition, f"no value satisfies {names} at once")
        together[key] = interval
    return None


def why_unknown(condition: Condition, phase: Phase) -> str | None:
    """Why it is never known in the phase, if so."""
    if phase is Phase.PROMPT and condition.over is NamedWindow.OUTPUT:
        return "a rule of phase: prompt never sees a token of the output window"
    return None


def known_once(condition: Condition, phase: Phase) -> bool:
    """In the phase it is known at one position only, the prompt's last."""
    return phase is Phase.PROMPT and (
        condition.over is NamedWindow.PROMPT or condition.kind.reads_distribution
    )


def measure_key(condition: Condition) -> object:
    """Conditions of one rule with an equal key have an equal value, the bias aside."""
    experts = condition.experts
    return (
        condition.kind,
        condition.over,
        condition.together,
        condition.reduce,
        condition.bias if condition.kind is ConditionKind.PROBE else 0.0,
        None if experts is None else frozenset(experts.weights.items()),
        condition.baselines and tuple(sorted(condition.baselines.rates.items())),
    )


def conditions(node: Expression) -> Iterator[Condition]:
    match node:
        case Condition():
            yield node
        case Not(child):
            yield from conditions(child)
        case All(children) | AnyOf(children):
            for child in children:
                yield from conditions(child)


def _alone(literal: Literal, setting: Setting) -> Reason | None:
    condition = literal.condition
    if condition.kind is ConditionKind.ALWAYS:
        return Reason(condition, "`always` is never false") if literal.negated else None
    if text := why_unknown(condition, setting.phase):
        return Reason(condition, text)
    possible = values(condition, setting.shape)
    both = possible.interval & taken(*literal)
    if (both.whole() if is_whole(condition) else both).is_empty:
        return Reason(condition, f"it asks for {literal}, but {possible.words}")
    return None
