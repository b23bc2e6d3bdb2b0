"""Findings about a policy as a whole: its mode, its tests, its sets, its exceptions."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, timedelta
from typing import Final

from guard.policy.lint.finding import Code, Finding
from guard.policy.lint.masks import can_meet
from guard.policy.model import (
    Mask,
    Maturity,
    Mode,
    ModelRequirement,
    Observe,
    Policy,
    PolicyException,
)
from guard.policy.suggest import one_of

SOON: Final = timedelta(days=14)


def policy_findings(policy: Policy, today: date, *, tested: bool) -> Iterator[Finding]:
    """tested: a suite lies beside it"""
    yield from _mode_findings(policy, tested)
    yield from _set_findings(policy)
    yield from _model_findings(policy)
    for exception in policy.exceptions:
        yield from _exception_findings(policy, exception, today)


def _mode_findings(policy: Policy, tested: bool) -> Iterator[Finding]:
    if policy.mode is not Mode.ENFORCE:
        return
    if policy.maturity is Maturity.DEPRECATED:
        text = (
            f"policy {policy.name!r} is deprecated and still enforced; move to what replaces it, or "
            "set mode: audit"
        )
        yield Finding(policy.location, Code.DEPRECATED_ENFORCED, text)
    if all(isinstance(rule.then, Observe) for rule in policy.rules):
        text = (
            f"policy {policy.name!r} is enforced, but its rules only observe, so nothing is done about "
            "what it finds; give a rule a `then`, or set mode: audit"
        )
        yield Finding(policy.location, Code.ENFORCES_NOTHING, text)
    elif not tested:
        text = (
            f"policy {policy.name!r} is enforced without a test: write a suite of kind: PolicyTest "
            "beside it that shows what it stops and what it lets pass, and run `moe-guard test`"
        )
        yield Finding(policy.location, Code.UNTESTED, text)


def _set_findings(policy: Policy) -> Iterator[Finding]:
    used = {rule.then.experts.name for rule in policy.rules if isinstance(rule.then, Mask)}
    for rule in policy.rules:
        for condition in rule.conditions():
            if condition.experts is not None:
                used.add(condition.experts.name)
                used.add(condition.experts.name.partition(" of ")[2])  # what `dormant` is among
    for name, expert_set in policy.experts.items():
        if name not in used:
            text = (
                f"no rule of policy {policy.name!r} names the set {name!r}: its selections are counted "
                "as a metric and nothing else; use it in a rule or remove it"
            )
            yield Finding(expert_set.location, Code.UNUSED_SET, text)


def _model_findings(policy: Policy) -> Iterator[Finding]:
    """No model can be both what the policy asks for and what a profile was measured on."""
    said = [(f"policy {policy.name!r}", policy.model)] if policy.model else []
    for profile in policy.profiles:
        what = f"the profile {profile.location.file}"
        for other, before in said:
            if found := _difference(before, profile.model):
                key, one, two = found
                text = (
                    f"{other} is for a model with {key}: {one}, but {what} for one with {key}: {two}, "
                    "so no model fits both; name the profile of the model that is served"
                )
                yield Finding(profile.named_at, Code.MODEL_MISMATCH, text)
                break
        said.append((what, profile.model))


def _difference(one: ModelRequirement, other: ModelRequirement) -> tuple[str, object, object] | None:
    pairs = [
        ("architecture", one.architecture, other.architecture),
        ("layers", one.layers, other.layers),
        ("experts", one.experts, other.experts),
        ("topK", one.top_k, other.top_k),
    ]
    both = [pair for pair in pairs if pair[1] is not None and pair[2] is not None]
    return next((pair for pair in both if pair[1] != pair[2]), None)


def _exception_findings(policy: Policy, exception: PolicyException, today: date) -> Iterator[Finding]:
    what = f"exception {exception.name!r} of policy {policy.name!r}"
    if exception.is_expired(today):
        text = (
            f"{what} expired on {exception.until} and is not applied any more; remove it, or give it a "
            "later `until`"
        )
        yield Finding(exception.location, Code.EXPIRED_EXCEPTION, text)
        return
    if exception.until is not None and exception.until - today <= SOON:
        days = (exception.until - today).days
        text = (
            f"{what} expires on {exception.until}, {'today' if not days else f'in {days} day(s)'}: "
            "after that day its requests are treated like all others; extend it or tell whom it is for"
        )
        yield Finding(exception.location, Code.EXPIRING_EXCEPTION, text)
    covered = [rule for rule in policy.rules if exception.covers(rule.name)]
    acting = [rule for rule in covered if not isinstance(rule.then, Observe)]
    if not acting:
        names = one_of([rule.name for rule in covered], "and")
        text = (
            f"{what} withholds nothing, as {names} only observe{'s' if len(covered) == 1 else ''}; "
            "remove it, or name the rules that act"
        )
        yield Finding(exception.location, Code.IDLE_EXCEPTION, text)
    elif not any(can_meet(rule.match, exception.match) for rule in acting):
        text = (
            f"{what} is for requests that the `match` of its rules leaves out already; mend one of the "
            "two"
        )
        yield Finding(exception.location, Code.IDLE_EXCEPTION, text)
