"""Findings within one rule: whether it can fire, and whether its mask ends."""

from __future__ import annotations

from collections.abc import Iterator

from guard.policy.lint.finding import Code, Finding
from guard.policy.lint.truth import (
    Literal,
    Reason,
    Setting,
    conditions,
    known_once,
    ways,
    why_never,
    why_not,
    why_unknown,
)
from guard.policy.model import (
    Condition,
    ConditionKind,
    Mask,
    NamedWindow,
    Not,
    Phase,
    Policy,
    Rule,
)

_GROWING = (ConditionKind.COUNT, ConditionKind.COACTIVATION, ConditionKind.DORMANT)


def rule_findings(policy: Policy, rule: Rule, setting: Setting) -> Iterator[Finding]:
    never = why_never(rule.when, setting) or _why_too_seldom(rule, setting)
    if never:
        reason = never[0]
        more = f" (and {len(never) - 1} more ways, none of them possible)" if len(never) > 1 else ""
        text = (
            f"rule {rule.name!r} of policy {policy.name!r} can never fire: {reason.text}{more}; mend "
            "the condition or remove the rule"
        )
        yield Finding(reason.condition.location, Code.NEVER_FIRES, text)
        return
    if not _is_only_always(rule) and why_never(rule.when, setting, negated=True):
        text = (
            f"rule {rule.name!r} of policy {policy.name!r} is true for every request as soon as its "
            "window is known, so it tells nothing; mend the threshold, or write `when: always` if "
            "every request is meant"
        )
        yield Finding(next(conditions(rule.when)).location, Code.ALWAYS_FIRES, text)
    elif not isinstance(rule.when, Condition):
        yield from _constant_conditions(rule, setting)
    if isinstance(rule.then, Mask):
        yield from _mask_findings(rule, rule.then)


def _is_only_always(rule: Rule) -> bool:
    return isinstance(rule.when, Condition) and rule.when.kind is ConditionKind.ALWAYS


def _why_too_seldom(rule: Rule, setting: Setting) -> tuple[Reason, ...] | None:
    """`persist` asks for several hits, and the rule can be true at one position only."""
    found = ways(rule.when)
    if rule.persist.hits == 1 or found is None:
        return None
    single = []
    for way in found:
        if why_not(way, setting) is None:
            once = [one.condition for one in way if known_once(one.condition, rule.phase)]
            if not once:
                return None
            single.append(once[0])
    text = (
        f"persist asks for {rule.persist.hits} hits, and with phase: prompt `{single[0].label}` is "
        "known at the last prompt token only; leave persist out"
    )
    return (Reason(single[0], text),)


def _constant_conditions(rule: Rule, setting: Setting) -> Iterator[Finding]:
    for condition in conditions(rule.when):
        if condition.kind is ConditionKind.ALWAYS:
            continue
        unknown = why_unknown(condition, rule.phase)
        if unknown:
            text = f"`{condition.label}` of rule {rule.name!r} is never known: {unknown}; take it out"
        elif reason := why_not((Literal(condition, negated=False),), setting):
            text = f"`{condition.label}` of rule {rule.name!r} is never true: {reason.text}; mend it"
        elif reason := why_not((Literal(condition, negated=True),), setting):
            text = (
                f"`{condition.label}` of rule {rule.name!r} is never false: to be so, {reason.text}; "
                "mend it or take it out"
            )
        else:
            continue
        yield Finding(condition.location, Code.CONSTANT_CONDITION, text)


def _mask_findings(rule: Rule, mask: Mask) -> Iterator[Finding]:
    if mask.until != "clear":
        return
    if why := _why_unreleased(rule):
        text = (
            f"the mask of rule {rule.name!r} is released when the rule turns false, and {why}; write "
            "until: request-end if the mask is to stay, or a number of tokens"
        )
        yield Finding(mask.location, Code.UNRELEASED_MASK, text)
    elif _masks_what_it_reads(rule, mask):
        text = (
            f"rule {rule.name!r} masks the experts that it reads: under its own mask it turns false, "
            "the mask is released, and the experts are used again until it next fires; write a number "
            "of tokens or request-end as `until`"
        )
        yield Finding(mask.location, Code.SELF_RELEASING_MASK, text)


def _why_unreleased(rule: Rule) -> str | None:
    found = ways(rule.when)
    if found is not None and found and all(_stays_true(one) for way in found for one in way):
        return "this one never does once it was true"
    if rule.phase is Phase.PROMPT:
        return "with phase: prompt it is not evaluated any more once the output begins"
    return None


def _stays_true(literal: Literal) -> bool:
    """Once it was true for a request, it is at every later position."""
    condition, negated = literal
    if condition.kind is ConditionKind.ALWAYS:
        return not negated
    if condition.over is NamedWindow.PROMPT:
        return True
    grows = condition.kind in _GROWING and condition.over in (NamedWindow.REQUEST, NamedWindow.OUTPUT)
    return grows and condition.comparison.upward is not negated


def _masks_what_it_reads(rule: Rule, mask: Mask) -> bool:
    """Its one condition rises with the use of experts that its own mask takes out."""
    if isinstance(rule.when, Not) or not isinstance(rule.when, Condition) or mask.method == "force":
        return False
    condition = rule.when
    rises = (
        *(ConditionKind.COUNT, ConditionKind.RATE, ConditionKind.MASS),
        *(ConditionKind.COACTIVATION, ConditionKind.DORMANT),
    )
    if condition.kind not in rises or not condition.comparison.upward or condition.experts is None:
        return False
    return condition.experts.weights.keys() <= mask.experts.weights.keys()
