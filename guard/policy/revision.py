"""A digest of what policies say: equal content has the equal revision, wherever it lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from datetime import date
from typing import Final

from guard.policy.fault import Location
from guard.policy.model import Baselines, ExpertSet, Policy, Profile

_DIGITS: Final = 12


def revision_of(policies: Iterable[Policy]) -> str:
    """12 hexadecimal digits of SHA-256 over the canonical JSON of the policies, sorted by name."""
    content = [_canonical(policy) for policy in sorted(policies, key=lambda policy: policy.name)]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _canonical(value: object) -> object:
    match value:
        case Policy():
            experts = {
                name: sorted([layer, id_, weight] for (layer, id_), weight in s.weights.items())
                for name, s in value.experts.items()
            }
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
