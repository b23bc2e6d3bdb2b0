"""A digest of what policies say: equal content has the equal revision, wherever it lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from datetime import date
from typing import Final

from guard.policy.fault import Location
from guard.policy.model import Baselines, Block, ExpertSet, Mask, OnError, Policy, Profile, Rule

_DIGITS: Final = 12
_KEY_DIGITS: Final = 32


def revision_of(policies: Iterable[Policy]) -> str:
    """12 hexadecimal digits of SHA-256 over the canonical JSON of the policies, sorted by name."""
    content = [_canonical(policy) for policy in sorted(policies, key=lambda policy: policy.name)]
    return _digest(content)[:_DIGITS]


class RuleKeys:
    """Tells rules of two policy sets apart by what they do. Digests each expert set once."""

    def __init__(self) -> None:
        self._digests: dict[int, tuple[ExpertSet, str]] = {}  # kept, so that no id is another's

    def key(self, policy: Policy, rule: Rule) -> str:
        """Equal for rules that fire alike and act alike where they are enforced: what people read, the
        mode and the fail mode may differ."""
        then = Block() if isinstance(rule.then, Block) else rule.then
        conditions = list(rule.conditions())
        sets = [condition.experts for condition in conditions if condition.experts is not None]
        if isinstance(then, Mask):
            sets.append(then.experts)
        reads_baselines = any(condition.baselines is not None for condition in conditions)
        profile = policy.profile if reads_baselines else None
        content = [
            policy.name,
            _canonical(replace(rule, then=then, on_error=OnError.OPEN)),
            [self._set_digest(experts) for experts in sets],
            None if profile is None else profile.digest,
        ]
        return _digest(content)[:_KEY_DIGITS]

    def _set_digest(self, experts: ExpertSet) -> str:
        found = self._digests.get(id(experts))
        if found is None:
            found = self._digests[id(experts)] = (experts, _digest(_members(experts)))
        return found[1]


def mask_key(mask: Mask) -> str:
    """Equal for masks that do the same to the same experts, whichever rule's they are."""
    experts = sorted(mask.experts.weights)
    return _digest([str(mask.method), mask.until, experts])[:_KEY_DIGITS]


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _members(experts: ExpertSet) -> list[list[float]]:
    return sorted([layer, id_, weight] for (layer, id_), weight in experts.weights.items())


def _canonical(value: object) -> object:
    match value:
        case Policy():
            experts = {name: _members(members) for name, members in value.experts.items()}
            return {**_fields(value), "experts": experts}
        case ExpertSet():
            return value.name
        case Profile():
            return value.digest
        case Baselines():
            return None  # the profile's
        case frozenset():
            return sorted(value)
        case date():
            return value.isoformat()
        case Mapping():
            return {str(key): _canonical(item) for key, item in value.items()}
        case tuple():
            return [_canonical(item) for item in value]
        case _ if is_dataclass(value):
            return {"type": type(value).__name__, **_fields(value)}
        case _:
            return value


def _fields(value: object) -> dict[str, object]:
    assert is_dataclass(value)
    items = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: _canonical(item) for name, item in items.items() if not isinstance(item, Location)}
