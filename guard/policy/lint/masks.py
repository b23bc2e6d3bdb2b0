"""Findings between rules: what one masks and another reads, forces, blocks or says again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from guard.policy.lint.finding import Code, Finding
from guard.policy.lint.truth import measure_key
from guard.policy.lint.values import taken
from guard.policy.model import (
    All,
    AnyOf,
    Block,
    Condition,
    ConditionKind,
    Expert,
    Expression,
    Mask,
    MaskMethod,
    Mode,
    NamedWindow,
    Not,
    Phase,
    Policy,
    PolicySet,
    RequestMatch,
    Rule,
)

_NAMED: Final = 4
"""How many experts or rules a message names."""


class _Ruled(NamedTuple):
    policy: Policy
    rule: Rule

    def __str__(self) -> str:
        return f"{self.policy.name}/{self.rule.name}"


class _Masking(NamedTuple):
    policy: Policy
    rule: Rule
    mask: Mask

    def __str__(self) -> str:
        return f"{self.policy.name}/{self.rule.name}"


def mask_findings(policies: PolicySet) -> Iterator[Finding]:
    ruled = [_Ruled(*pair) for pair in policies.ordered_rules()]
    masking = [_Masking(*one, one.rule.then) for one in ruled if isinstance(one.rule.then, Mask)]
    out = [one for one in masking if one.mask.method is not MaskMethod.FORCE]
    for one in ruled:
        yield from _reads_masked(one, out)
    for forcing in masking:
        if forcing.mask.method is MaskMethod.FORCE:
            yield from _force_masked(forcing, out)
    yield from _shadowed(ruled)
    yield from _duplicates(ruled)


def can_meet(one: RequestMatch, other: RequestMatch) -> bool:
    """Some request may match both."""
    adapters = (one.lora_adapters, other.lora_adapters)
    if adapters[0] is not None and adapters[1] is not None and not adapters[0] & adapters[1]:
        return False
    shared = one.labels.keys() & other.labels.keys()
    return all(one.labels[name] & other.labels[name] for name in shared)


def _in_force_together(one: Policy, other: Policy) -> bool:
    """Where `one` decides, an action of `other` may be in force: an audit policy withholds its own."""
    return one.name == other.name or other.mode is Mode.ENFORCE


def _reads_masked(reader: _Ruled, masking: list[_Masking]) -> Iterator[Finding]:
    """One finding for a rule, at the first of its conditions that is concerned."""
    others = [
        one
        for one in masking
        if one.rule is not reader.rule
        and _in_force_together(reader.policy, one.policy)
        and can_meet(reader.rule.match, one.rule.match)
    ]
    for condition in reader.rule.conditions():
        found = [one for one in others if _is_read(condition, reader.rule, one)]
        if found:
            yield Finding(condition.location, Code.READS_MASKED, _reads_text(reader, condition, found))
            return


def _is_read(condition: Condition, reader: Rule, masking: _Masking) -> bool:
    if condition.kind is ConditionKind.ALWAYS:
        return False
    of_prompt = reader.phase is Phase.PROMPT or condition.over is NamedWindow.PROMPT
    if of_prompt and not (masking.rule.is_static and masking.rule.phase is not Phase.OUTPUT):
        return False  # the prompt is masked by `always` alone
    if condition.experts is None:
        return True  # how all experts are used
    return not condition.experts.weights.keys().isdisjoint(masking.mask.experts.weights)


def _reads_text(reader: _Ruled, condition: Condition, masking: list[_Masking]) -> str:
    names = _some(masking)
    does = "masks" if len(masking) == 1 else "mask"
    what = (
        f"`{condition.label}` of {reader} reads how all experts are used, and {names} {does} some: "
        "while that is in force, its value is another"
        if condition.experts is None
        else f"`{condition.label}` of {reader} reads experts that {names} {does}: while that is in "
        "force, it sees less"
    )
    return f"{what}; let it read experts that are not masked, or accept that it is then blind to them"


def _force_masked(forcing: _Masking, masking: list[_Masking]) -> Iterator[Finding]:
    for other in masking:
        both = sorted(forcing.mask.experts.weights.keys() & other.mask.experts.weights.keys())
        if both and can_meet(forcing.rule.match, other.rule.match):
            text = (
                f"{forcing} forces {_experts(both)} in, which {other} masks ({other.mask.method}): "
                "where both apply the expert is masked and not forced; take it out of one of the two "
                "sets"
            )
            yield Finding(forcing.mask.location, Code.FORCE_MASKED, text)


def _shadowed(ruled: list[_Ruled]) -> Iterator[Finding]:
    """A mask that would begin where a block has ended the request already."""
    blocks = [one for one in ruled if isinstance(one.rule.then, Block)]
    for one in ruled:
        if not isinstance(one.rule.then, Mask) or one.rule.is_static:
            continue
        for block in blocks:
            if _always_blocks(block, one) and _is_sooner(block.rule, one.rule):
                text = (
                    f"{block} blocks every request before this mask of {one} begins, so the mask never "
                    "does anything; give the mask the lower threshold, or take one of the two rules out"
                )
                yield Finding(one.rule.then.location, Code.SHADOWED_MASK, text)
                break


def _always_blocks(block: _Ruled, masking: _Ruled) -> bool:
    """Wherever the mask is in force, so is the block, and no exception withholds it."""
    together = block.policy.name == masking.policy.name or block.policy.mode is Mode.ENFORCE
    excepted = any(exception.covers(block.rule.name) for exception in block.policy.exceptions)
    mine, others = block.rule.match, masking.rule.match
    return together and not excepted and (mine.is_all or mine == others)


def _is_sooner(block: Rule, mask: Rule) -> bool:
    """Wherever the mask's rule is true, the block's rule is."""
    if block.phase is not mask.phase and not (
        block.phase is Phase.ANY and not _reads_numeric_window(mask.when)
    ):
        return False
    if block.persist.hits > mask.persist.hits or block.persist.of < mask.persist.of:
        return False
    if _canonical(block.when) == _canonical(mask.when):
        return True
    one, other = block.when, mask.when
    if not (isinstance(one, Condition) and isinstance(other, Condition)):
        return False
    if measure_key(one) != measure_key(other) or ConditionKind.ALWAYS in (one.kind, other.kind):
        return False
    return one.min_tokens <= other.min_tokens and taken(one) & taken(other) == taken(other)


def _reads_numeric_window(node: Expression) -> bool:
    """A rule's phase is part of what such a window holds."""
    match node:
        case Condition(over=over):
            return type(over) is int
        case Not(child):
            return _reads_numeric_window(child)
        case All(children) | AnyOf(children):
            return any(map(_reads_numeric_window, children))


def _duplicates(ruled: list[_Ruled]) -> Iterator[Finding]:
    first: dict[object, _Ruled] = {}
    for one in ruled:
        rule = one.rule
        action = rule.then
        does: object = action
        if isinstance(action, Mask):
            does = (action.method, action.until, frozenset(action.experts.weights))
        key = (
            _canonical(rule.when),
            (rule.phase, rule.persist, _match_key(rule.match)),
            does,
            one.policy.mode,
        )
        before = first.setdefault(key, one)
        if before is not one:
            text = (
                f"{one} says the same as {before} at {before.rule.location}, so every request that one "
                "finds is found twice; remove one of them"
            )
            yield Finding(rule.location, Code.DUPLICATE_RULE, text)


def _match_key(match: RequestMatch) -> object:
    return match.lora_adapters, frozenset(match.labels.items()), match.sample


def _canonical(node: Expression) -> object:
    """Equal for expressions that say the same in the same order."""
    match node:
        case Condition():
            threshold = (node.comparison, node.threshold, node.bias, node.min_tokens)
            return (measure_key(node), threshold)
        case Not(child):
            return ("not", _canonical(child))
        case All(children) | AnyOf(children):
            return (type(node).__name__, tuple(_canonical(child) for child in children))


def _experts(experts: list[Expert]) -> str:
    return _some(f"L{layer}/E{id_}" for layer, id_ in experts)


def _some(things: Iterable[object]) -> str:
    words = [str(thing) for thing in things]
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return ", ".join(words[:_NAMED]) + more
