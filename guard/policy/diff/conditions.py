"""What changes in when a rule fires."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from guard.policy.diff import wording
from guard.policy.diff.change import Effect, grown
from guard.policy.model import All, AnyOf, Condition, ConditionKind, Expression, Not


class Step(NamedTuple):
    effect: Effect
    what: str
    message: str


def expression_steps(old: Expression, new: Expression, *, negated: bool = False) -> Iterator[Step]:
    """How to come from one to the other: condition by condition where they have one shape."""
    if same(old, new):
        return
    match old, new:
        case Condition(), Condition() if old.kind is new.kind:
            yield from _condition_steps(old, new, negated)
        case Not(one), Not(other):
            yield from expression_steps(one, other, negated=not negated)
        case (All(ones), All(others)) | (AnyOf(ones), AnyOf(others)):
            if len(ones) == len(others) and all(map(_alike, ones, others)):
                for one, other in zip(ones, others, strict=True):
                    yield from expression_steps(one, other, negated=negated)
            else:
                yield _children_step(old, new, negated)
        case _:
            yield _whole(old, new, Effect.OTHER)


def same(old: Expression, new: Expression) -> bool:
    return key(old) == key(new)


def key(node: Expression) -> object:
    """Equal where two say the same of sets of the same names. Labels and places do not count."""
    match node:
        case Condition():
            return (
                *(node.kind, node.over, node.min_tokens, node.comparison, node.threshold),
                *(node.bias, node.together, node.reduce, node.budget),
                None if node.experts is None else node.experts.name,
            )
        case Not(child):
            return ("not", key(child))
        case All(children) | AnyOf(children):
            return (type(node).__name__, *map(key, children))


def _alike(old: Expression, new: Expression) -> bool:
    """They differ in numbers and names at most."""
    match old, new:
        case Condition(), Condition():
            return old.kind is new.kind
        case Not(one), Not(other):
            return _alike(one, other)
        case (All(ones), All(others)) | (AnyOf(ones), AnyOf(others)):
            return len(ones) == len(others) and all(map(_alike, ones, others))
        case _:
            return False


def _children_step(old: Expression, new: Expression, negated: bool) -> Step:
    """`all` with a condition more fires on less, `any` on more."""
    assert isinstance(old, All | AnyOf)
    assert isinstance(new, All | AnyOf)
    before, after = Counter(map(key, old.children)), Counter(map(key, new.children))
    effect = Effect.OTHER
    if before < after:
        effect = Effect.LOOSER if isinstance(old, All) else Effect.STRICTER
    elif after < before:
        effect = Effect.STRICTER if isinstance(old, All) else Effect.LOOSER
    return _whole(old, new, effect.reversed if negated else effect)


def _whole(old: Expression, new: Expression, effect: Effect) -> Step:
    words = f"fires when {wording.expression(new)} (was: {wording.expression(old)})"
    return Step(effect, "when", words)


def _condition_steps(old: Condition, new: Condition, negated: bool) -> Iterator[Step]:
    name = new.label
    names = [None if c.experts is None else c.experts.name for c in (old, new)]
    if names[0] != names[1]:
        equal = old.experts and new.experts and old.experts.weights == new.experts.weights
        note = ", the same experts" if equal else ""
        yield Step(Effect.OTHER, "set", f"`{name}` reads {names[1]} (was: {names[0]}){note}")
    if old.over != new.over:
        yield Step(Effect.OTHER, "window", f"`{name}` over: {old.over} → {new.over}")
    if old.min_tokens != new.min_tokens:
        # What is known sooner fires sooner, also under `not`.
        effect = grown(new.min_tokens, old.min_tokens) if old.over == new.over else Effect.OTHER
        text = f"`{name}` minTokens: {old.min_tokens} → {new.min_tokens}"
        yield Step(effect, "minTokens", text)
    if (old.comparison, old.threshold, old.budget) != (new.comparison, new.threshold, new.budget):
        yield _threshold_step(old, new, negated)
    if old.bias != new.bias and ConditionKind.PROBE not in (old.kind, new.kind):
        upward = grown(old.bias, new.bias) if new.comparison.upward else grown(new.bias, old.bias)
        text = f"`{name}` bias: {old.bias:g} → {new.bias:g}"
        yield Step(upward.reversed if negated else upward, "bias", text)
    elif old.bias != new.bias:
        yield Step(Effect.OTHER, "probe", f"`{name}` has another probe")
    if old.together != new.together and old.together and new.together:
        text = (
            f"`{name}` {old.together.of}: {old.together.least} → {new.together.of}: "
            f"{new.together.least}"
        )
        effect = Effect.OTHER
        if old.together.of is new.together.of:
            effect = grown(new.together.least, old.together.least)
            effect = effect if new.comparison.upward is not negated else effect.reversed
        yield Step(effect, "together", text)
    if old.reduce is not new.reduce:
        yield Step(Effect.OTHER, "reduce", f"`{name}` reduce: {old.reduce} → {new.reduce}")


def _threshold_step(old: Condition, new: Condition, negated: bool) -> Step:
    before, after = (_threshold(condition) for condition in (old, new))
    effect = Effect.OTHER
    if old.comparison.upward is new.comparison.upward:
        effect = grown(new.threshold, old.threshold)
        if not new.comparison.upward:
            effect = effect.reversed
        if old.threshold == new.threshold and old.comparison.strict is not new.comparison.strict:
            effect = Effect.LOOSER if new.comparison.strict else Effect.STRICTER
    effect = effect.reversed if negated else effect
    side = {Effect.STRICTER: ", tighter", Effect.LOOSER: ", looser"}.get(effect, "")
    return Step(effect, "threshold", f"`{new.label}` threshold: {before} → {after}{side}")


def _threshold(condition: Condition) -> str:
    budget = "" if condition.budget is None else f" (budget {condition.budget:g})"
    return f"{condition.comparison} {condition.threshold:g}{budget}"
