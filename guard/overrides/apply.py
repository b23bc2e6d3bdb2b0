"""A policy set with what operators changed: compiled, proved and put in force like any other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from guard.overrides.model import OPERATOR, NotThereError, OperatorMask, Overrides
from guard.policy import Fault, Location, PolicyError, PolicySet, parse_policies
from guard.policy.model import Mode, Policy, RequestMatch
from guard.policy.never_mask import never_mask_faults
from guard.policy.revision import revision_of

FILE: Final = "<operator>"
"""What a fault of an operator's mask names in the place of a file."""


def apply_overrides(policies: PolicySet, overrides: Overrides) -> PolicySet:
    """The same set where there is nothing to change.

    Raises PolicyError for a policy that has the name of the operator's, and for masks of experts that a
    profile says must never be masked.
    """
    taken = [policy for policy in policies.policies if policy.name == OPERATOR]
    if taken:
        text = f"the name {OPERATOR!r} is that of operators' masks; call the policy something else"
        raise PolicyError([Fault(policy.location, text) for policy in taken])
    changed = tuple(_policies(policies, overrides))
    if changed == policies.policies:
        return policies
    ordered = sorted(changed, key=lambda policy: (-policy.severity.rank, policy.name))
    found = PolicySet(tuple(ordered), revision_of(ordered))
    if faults := never_mask_faults(found):
        raise PolicyError(faults)
    return found


def check_new_modes(policies: PolicySet, before: Overrides, changed: Overrides) -> None:
    """Raises NotThereError where a mode is set of a policy that is not there.

    One that was set before stays though a reload took its policy away: it may come back, and no other
    change depends on it.
    """
    names = {policy.name for policy in policies.policies}
    for name in changed.modes.keys() - before.modes.keys():
        if name not in names:
            raise NotThereError(f"there is no policy {name!r}; there is {', '.join(sorted(names))}")


def _policies(policies: PolicySet, overrides: Overrides) -> Iterator[Policy]:
    for policy in policies.policies:
        mode = Mode(overrides.modes[policy.name]) if policy.name in overrides.modes else policy.mode
        yield _softened(replace(policy, mode=mode) if mode is not policy.mode else policy, overrides)
    if overrides.masks:
        yield _softened(_operator(overrides.masks), overrides)


def _softened(policy: Policy, overrides: Overrides) -> Policy:
    if overrides.kill_switch and policy.mode is Mode.ENFORCE:
        return replace(policy, mode=Mode.AUDIT)
    return policy


def _operator(masks: tuple[OperatorMask, ...]) -> Policy:
    document = {
        "apiVersion": "moe-guard/v1",
        "kind": "Policy",
        "metadata": {
            "name": OPERATOR,
            "description": "Experts that an operator took out of use.",
            "severity": "info",
        },
        "spec": {
            "mode": "enforce",
            "experts": {mask.id: _entries(mask) for mask in masks},
            "rules": [_rule(mask) for mask in masks],
        },
    }
    [policy] = parse_policies(json.dumps(document), FILE).policies  # JSON is YAML
    request_of = {mask.id: mask.request for mask in masks if mask.request}
    rules = tuple(
        replace(rule, match=RequestMatch(request_ids=frozenset([request_of[rule.name]])))
        if rule.name in request_of
        else rule
        for rule in policy.rules
    )
    return replace(policy, rules=rules, location=Location(FILE))


def _entries(mask: OperatorMask) -> list[dict[str, Any]]:
    layers = sorted({layer for layer, _ in mask.experts})
    return [
        {"layer": layer, "experts": [expert for own, expert in mask.experts if own == layer]}
        for layer in layers
    ]


def _rule(mask: OperatorMask) -> dict[str, Any]:
    rule: dict[str, Any] = {
        "name": mask.id,
        "when": {"always": {}},
        "then": {"mask": {"experts": mask.id, "method": mask.method, "until": "request-end"}},
    }
    return rule | ({"match": {"labels": mask.labels}} if mask.labels else {})
