"""One change in what a policy set does to requests."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Effect(StrEnum):
    """stricter: finds, does or keeps up more than before. looser: less. other: neither, or both."""

    STRICTER = "stricter"
    LOOSER = "looser"
    OTHER = "other"

    @property
    def reversed(self) -> Effect:
        pairs = {Effect.STRICTER: Effect.LOOSER, Effect.LOOSER: Effect.STRICTER}
        return pairs.get(self, self)


class Change(NamedTuple):
    """rule: or exception or set, or "" for the policy as a whole. what: a stable word for tools."""

    effect: Effect
    policy: str
    rule: str
    what: str
    message: str

    @property
    def subject(self) -> str:
        return f"{self.policy}/{self.rule}" if self.rule else self.policy


def grown(before: float, after: float) -> Effect:
    """Stricter where more of it is."""
    return Effect.STRICTER if after > before else Effect.LOOSER if after < before else Effect.OTHER


def joined(effects: set[Effect]) -> Effect:
    """Of several at once: theirs where they agree."""
    return effects.pop() if len(effects) == 1 else Effect.OTHER
