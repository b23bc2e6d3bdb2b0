"""Whether a decision log holds a head that was kept elsewhere."""

from __future__ import annotations

from typing import NamedTuple

from guard.events.log.chain import Head, Link
from guard.events.log.findings import Findings, Kind, Place


class Anchor(NamedTuple):
    """The number and the hash of a line, as they were when it was the last one."""

    n: int
    hash: str


class Anchoring:
    """Meets the lines of a log, then says what was not met."""

    def __init__(self, anchor: Anchor) -> None:
        self._anchor = anchor
        self._is_met = False
        self._other: Place | None = None  # has its number, and another hash

    def meet(self, link: Link, place: Place) -> None:
        if link.head[1:] == self._anchor:
            self._is_met = True
        elif link.n == self._anchor.n:
            self._other = place

    def compare(self, first: Link | None, last: Head | None, end: Place, findings: Findings) -> None:
        """end: the place of the last line that was read"""
        n = self._anchor.n
        if self._is_met:
            return
        if self._other is not None:
            findings.add(self._other, Kind.HEAD, f"n={n} is another line than the head that was given")
        elif first is None or last is None or last.n < n:
            found = 0 if last is None else last.n
            findings.add(
                end,
                Kind.HEAD,
                f"the log ends with n={found}, but n={n} was written: its end was cut off",
            )
        elif first.n <= n:
            findings.add(end, Kind.HEAD, f"the head that was given, n={n}, is not in the log")
        elif first.n == n + 1 and first.prev != self._anchor.hash:
            findings.add(end, Kind.HEAD, f"the log does not go on from the head that was given, n={n}")
        elif first.n > n + 1:
            findings.add(
                end,
                Kind.NOT_COMPARED,
                f"the head that was given, n={n}, is older than what is here, from n={first.n} on",
            )
