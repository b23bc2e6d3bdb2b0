"""Rules in short words, for a person who reviews a change."""

from __future__ import annotations

from collections.abc import Iterable

from guard.policy.model import (
    Action,
    All,
    AnyOf,
    Block,
    Condition,
    ConditionKind,
    Expert,
    Expression,
    Mask,
    MaskUntil,
    Mode,
    Not,
    Policy,
    RequestMatch,
)


def expression(node: Expression) -> str:
    """`rate of flagged over 64 above 0.12`; joined ones in brackets."""
    match node:
        case Condition(kind=ConditionKind.ALWAYS):
            return "always"
        case Condition():
            of = "" if node.experts is None else f" of {node.experts.name}"
            return f"{node.kind}{of} over {node.over} {node.comparison} {node.threshold:g}"
        case Not(child):
            return f"not ({expression(child)})"
        case All(children):
            return "all (" + ", ".join(map(expression, children)) + ")"
        case AnyOf(children):
            return "any (" + ", ".join(map(expression, children)) + ")"


def action(then: Action) -> str:
    """What a rule does, as a verb."""
    match then:
        case Block():
            return "blocks"
        case Mask(method=method):
            return f"masks {then.experts.name} ({method}, until {until(then.until)})"
        case _:
            return "observes"


def until(value: MaskUntil) -> str:
    return f"{value} tokens" if isinstance(value, int) else value


def acts(policy: Policy) -> str:
    """What the policy does about what it finds: `block: stop; mask: burst`."""
    named = {
        "blocks": [rule.name for rule in policy.rules if isinstance(rule.then, Block)],
        "masks": [rule.name for rule in policy.rules if isinstance(rule.then, Mask)],
        "observes": [rule.name for rule in policy.rules if not isinstance(rule.then, Block | Mask)],
    }
    said = [f"{', '.join(names)} {verb}" for verb, names in named.items() if names]
    return "; ".join(said) or "it has no rules"


def withheld(mode: Mode) -> str:
    return {Mode.ENFORCE: "", Mode.AUDIT: " (audit: withheld)", Mode.OFF: " (off)"}[mode]


def request_match(match: RequestMatch) -> str:
    words = [f"{name}: {'|'.join(sorted(match.labels[name]))}" for name in sorted(match.labels)]
    if match.lora_adapters is not None:
        words.append(f"loraAdapters: {'|'.join(sorted(match.lora_adapters))}")
    if match.sample < 1:
        words.append(f"sample: {match.sample:g}")
    return ", ".join(words) or "every request"


def by_layer(experts: Iterable[Expert]) -> str:
    """`L12 E85, E90-92; L20 E7`."""
    layers: dict[int, list[int]] = {}
    for expert in sorted(experts):
        layers.setdefault(expert.layer, []).append(expert.id)
    return "; ".join(f"L{layer} {_runs(ids)}" for layer, ids in layers.items())


def _runs(ids: list[int]) -> str:
    runs: list[list[int]] = []
    for id_ in ids:
        if runs and id_ == runs[-1][1] + 1:
            runs[-1][1] = id_
        else:
            runs.append([id_, id_])
    return ", ".join(f"E{a}" if a == b else f"E{a}-{b}" for a, b in runs)
