"""One way into a reader of untrusted input, and what must be true of every example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar

from hypothesis.strategies import SearchStrategy

from tools.fuzz.limits import Limits

T = TypeVar("T")

MAX_MESSAGE_CHARACTERS: Final = 1 << 20


class Outcome(NamedTuple):
    """word: of what an example came to, for the counts"""

    is_accepted: bool
    word: str


ACCEPTED: Final = Outcome(True, "accepted")


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Part(Generic[T]):
    """examples: what is read
    read: reads one; None: it was taken. An AssertionError says what is wrong with what came out
    refusals: the errors that the reader documents, for people
    state: what an example that is refused leaves as it was
    """

    examples: SearchStrategy[T]
    read: Callable[[T], Outcome | None]
    refusals: tuple[type[Exception], ...]
    state: Callable[[], object] = _nothing


Parts = Mapping[str, Part[Any]]
OpenTarget = Callable[[Path], Parts]
"""The ways into a target. The folder is empty, and the only one that it may write to."""


def judged(part: Part[T], example: T, limits: Limits) -> Outcome:
    """Raises what the reader raises beside its refusals, and AssertionError for anything else that is
    wrong."""
    before = part.state()
    with limits:
        try:
            outcome = part.read(example) or ACCEPTED
        except part.refusals as error:
            _check_words(error)
            outcome = Outcome(False, type(error).__name__)
    if not outcome.is_accepted:
        after = part.state()
        assert after == before, f"it was refused, but before it was {before!r}, and is {after!r}"
    return outcome


def _check_words(error: Exception) -> None:
    """People can be shown them, and no lack of memory hides behind them."""
    text = str(error)
    assert text.strip(), f"{type(error).__name__} says nothing"
    text.encode()  # a terminal or a log cannot take half of a character
    assert len(text) <= MAX_MESSAGE_CHARACTERS, f"{len(text)} characters of message"
    cause: BaseException | None = error
    while cause is not None:
        assert not isinstance(cause, MemoryError), "it was refused when memory had run out"
        cause = cause.__cause__
