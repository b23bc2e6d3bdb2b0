"""What an engine has counted and decided since it last told: deltas, each of one revision."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from guard.events.message import Decision, DecisionCount, Delta
from guard.events.rulebook import RuleBook
from guard.failures import Stage
from guard.fault_injection import strikes
from guard.program.step_report import HostSeconds, PackedReport, RequestColumn

MAX_PENDING_DECISIONS = 10_000
"""Decisions that may wait for delivery; more are dropped and counted, their counters are not."""

MAX_PENDING_VALUES = 100_000
"""Values of conditions that may wait for delivery; more are dropped and counted in the same way."""

FLUSH_SECONDS = 0.2
"""Counters wait this long at most; decisions and the end of the last request do not wait."""

_BY_NAME = ("tokens", "outcomes", "mask_violations", "failures", "dropped")


class Tally:
    """One engine's. The numbers of rules and sets in it are those of one revision's book at a time.

    quiet_steps: not counted and added up yet, which is done when somebody asks: such a step then costs
        hardly anything
    ledger_s: host time of the engine core's part of the guard; it goes with the next delta and asks for
        none
    """

    def __init__(self, engine: int, book: RuleBook, timer: Callable[[], float]) -> None:
        self._engine = engine
        self._timer = timer
        self._sealed: deque[Delta] = deque()
        self._num_sealed_decisions = 0
        self._flushed_at = 0.0
        self._steps = 0
        self._host_seconds: dict[str, float] = {}
        self.ledger_s = 0.0
        self._begin(book)

    def _begin(self, book: RuleBook) -> None:
        self.revision = book.revision
        self._delta = Delta(self._engine, revision=book.revision)
        self._decision_counts: Counter[tuple[int, str, str]] = Counter()
        self._values: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
        self._num_values = 0
        self._selections = np.zeros(book.num_sets, dtype=np.int64)
        self.quiet_steps: list[PackedReport] = []
        self._moved = False

    def turn_to(self, book: RuleBook, masked_requests: dict[str, int]) -> None:
        """What comes now is of another revision."""
        if self._moved or self.quiet_steps:
            sealed = self._seal(masked_requests)
            self._num_sealed_decisions += len(sealed.decisions)
            self._sealed.append(sealed)
        self._begin(book)

    def count(self, name: str, counts: Mapping[str, int]) -> None:
        """name: one of the delta's counters by a word"""
        into: dict[str, int] = getattr(self._delta, name)
        for key, count in counts.items():
            into[key] = into.get(key, 0) + count
        self._moved = self._moved or bool(counts)

    def add(self, sums_F: NDArray[np.int64]) -> None:
        """Columns of `StepReport.requests_B`, added up over the requests that count."""
        counts = {
            "prompt": int(sums_F[RequestColumn.PROMPT_TOKENS]),
            "output": int(sums_F[RequestColumn.OUTPUT_TOKENS]),
        }
        self.count("tokens", counts)
        self._selections += sums_F[RequestColumn.NUM : RequestColumn.NUM + len(self._selections)]

    def _add_up(self) -> None:
        steps = self.quiet_steps
        if not steps:
            return
        sums_SF = np.frombuffer(b"".join(step.sums for step in steps), dtype=np.int64)
        self.add(sums_SF.reshape(len(steps), -1).sum(axis=0))
        for step in steps:
            self.count_step(step.host)
        steps.clear()

    def observe(self, rule: int, condition: int, value: float) -> None:
        if self._num_values >= MAX_PENDING_VALUES:
            self.drop(Stage.EVENT_BUFFER, 1)
            return
        self._num_values += 1
        self._values[rule, condition].append(value)

    def count_step(self, host: HostSeconds | None = None) -> None:
        """host: of the worker"""
        self._steps += 1
        self._moved = True
        if host is not None:
            for part, seconds in zip(HostSeconds._fields, host, strict=True):
                self._spend(part, seconds)

    def _spend(self, part: str, seconds: float) -> None:
        spent = self._host_seconds
        spent[part] = spent.get(part, 0.0) + seconds

    def decide(self, key: tuple[int, str, str], count: int = 1) -> None:
        """key: number of the rule, mode, phase"""
        self._decision_counts[key] += count
        self._moved = True

    def keep(self, decision: Callable[[], Decision]) -> None:
        waiting = len(self._delta.decisions) + self._num_sealed_decisions
        if waiting >= MAX_PENDING_DECISIONS or strikes(Stage.EVENT_BUFFER):
            self.drop(Stage.EVENT_BUFFER, 1)
        else:
            self._delta.decisions.append(decision())

    def drop(self, stage: Stage, count: int) -> None:
        self.count("dropped", {str(stage): count})

    @property
    def due_at(self) -> float:
        """When counters are to be taken, by the timer."""
        return self._flushed_at + FLUSH_SECONDS

    def take(self, masked_requests: Callable[[], dict[str, int]], *, idle: bool) -> Delta | None:
        """What is due for delivery, if anything. idle: no request is left, so nothing may wait."""
        if self._sealed:
            sealed = self._sealed.popleft()
            self._num_sealed_decisions -= len(sealed.decisions)
            return sealed
        now = self._timer()
        urgent = idle or self._delta.decisions or now >= self.due_at
        if not (self._moved or self.quiet_steps) or not urgent:
            return None
        delta = self._seal(masked_requests())
        self._delta = Delta(self._engine, revision=self.revision)
        self._decision_counts.clear()
        self._values.clear()
        self._num_values = 0
        self._selections[:] = 0
        self._moved, self._flushed_at = False, now
        return delta

    def _seal(self, masked_requests: dict[str, int]) -> Delta:
        self._add_up()
        if self.ledger_s:
            self._spend("ledger", self.ledger_s)
            self.ledger_s = 0.0
        self._delta.decision_counts = [
            DecisionCount(*key, count) for key, count in self._decision_counts.items()
        ]
        self._delta.selections = self._selections.tolist()
        self._delta.values = [(*key, values) for key, values in self._values.items()]
        self._delta.masked_requests = masked_requests
        self._delta.steps, self._steps = self._steps, 0
        self._delta.host_seconds, self._host_seconds = self._host_seconds, {}
        return self._delta

    def put_back(self, delta: Delta) -> None:
        """What `take` gave did not get out: counters go with the next one, decisions are lost."""
        self.drop(Stage.DELIVER, len(delta.decisions))
        if delta.revision != self.revision:
            delta.decisions = []
            self._sealed.appendleft(delta)
            return
        for name in _BY_NAME:
            self.count(name, getattr(delta, name))
        for counted in delta.decision_counts:
            self.decide((counted.rule, counted.mode, counted.phase), counted.count)
        for rule, condition, values in delta.values:
            for value in values:
                self.observe(rule, condition, value)
        self._selections += np.array(delta.selections, dtype=np.int64)
        self._steps += delta.steps
        for part, seconds in delta.host_seconds.items():
            self._spend(part, seconds)
