"""What changes in effect between two policy sets, for whoever reviews the change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from guard.policy.diff import wording
from guard.policy.diff.change import Change, Effect, grown, joined
from guard.policy.diff.conditions import key
from guard.policy.diff.rules import exception_steps, rule_steps
from guard.policy.model import (
    ConditionKind,
    ExpertSet,
    Mask,
    MaskMethod,
    Mode,
    Policy,
    PolicySet,
    Rule,
)
from guard.policy.revision import revision_of

__all__ = ["Change", "Effect", "compare"]


def compare(old: PolicySet, new: PolicySet) -> list[Change]:
    """Every change, stricter ones first; none where both have one revision."""
    if old.revision == new.revision:
        return []
    changes = list(_policy_set_changes(old, new))
    if not changes:
        text = "its content has changed, though none of its rules, sets and exceptions"
        changes = [Change(Effect.OTHER, "", "", "content", text)]
    order = list(Effect)
    return sorted(changes, key=lambda change: (order.index(change.effect), change.policy))


def _policy_set_changes(old: PolicySet, new: PolicySet) -> Iterator[Change]:
    before = {policy.name: policy for policy in old.policies}
    after = {policy.name: policy for policy in new.policies}
    gone = [policy for name, policy in before.items() if name not in after]
    come = [policy for name, policy in after.items() if name not in before]
    for policy in gone[:]:
        renamed = next((one for one in come if _content(one) == _content(policy)), None)
        if renamed is not None:
            gone.remove(policy)
            come.remove(renamed)
            text = f"renamed from {policy.name}; its content is the same"
            yield Change(Effect.OTHER, renamed.name, "", "renamed", text)
    for policy in gone:
        acts = _acts(policy)
        text = f"policy removed (it was {policy.mode}): no longer {wording.acts(policy)}"
        yield Change(Effect.LOOSER if acts else Effect.OTHER, policy.name, "", "removed", text)
    for policy in come:
        acts = _acts(policy)
        text = f"policy added ({policy.mode}): {wording.acts(policy)}{wording.withheld(policy.mode)}"
        yield Change(Effect.STRICTER if acts else Effect.OTHER, policy.name, "", "added", text)
    for name in sorted(before.keys() & after.keys()):
        yield from _policy_changes(before[name], after[name])


def _content(policy: Policy) -> str:
    """A digest of the policy under no name."""
    return revision_of([replace(policy, name="")])


def _acts(policy: Policy) -> bool:
    """It finds something, or does."""
    return policy.mode is not Mode.OFF and bool(policy.rules)


def _policy_changes(old: Policy, new: Policy) -> Iterator[Change]:
    def change(effect: Effect, what: str, message: str, rule: str = "") -> Change:
        return Change(effect, new.name, rule, what, message)

    if old.mode is not new.mode:
        modes = list(Mode)
        effect = grown(modes.index(old.mode), modes.index(new.mode))
        text = f"mode: {old.mode} → {new.mode}: {wording.acts(new)}{wording.withheld(new.mode)}"
        yield change(effect, "mode", text)
    for what, before, after in [
        ("severity", old.severity.value, new.severity.value),
        ("maturity", old.maturity.value, new.maturity.value),
        ("description", repr(old.description), repr(new.description)),
        ("labels", _labels(old), _labels(new)),
        ("model", _model(old), _model(new)),
    ]:
        if before != after:
            yield change(Effect.OTHER, what, f"{what}: {before} → {after}")
    if [p.digest for p in old.profiles] != [p.digest for p in new.profiles]:
        names = ", ".join(profile.location.file for profile in new.profiles) or "none"
        text = f"another profile, or another content of it: now {names}"
        yield change(Effect.OTHER, "profile", text)
    yield from _set_changes(old, new)
    yield from _rule_changes(old, new)
    yield from _exception_changes(old, new)


def _labels(policy: Policy) -> str:
    return ", ".join(f"{k}={v}" for k, v in sorted(policy.labels.items())) or "none"


def _model(policy: Policy) -> str:
    if policy.model is None:
        return "any"
    model = policy.model
    said = {
        "architecture": model.architecture,
        "layers": model.layers,
        "experts": model.experts,
        "topK": model.top_k,
    }
    return ", ".join(f"{name}: {value}" for name, value in said.items() if value is not None) or "any"


def _rule_changes(old: Policy, new: Policy) -> Iterator[Change]:
    before = {rule.name: rule for rule in old.rules}
    after = {rule.name: rule for rule in new.rules}
    gone = [rule for name, rule in before.items() if name not in after]
    come = [rule for name, rule in after.items() if name not in before]
    renamed: dict[str, str] = {}
    for rule in gone[:]:
        same = next((one for one in come if not list(rule_steps(rule, one))), None)
        if same is not None:
            gone.remove(rule)
            come.remove(same)
            renamed[rule.name] = same.name
            text = f"rule renamed from {rule.name}; it says the same"
            yield Change(Effect.OTHER, new.name, same.name, "renamed", text)
    for rule in gone:
        yield _rule_change(
            new,
            rule,
            "removed",
            Effect.OTHER if old.mode is Mode.OFF else Effect.LOOSER,
            f"rule removed: no longer {_does(rule)}",
        )
    for rule in come:
        text = f"rule added: {_does(rule)}{wording.withheld(new.mode)}"
        effect = Effect.OTHER if new.mode is Mode.OFF else Effect.STRICTER
        yield _rule_change(new, rule, "added", effect, text)
    for name in (name for name in before if name in after):
        for effect, what, message in rule_steps(before[name], after[name]):
            yield Change(effect, new.name, name, what, message)
    kept = [renamed.get(name, name) for name in before if name in after or name in renamed]
    if kept != [name for name in after if name in set(kept)]:
        text = f"rules in another order, {', '.join(after)}: the first that blocks names stop_reason"
        yield Change(Effect.OTHER, new.name, "", "order", text)


def _rule_change(policy: Policy, rule: Rule, what: str, effect: Effect, text: str) -> Change:
    return Change(effect, policy.name, rule.name, what, text)


def _does(rule: Rule) -> str:
    return f"{wording.action(rule.then)} when {wording.expression(rule.when)}"


def _exception_changes(old: Policy, new: Policy) -> Iterator[Change]:
    before = {exception.name: exception for exception in old.exceptions}
    after = {exception.name: exception for exception in new.exceptions}
    for name in sorted(before.keys() | after.keys()):
        match before.get(name), after.get(name):
            case None, exception if exception is not None:
                rules = ", ".join(sorted(exception.rules)) or "all rules"
                until = f", until {exception.until}" if exception.until else ""
                whom = wording.request_match(exception.match)
                text = f"exception added: {rules} do not act for {whom}{until}"
                yield Change(Effect.LOOSER, new.name, name, "exception-added", text)
            case exception, None if exception is not None:
                text = f"exception removed: it was for {wording.request_match(exception.match)}"
                yield Change(Effect.STRICTER, new.name, name, "exception-removed", text)
            case one, other:
                assert one is not None
                assert other is not None
                for effect, what, message in exception_steps(one, other):
                    yield Change(effect, new.name, name, f"exception-{what}", message)


def _set_changes(old: Policy, new: Policy) -> Iterator[Change]:
    for name in [*old.experts, *(name for name in new.experts if name not in old.experts)]:
        before, after = old.experts.get(name), new.experts.get(name)
        ones = {} if before is None else dict(before.weights)
        others = {} if after is None else dict(after.weights)
        if ones == others and (before is None) is (after is None):
            continue
        gained, lost = others.keys() - ones.keys(), ones.keys() - others.keys()
        moved = sorted(e for e in ones.keys() & others.keys() if ones[e] != others[e])
        words = [
            f"{verb} {wording.by_layer(experts)}"
            for verb, experts in (("gained", gained), ("lost", lost), ("reweighted", moved))
            if experts
        ]
        head = "removed" if after is None else "added" if before is None else "changed"
        effect = Effect.OTHER
        if before is not None and after is not None and not moved and not (gained and lost):
            effect = _set_effect(new, after)
            effect = effect.reversed if lost else effect
        yield Change(effect, new.name, name, "set", f"set {head}: {'; '.join(words)}")


def _set_effect(policy: Policy, expert_set: ExpertSet) -> Effect:
    """Of more experts in a set, from what its rules do with it: more to count or to take out is
    stricter; a rate, a mass or a score may go either way."""
    counts = (ConditionKind.COUNT, ConditionKind.COACTIVATION)
    effects = set()
    for rule in policy.rules:
        if isinstance(rule.then, Mask) and rule.then.experts.name == expert_set.name:
            forces = rule.then.method is MaskMethod.FORCE
            effects.add(Effect.OTHER if forces else Effect.STRICTER)
        for condition in rule.conditions():
            if condition.experts is not None and condition.experts.name == expert_set.name:
                plain = condition.kind in counts and key(rule.when) == key(condition)
                rises = plain and condition.comparison.upward
                effects.add(Effect.STRICTER if rises else Effect.LOOSER if plain else Effect.OTHER)
    return joined(effects)
