"""Words for a person who mistyped one: what was found, and the nearest word that is right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

_LONGEST_QUOTE = 60


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like `word`, blind to case, '-' and '_'; None if none is like it."""
    by_folded = {_fold(choice): choice for choice in sorted(choices, reverse=True)}
    matches = get_close_matches(_fold(word[:_LONGEST_QUOTE]), by_folded, n=1, cutoff=0.6)
    return by_folded[matches[0]] if matches else None


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no choice is near."""
    found = nearest(word, choices) if isinstance(word, str) else None
    return f"; did you mean {found!r}?" if found else ""


def one_of(choices: Iterable[str], joint: str = "or") -> str:
    """`a, b or c`."""
    words = list(choices)
    return f" {joint} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def quote(text: str) -> str:
    """A short, printable, one-line rendering of text from a file."""
    return repr(text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 1] + "…")


def describe(value: object) -> str:
    """What stands in the file, in the words of YAML."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case str():
            return f"text {quote(value)}"
        case int() | float():
            return f"the number {value}"
        case Mapping():
            return "a mapping" if value else "an empty mapping"
        case _:
            return "a list" if value else "an empty list"


def _fold(word: str) -> str:
    return word.casefold().replace("-", "").replace("_", "")
