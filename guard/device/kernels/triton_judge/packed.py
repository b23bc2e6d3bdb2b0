"""A step's decisions in one buffer, so that one copy takes them to the host."""

from __future__ import annotations

import torch

from guard.device.readback import StepDecisions
from guard.program.program import WORD_BITS, Program
from guard.program.step_report import EventColumn, RequestColumn


class PackedDecisions:
    """Lays out `StepDecisions` as views of one int64 buffer. What the host may want later, the firings
    without values, comes last."""

    def __init__(self, program: Program, max_events: int) -> None:
        self._max_events = max_events
        self._num_rules = program.rule_table.num_rules
        self._most_conditions = program.rule_table.conditions.shape[1]
        self._num_conditions = program.conditions.num_conditions
        self._num_columns = RequestColumn.NUM + len(program.sets)
        self._num_words = max(1, -(-program.masks.num_actions // WORD_BITS))

    def room_for(self, num_rows: int, num_requests: int, device: torch.device) -> StepDecisions:
        """Uninitialised. A rule that fires has to turn false again, hence the number of events."""
        most_events = self._num_rules * ((num_rows + num_requests) // 2)
        num_valued = min(most_events, self._max_events)
        sizes = [
            1,
            num_requests * self._num_columns,
            num_requests * self._num_words,
            -(-num_requests * self._num_conditions // 2),
            num_valued * self._most_conditions,
            most_events * EventColumn.NUM,
        ]
        buffer = torch.empty(sum(sizes), dtype=torch.int64, device=device)
        num_events, requests, masked, extremes, values, events = buffer.split(sizes)
        extremes = extremes.view(torch.float32)[: num_requests * self._num_conditions]
        return StepDecisions(
            requests.view(num_requests, self._num_columns),
            masked.view(num_requests, self._num_words),
            extremes.view(num_requests, self._num_conditions),
            events.view(most_events, EventColumn.NUM),
            values.view(torch.float64).view(num_valued, self._most_conditions),
            num_events,
        )
