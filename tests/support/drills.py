"""Drills of a test: faults that are injected while it runs, and no longer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from guard import fault_injection
from guard.fault_injection import Drill, parse_faults


@contextmanager
def drilling(text: str) -> Iterator[Drill]:
    """text: as in MOE_GUARD_INJECT_FAULTS"""
    try:
        yield fault_injection.begin(parse_faults(text))
    finally:
        fault_injection.end()
