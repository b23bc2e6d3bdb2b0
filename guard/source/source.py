"""What the watcher asks of a place that policies come from."""

from __future__ import annotations

from typing import Protocol

from guard.policy import Fault, Location, PolicyError, PolicyTexts


class Source(Protocol):
    """A file, a folder or a URL. Used by one thread."""

    @property
    def name(self) -> str:
        """For people; without what is secret in a URL."""

    def poll(self, *, force: bool = False) -> PolicyTexts | None:
        """The whole set, if it changed since the last call, or if it is forced.

        Raises PolicyError where it is out of reach, or not to be trusted.
        """

    def keep(self) -> None:
        """What was polled last is in force."""

    def delay_s(self) -> float:
        """How long to wait before the next poll."""


def out_of_reach(place: str, message: str) -> PolicyError:
    """The fault of a whole file, folder or bundle."""
    return PolicyError([Fault(Location(place), message)])
