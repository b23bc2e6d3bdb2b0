"""Who may call `/guard/v1`: people with a key of their own, by its digest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from guard.errors import GuardError
from guard_vllm.labels import ApiKeyLabels

ROLES = ("viewer", "admin")


class AdminKeyError(GuardError):
    """The file of admin keys is not what it must be."""


@dataclass(frozen=True, slots=True)
class Person:
    """name: as the audit log has it; may_change: or only look"""

    name: str
    may_change: bool


@dataclass(frozen=True, slots=True)
class AdminKeys:
    keys: ApiKeyLabels

    @staticmethod
    def read(path: Path) -> AdminKeys:
        """A YAML or JSON file: `sha256:DIGEST: {name: alice, role: admin}`, or the key itself.

        Raises AdminKeyError, LabelError; neither quotes a key.
        """
        keys = ApiKeyLabels.read(path)
        for labels in keys.by_digest.values():
            if set(labels) != {"name", "role"} or labels["role"] not in ROLES or not labels["name"]:
                raise AdminKeyError(
                    f"{path}: each key has a `name` and a `role`, which is {' or '.join(ROLES)}"
                )
        if not keys.by_digest:
            raise AdminKeyError(f"{path}: holds no key; leave admin_keys out to have no /guard/v1")
        return AdminKeys(keys)

    def person(self, headers: Iterable[tuple[bytes, bytes]]) -> Person | None:
        """By `Authorization: Bearer KEY`; None for any other key, and for several. headers: as ASGI has
        them."""
        given = [value for name, value in headers if name.lower() == b"authorization"]
        if len(given) != 1:
            return None
        scheme, _, token = given[0].strip().partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            return None
        labels = self.keys.of(token.strip())
        return Person(labels["name"], labels["role"] == "admin") if labels else None
