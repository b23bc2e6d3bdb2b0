"""Whether the lines of a decision log were sealed with its key."""

from __future__ import annotations

from typing import Final

from guard.events.log.chain import Head, Link
from guard.events.log.findings import Findings, Kind, Place
from guard.events.log.key import SealingKey

MAX_KEY_STEPS: Final = 100_000_000
"""A line whose number is further from that of the last seal is not believed; a minute or two."""


class Seals:
    """Lines are asked after in the order of their numbers."""

    def __init__(self, key: SealingKey | None, findings: Findings) -> None:
        self._key = key
        self._findings = findings
        self._was_told = False  # of what is true of all lines

    def holds(self, line: bytes, link: Link, place: Place) -> bool:
        key = self._key
        if key is None:
            if link.seal is not None:
                self._tell_once(
                    place, Kind.SEALED, "is sealed: with --key FILE its seals are checked, too"
                )
            return True
        if link.log != key.head.log:
            self._tell_once(place, Kind.FORGED, f"is not of the key's log, {key.head.log}")
            return False
        if link.seal is None:
            self._findings.add(place, Kind.UNSEALED, f"n={link.n} has no seal")
            return False
        if link.n - key.head.n > MAX_KEY_STEPS:
            self._findings.add(
                place, Kind.FORGED, f"n={link.n} is too far from n={key.head.n} to be believed"
            )
            return False
        self._key = key = key.behind(Head(link.log, link.n - 1, link.prev))
        if not key.made(line, link):
            self._findings.add(place, Kind.FORGED, f"n={link.n} was not sealed with the key")
            return False
        return True

    def _tell_once(self, place: Place, kind: Kind, message: str) -> None:
        if not self._was_told:
            self._was_told = True
            self._findings.add(place, kind, message)
