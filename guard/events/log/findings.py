"""What is said of a decision log that was checked: by place, bounded, and counted beyond the bound."""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple

MAX_FINDINGS: Final = 1_000
"""More are counted, and not kept."""


class Kind(StrEnum):
    """Of findings. Faults, but for `NOTICES`."""

    CHANGED = "changed"
    REPLACED = "replaced"
    MISSING = "missing"
    ORDER = "order"
    REPEATED = "repeated"
    SPLICED = "spliced"
    UNCHAINED = "unchained"
    INSERTED = "inserted"
    TOO_LONG = "too-long"
    UNSEALED = "unsealed"
    FORGED = "forged"
    HEAD = "head"
    TORN = "torn"
    BEGINS_LATER = "begins-later"
    NOT_COMPARED = "not-compared"
    SEALED = "sealed"


NOTICES: Final = frozenset({Kind.TORN, Kind.BEGINS_LATER, Kind.NOT_COMPARED, Kind.SEALED})


class Place(NamedTuple):
    """A line of a file. file_no: files are read in this order; line: from 1"""

    file_no: int
    line: int
    file: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class LogFinding(NamedTuple):
    place: Place
    kind: Kind
    message: str

    @property
    def is_fault(self) -> bool:
        return self.kind not in NOTICES

    def __str__(self) -> str:
        return f"{self.place}: {'' if self.is_fault else 'notice: '}{self.message}"


class Findings:
    def __init__(self) -> None:
        self._kept: list[LogFinding] = []
        self.num_faults = 0
        self.num_notices = 0

    def add(self, place: Place, kind: Kind, message: str) -> None:
        finding = LogFinding(place, kind, message)
        if finding.is_fault:
            self.num_faults += 1
        else:
            self.num_notices += 1
        if len(self._kept) < MAX_FINDINGS:
            self._kept.append(finding)

    def by_place(self) -> tuple[LogFinding, ...]:
        return tuple(sorted(self._kept))
