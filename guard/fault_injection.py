"""Faults on purpose, for drills and tests: the one seam through which any stage can be made to fail.

    MOE_GUARD_INJECT_FAULTS='evaluate@3,begin_step=200ms@*/5,decision_log@*'

An entry is STAGE@WHEN, or STAGE=MSms@WHEN to wait instead of failing. WHEN is 3 (the third time),
*/5 (every fifth) or * (always), counted in each process on its own. Where a stage is a block of
`Failures.caught`, an exception ends the block before its first line. The others fail in their own
way: to `routing`, no layer reports in a step that the running check looks at; `decision_log` has no
room on its disk, and `event_buffer` none for a decision; a `message` is lost between two processes.

While no drill is on, `Failures.caught` makes what it always makes, and the other places ask one name.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from dis import opname
from types import FrameType, TracebackType
from typing import Any, Final, NamedTuple

from guard.errors import GuardError
from guard.failures import Attempt, Failures, Stage, make_attempts

logger = logging.getLogger(__name__)

FAULTS_VARIABLE: Final = "MOE_GUARD_INJECT_FAULTS"
ALLOW_VARIABLE: Final = "MOE_GUARD_ALLOW_INJECTED_FAULTS"

MESSAGE: Final = "message"
NAMES: Final = (*map(str, Stage), MESSAGE)

MOST_DRILL_SECONDS: Final = 3600.0
"""A drill that nobody ended ends by itself: no server goes on failing because it was forgotten."""

MAX_DELAY_MS: Final = 600_000

_ENTRY: Final = re.compile(
    r"(?P<name>[\w-]+)(?:=(?P<delay>\d{1,9})ms)?@(?:(?P<at>\d{1,9})|\*(?:/(?P<every>\d{1,9}))?)"
)


class FaultInjectionError(GuardError):
    """What a drill is to do cannot be read."""


class InjectedError(RuntimeError):
    """What a drill raises in the place of what a stage does."""


class Fault(NamedTuple):
    """name: one of `NAMES`
    first, every: it strikes at this entry, and at each so many behind it; every 0: only once
    delay_ms: waits so long instead of failing
    """

    name: str
    first: int
    every: int
    delay_ms: int | None = None

    def strikes_at(self, entry: int) -> bool:
        if self.every == 0:
            return entry == self.first
        return entry >= self.first and (entry - self.first) % self.every == 0

    def __str__(self) -> str:
        what = "fails" if self.delay_ms is None else f"waits {self.delay_ms} ms"
        if self.every == 0:
            return f"{self.name} {what} at entry {self.first}"
        return f"{self.name} {what} at every entry" + (f" of {self.every}" if self.every > 1 else "")


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Raises FaultInjectionError."""
    return tuple(_parsed(entry.strip()) for entry in text.split(","))


def _parsed(entry: str) -> Fault:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise FaultInjectionError(
            f"{entry!r} is no fault to inject; write STAGE@3, STAGE@*/5 or STAGE@*, with STAGE=200ms "
            "to wait instead of failing, and commas between several"
        )
    name = match["name"]
    if name not in NAMES:
        near = get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(NAMES)}"
        raise FaultInjectionError(f"{entry!r}: there is no stage {name!r}; {hint}")
    first = int(match["at"] or match["every"] or 1)
    if first < 1:
        raise FaultInjectionError(f"{entry!r}: entries are counted from 1")
    delay_ms = None if match["delay"] is None else int(match["delay"])
    if delay_ms is not None and name in _CANNOT_WAIT:
        raise FaultInjectionError(f"{entry!r}: {name} has nothing that could wait; leave =MSms out")
    if delay_ms is not None and not 1 <= delay_ms <= MAX_DELAY_MS:
        raise FaultInjectionError(f"{entry!r}: a wait takes 1 to {MAX_DELAY_MS} ms")
    return Fault(name, first, 0 if match["at"] else first, delay_ms)


_CANNOT_WAIT: Final = (str(Stage.ROUTING), str(Stage.EVENT_BUFFER), MESSAGE)


class Drill:
    """Faults under way in this process. Safe to call from any thread.

    struck: how often each fault was injected, by name
    """

    def __init__(self, faults: Iterable[Fault], clock: Callable[[], float] = time.monotonic) -> None:
        self.faults = tuple(faults)
        self.struck: Counter[str] = Counter()
        self._entries: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._clock = clock
        self._ends_at = clock() + MOST_DRILL_SECONDS
        self._is_over = False

    def strike(self, name: str) -> Fault | None:
        """Count an entry. The fault that meets it, if one does."""
        with self._lock:
            if self._has_ended():
                return None
            self._entries[name] += 1
            entry = self._entries[name]
            fault = next((f for f in self.faults if f.name == name and f.strikes_at(entry)), None)
            if fault is None:
                return None
            self.struck[name] += 1
            count = self.struck[name]
        if count.bit_count() == 1:
            logger.warning("MoE Guard drill: %s, at entry %d (%d so far)", fault, entry, count)
        return fault

    def _has_ended(self) -> bool:
        if not self._is_over and self._clock() >= self._ends_at:
            self._is_over = True
            logger.warning(
                "MoE Guard's drill is over after %.0f s: no more faults are injected; unset %s",
                MOST_DRILL_SECONDS,
                FAULTS_VARIABLE,
            )
        return self._is_over

    def attempt(self, failures: Failures, stage: Stage) -> Attempt:
        """In the place of the one that `Failures.caught` gives."""
        fault = self.strike(stage)
        return Attempt(failures, stage) if fault is None else _StruckAttempt(failures, stage, fault)


class _StruckAttempt(Attempt):
    """Raises at the first line of the block that it guards. What a context manager raises as it is
    entered would pass by its own exit, so the error is raised from a trace function of the
    block's frame, as a debugger stops there."""

    def __init__(self, failures: Failures, stage: Stage, fault: Fault) -> None:
        super().__init__(failures, stage)
        self._fault = fault
        self._traced: FrameType | None = None
        self._tracers: tuple[Any, Any] = (None, None)

    def __enter__(self) -> Attempt:
        if self._fault.delay_ms is not None:
            time.sleep(self._fault.delay_ms / 1e3)
            return self
        self._traced = frame = sys._getframe(1)
        self._tracers = sys.gettrace(), frame.f_trace
        entered_at = frame.f_lineno

        def fail(at: FrameType, event: str, _: object) -> Any:
            if event == "line" and at.f_lineno != entered_at and not _is_at_nop(at):
                raise InjectedError(f"injected by a drill: {self._fault}")
            return fail

        frame.f_trace = fail
        sys.settrace(lambda *_: None)  # other frames are not looked at
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if self._traced is not None:
            tracer, self._traced.f_trace = self._tracers
            sys.settrace(tracer)
            self._traced, self._tracers = None, (None, None)  # no cycle through the frame
        return super().__exit__(kind, error, traceback)


def _is_at_nop(frame: FrameType) -> bool:
    """As at `try:`. No handler is in charge of what can raise nothing, that of its block neither."""
    return opname[frame.f_code.co_code[frame.f_lasti]] == "NOP"


drill: Drill | None = None
"""The one that is under way in this process."""


def strikes(name: str) -> bool:
    """Whether a fault meets this entry of a place that is no block of `Failures.caught`. One that
    waits has waited."""
    if drill is None:
        return False
    fault = drill.strike(name)
    if fault is not None and fault.delay_ms is not None:
        time.sleep(fault.delay_ms / 1e3)
        return False
    return fault is not None


def begin(faults: Iterable[Fault]) -> Drill:
    """A drill in the place of the one that is under way, if one is."""
    global drill
    drill = Drill(faults)
    make_attempts(drill.attempt)
    logger.warning(
        "MoE Guard DRILL: faults are injected on purpose in this process for up to %.0f s: %s. "
        "Requests follow onError and moe_guard_failures_total moves; to end it, unset %s and restart",
        MOST_DRILL_SECONDS,
        "; ".join(map(str, drill.faults)),
        FAULTS_VARIABLE,
    )
    return drill


def end() -> None:
    global drill
    drill = None
    make_attempts(Attempt)


def conduct(text: str | None) -> None:
    """The drill that this process is to have; the same one goes on. Raises FaultInjectionError."""
    faults = () if text is None else parse_faults(text)
    if drill is not None and drill.faults != faults:
        end()
    if faults and drill is None:
        begin(faults)
