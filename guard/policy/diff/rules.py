"""What changes in one rule, and in which requests it and an exception are for."""

from __future__ import annotations

from collections.abc import Iterator

from guard.policy.diff import wording
from guard.policy.diff.change import Effect, grown, joined
from guard.policy.diff.conditions import Step, expression_steps
from guard.policy.model import (
    Action,
    Block,
    Mask,
    Observe,
    OnError,
    Phase,
    PolicyException,
    RequestMatch,
    Rule,
)


def rule_steps(old: Rule, new: Rule) -> Iterator[Step]:
    yield from _action_steps(old.then, new.then)
    yield from expression_steps(old.when, new.when)
    if old.persist != new.persist:
        effects = {grown(new.persist.hits, old.persist.hits), grown(old.persist.of, new.persist.of)}
        text = (
            f"persist: {old.persist.hits} of {old.persist.of} → {new.persist.hits} of {new.persist.of}"
        )
        yield Step(joined(effects - {Effect.OTHER}), "persist", text)
    if old.phase is not new.phase:
        yield Step(_phase_effect(old, new), "phase", f"phase: {old.phase} → {new.phase}")
    if old.match != new.match:
        before, after = (wording.request_match(one.match) for one in (old, new))
        text = f"applies to {after} (was: {before})"
        yield Step(match_effect(old.match, new.match), "match", text)
    if old.on_error is not new.on_error:
        effect = Effect.STRICTER if new.on_error is OnError.CLOSED else Effect.LOOSER
        yield Step(effect, "onError", f"onError: {old.on_error} → {new.on_error}")


def match_effect(old: RequestMatch, new: RequestMatch) -> Effect:
    """Stricter where it takes in more requests."""
    effects = set()
    if old.sample != new.sample:
        effects.add(grown(old.sample, new.sample))
    if old.lora_adapters != new.lora_adapters:
        effects.add(_wider(old.lora_adapters, new.lora_adapters))
    for name in old.labels.keys() | new.labels.keys():
        before, after = old.labels.get(name), new.labels.get(name)
        if before != after:
            effects.add(_wider(before, after))
    return joined(effects)


def exception_steps(old: PolicyException, new: PolicyException) -> Iterator[Step]:
    if old.until != new.until:
        before, after = (one.until or "for good" for one in (old, new))
        longer = new.until is None or (old.until is not None and new.until > old.until)
        word = "extended" if longer else "shortened"
        effect = Effect.LOOSER if longer else Effect.STRICTER
        yield Step(effect, "until", f"exception {word}: until {before} → {after}")
    if old.match != new.match:
        whom, before_whom = (wording.request_match(one.match) for one in (new, old))
        text = f"exception for {whom} (was: {before_whom})"
        yield Step(match_effect(old.match, new.match).reversed, "match", text)
    if old.rules != new.rules:
        before, after = (", ".join(sorted(one.rules)) or "all" for one in (old, new))
        effect = _wider(old.rules or None, new.rules or None).reversed
        yield Step(effect, "rules", f"exception covers rules: {before} → {after}")


def _wider(old: frozenset[str] | None, new: frozenset[str] | None) -> Effect:
    """None is everything."""
    if new is None or (old is not None and old < new):
        return Effect.STRICTER
    if old is None or new < old:
        return Effect.LOOSER
    return Effect.OTHER


def _action_steps(old: Action, new: Action) -> Iterator[Step]:
    rank = {Observe: 0, Mask: 1, Block: 2}
    before, after = rank[type(old)], rank[type(new)]
    if before != after:
        text = f"now {wording.action(new)}"
        if before:
            text += f", and no longer {wording.action(old)}"
        yield Step(grown(before, after), "action", text)
        return
    match old, new:
        case Mask(), Mask():
            yield from _mask_steps(old, new)
        case Block(), Block() if old.message != new.message:
            text = f"block message: {old.message!r} → {new.message!r}"
            yield Step(Effect.OTHER, "message", text)
        case _:
            pass


def _mask_steps(old: Mask, new: Mask) -> Iterator[Step]:
    if old.method is not new.method:
        text = f"mask method: {old.method} → {new.method}"
        yield Step(Effect.OTHER, "method", text)
    if old.until != new.until:
        effect = Effect.OTHER
        if old.until == "request-end" or new.until == "request-end":
            effect = Effect.STRICTER if new.until == "request-end" else Effect.LOOSER
        elif isinstance(old.until, int) and isinstance(new.until, int):
            effect = grown(old.until, new.until)
        text = f"mask until: {wording.until(old.until)} → {wording.until(new.until)}"
        yield Step(effect, "until", text)
    if old.experts.name != new.experts.name:
        gained = new.experts.weights.keys() - old.experts.weights.keys()
        lost = old.experts.weights.keys() - new.experts.weights.keys()
        effects = {Effect.STRICTER} if gained else set()
        effects |= {Effect.LOOSER} if lost else set()
        also = [
            f"{verb} {wording.by_layer(experts)}"
            for verb, experts in (("also", gained), ("no longer", lost))
            if experts
        ]
        text = f"masks {new.experts.name} (was: {old.experts.name}): " + (
            "; ".join(also) or "the same experts"
        )
        yield Step(joined(effects), "experts", text)


def _phase_effect(old: Rule, new: Rule) -> Effect:
    """A phase less is looser, unless numeric windows then hold other tokens."""
    numeric = any(type(c.over) is int for c in (*old.conditions(), *new.conditions()))
    if numeric or Phase.ANY not in (old.phase, new.phase):
        return Effect.OTHER
    return Effect.STRICTER if new.phase is Phase.ANY else Effect.LOOSER
