"""What the numbers in a step's report mean: those of one revision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from guard.events.message import RuleFacts
from guard.program.program import WORD_BITS

KEPT_REVISIONS = 8
"""Of revisions no longer in force, so many are remembered for what was on its way when they ended."""

_MOST_KNOWN_WORDS = 4096
"""So many combinations of masks are looked up but once."""


@dataclass(frozen=True)
class RuleBook:
    """
    rules: in deciding order
    mask_rules: rule of each mask action, in the order of its bits
    num_sets: named sets, whose selections stand behind the fixed columns of a report
    """

    revision: str
    rules: tuple[RuleFacts, ...]
    mask_rules: tuple[int, ...]
    num_sets: int

    @cached_property
    def closed_rules(self) -> tuple[int, ...]:
        """Numbers of the rules that fail closed."""
        return tuple(number for number, rule in enumerate(self.rules) if rule.on_error == "closed")

    @cached_property
    def enforced(self) -> tuple[bool, ...]:
        return tuple(rule.mode == "enforce" for rule in self.rules)

    @cached_property
    def masks(self) -> tuple[RuleFacts, ...]:
        """The rule of each mask action."""
        return tuple(self.rules[rule] for rule in self.mask_rules)

    def masks_in(self, words: tuple[int, ...]) -> frozenset[RuleFacts]:
        """The rules whose mask actions a request's words name."""
        found = self._masks_in.get(words)
        if found is None:
            found = frozenset(
                rule
                for action, rule in enumerate(self.masks)
                if words[action // WORD_BITS] >> (action % WORD_BITS) & 1
            )
            if len(self._masks_in) < _MOST_KNOWN_WORDS:
                self._masks_in[words] = found
        return found

    @cached_property
    def _masks_in(self) -> dict[tuple[int, ...], frozenset[RuleFacts]]:
        return {}


class RuleBooks:
    """The one in force, and the latest of those before: reports of theirs may still come."""

    def __init__(self, book: RuleBook) -> None:
        self.current = book
        self._by_revision = {book.revision: book}

    def add(self, book: RuleBook) -> None:
        self.current = book
        self._by_revision.pop(book.revision, None)
        self._by_revision[book.revision] = book
        while len(self._by_revision) > KEPT_REVISIONS + 1:
            del self._by_revision[next(iter(self._by_revision))]

    def of(self, revision: str) -> RuleBook:
        return self._by_revision[revision]

    def __iter__(self) -> Iterator[RuleBook]:
        return iter(self._by_revision.values())
