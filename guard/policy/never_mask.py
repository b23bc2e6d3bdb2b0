"""Masks of experts, or of sets of them, that a profile says no policy may mask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from guard.policy.fault import Fault, Location
from guard.policy.model import (
    Expert,
    Mask,
    MaskMethod,
    Mode,
    NeverMask,
    Policy,
    PolicySet,
    Rule,
)

_NAMED: Final = 8
"""How many experts a fault names."""


def never_mask_faults(policies: PolicySet) -> list[Fault]:
    """A profile speaks of the model, so its list binds the masks of every policy beside it.

    `force` takes nothing away, and what is `off` does nothing and binds nobody. A set that failed its
    causal check is a matter of the policy that names it, by any method.
    """
    protected = _by_layer(policies.policies)
    masks = [
        (policy, rule, rule.then)
        for policy, rule in policies.ordered_rules()
        if isinstance(rule.then, Mask)
    ]
    return [
        *(
            fault
            for policy, rule, mask in masks
            if mask.method is not MaskMethod.FORCE
            for fault in _rule_faults(policy, rule, mask, protected)
        ),
        *(
            Fault(mask.location, f"{policy.name}/{rule.name}: {reason}")
            for policy, rule, mask in masks
            for reason in dict.fromkeys(entry.not_to_mask for entry in mask.experts.entries)
            if reason
        ),
    ]


_Protected = Mapping[int, list[tuple[frozenset[int], NeverMask]]]
"""For each layer, the experts that an entry protects there."""


def _by_layer(policies: Iterable[Policy]) -> _Protected:
    protected: dict[int, list[tuple[frozenset[int], NeverMask]]] = defaultdict(list)
    for policy in policies:
        for profile in policy.profiles if policy.mode is not Mode.OFF else ():
            for entry in profile.never_mask:
                experts = frozenset(entry.experts)
                for layer in entry.layers:
                    protected[layer].append((experts, entry))
    return protected


def _rule_faults(policy: Policy, rule: Rule, mask: Mask, protected: _Protected) -> Iterator[Fault]:
    """One fault for each entry of a profile, naming all of its experts that are masked."""
    masked_of: dict[Location, tuple[NeverMask, list[Expert]]] = {}
    for expert in sorted(mask.experts.weights):
        for experts, entry in protected.get(expert.layer, ()):
            if expert.id in experts:
                masked_of.setdefault(entry.location, (entry, []))[1].append(expert)
    for entry, masked in masked_of.values():
        named = ", ".join(f"L{layer}/E{expert_id}" for layer, expert_id in masked[:_NAMED])
        more = f" and {len(masked) - _NAMED} more" if len(masked) > _NAMED else ""
        reason = f" ({entry.reason})" if entry.reason else ""
        text = (
            f"{policy.name}/{rule.name} masks {named}{more}, which the profile {entry.location} says "
            f"must never be masked{reason}; take it out of the set {mask.experts.name!r}"
        )
        yield Fault(mask.location, text)
