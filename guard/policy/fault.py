"""Where something stands in a policy file, and what is wrong with it there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from guard.errors import GuardError


class Location(NamedTuple):
    """A place in a file; line and column count from 1. Line 0: the file or folder as a whole."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


class Fault(NamedTuple):
    """One thing that an author has to mend. `message` says what is wrong and what to write instead."""

    location: Location
    message: str

    def __str__(self) -> str:
        return f"{self.location}: {self.message}"


class PolicyError(GuardError):
    """Policies that cannot be used, with every fault that was found, in reading order."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        assert faults, "an error needs a fault"
        self.faults = tuple(sorted(faults))
        super().__init__("\n".join(str(fault) for fault in self.faults))
