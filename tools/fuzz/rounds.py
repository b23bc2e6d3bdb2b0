"""Gives a target's parts one example after another, in turns, and counts what they come to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from hypothesis import HealthCheck, Phase, given, seed, settings

from tools.fuzz.limits import Limits
from tools.fuzz.part import Outcome, Part, Parts, judged

TURN_EXAMPLES: Final = 100
MAX_SHOWN_CHARACTERS: Final = 20_000

_SIDES: Final = {"accepted": True, "refused": False}

Counts = Counter[tuple[str, Outcome]]
"""By part."""


class OneSidedError(AssertionError):
    """A part in which nothing was accepted, or nothing refused, tells nothing."""


def run_for(
    parts: Parts, folder: Path, seconds: float, tell: Callable[[], None] = lambda: None
) -> Counts:
    """tell: called ahead of each example. Raises what an example showed, with the smallest one."""
    end = time.monotonic() + seconds
    counts: Counts = Counter()
    number = 0
    while time.monotonic() < end:
        number += 1
        for name, part in parts.items():
            until = None if number == 1 else end  # each part has one turn at least
            run_turn(name, part, folder, counts, number, until=until, tell=tell)
    return counts


def run_turn(
    name: str,
    part: Part[Any],
    folder: Path,
    counts: Counts,
    number: int = 1,
    *,
    num_examples: int = TURN_EXAMPLES,
    until: float | None = None,
    tell: Callable[[], None] = lambda: None,
    is_made_smaller: bool = True,
) -> None:
    """number: of the turn; the same one has the same examples
    is_made_smaller: what shows something, which may take minutes
    """
    limits = Limits(folder)
    failing: list[Any] = []  # the last one is the smallest

    @seed(f"{name}, {number}")
    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if is_made_smaller else (Phase.generate,),
    )
    @given(part.examples)
    def one(example: Any) -> None:
        if until is not None and time.monotonic() > until and not failing:
            return
        tell()
        try:
            outcome = judged(part, example, limits)
        except BaseException:
            failing.append(example)  # and it is made smaller, however late it is
            raise
        counts[name, outcome] += 1

    try:
        one()
    except Exception as error:
        shown = f"the smallest example: {failing[-1]!r}" if failing else "no example"
        error.add_note(f"in the part {name}, turn {number}; {shown[:MAX_SHOWN_CHARACTERS]}")
        raise


def check_both_sides(counts: Counts, parts: Parts) -> None:
    """Raises OneSidedError."""
    for name in parts:
        seen = {outcome.is_accepted for part, outcome in counts if part == name}
        lacks = [word for word, is_accepted in _SIDES.items() if is_accepted not in seen]
        if lacks:
            raise OneSidedError(f"{name}: nothing was {' or '.join(lacks)}; mend its examples")
