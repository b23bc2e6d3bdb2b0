"""A step's decisions in one buffer, so that one copy takes them to the host, into memory that is used
again."""

from __future__ import annotations

from typing import NamedTuple

import torch

from guard.program.program import WORD_BITS, Program
from guard.program.step_report import EventColumn, RequestColumn


class Packing(NamedTuple):
    """How a step's decisions lie in an int64 buffer: their number of events, then `requests_B`,
    `masked_BW`, `extremes_BC`, `values_V` and `events_V`, see `StepDecisions`. Behind `head_words` are
    the events without values, which the host seldom wants."""

    num_requests: int
    num_columns: int
    num_words: int
    num_conditions: int
    most_conditions: int
    num_valued: int
    most_events: int

    @staticmethod
    def of(program: Program, num_rows: int, num_requests: int, max_events: int) -> Packing:
        """A rule that fires has to turn false again, so it does at most at every second row."""
        most_events = program.rule_table.num_rules * ((num_rows + num_requests) // 2)
        return Packing(
            num_requests,
            RequestColumn.NUM + len(program.sets),
            max(1, -(-program.masks.num_actions // WORD_BITS)),
            program.conditions.num_conditions,
            program.rule_table.conditions.shape[1],
            min(most_events, max_events),
            most_events,
        )

    @property
    def _sizes(self) -> list[int]:
        return [
            1,
            self.num_requests * self.num_columns,
            self.num_requests * self.num_words,
            -(-self.num_requests * self.num_conditions // 2),
            self.num_valued * self.most_conditions,
        ]

    @property
    def head_words(self) -> int:
        return sum(self._sizes) + self.num_valued * EventColumn.NUM

    @property
    def all_words(self) -> int:
        return sum(self._sizes) + self.most_events * EventColumn.NUM

    def views(
        self, buffer: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first six of `StepDecisions`, with as many events as the buffer holds."""
        sizes = self._sizes
        num_events, requests, masked, extremes, values, events = buffer.split(
            [*sizes, len(buffer) - sum(sizes)]
        )
        extremes = extremes.view(torch.float32)[: self.num_requests * self.num_conditions]
        return (
            requests.view(self.num_requests, self.num_columns),
            masked.view(self.num_requests, self.num_words),
            extremes.view(self.num_requests, self.num_conditions),
            events.view(-1, EventColumn.NUM),
            values.view(torch.float64).view(self.num_valued, self.most_conditions),
            num_events,
        )


class PackedDecisions(NamedTuple):
    """buffer: int64 [all_words]; requests_B: the view of it that the step's own decisions have"""

    buffer: torch.Tensor
    packing: Packing
    requests_B: torch.Tensor


class PinnedPool:
    """Buffers of the host that copies go to, given back when they were read. Allocating pinned memory
    can wait for the device, so a step does it only until there are as many as steps in flight."""

    def __init__(self, *, pinned: bool = True) -> None:
        self._pinned = pinned
        self._free: dict[
            int, list[torch.Tensor]
        ] = {}  # by size; lists, since another thread gives back

    def take(self, num_words: int) -> torch.Tensor:
        """int64 [num_words or more]"""
        size = 1 << max(9, (num_words - 1).bit_length())
        free = self._free.setdefault(size, [])
        try:
            return free.pop()
        except IndexError:
            return torch.empty(size, dtype=torch.int64, pin_memory=self._pinned)

    def give_back(self, buffer: torch.Tensor) -> None:
        self._free[len(buffer)].append(buffer)
