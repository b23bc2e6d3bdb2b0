"""Where an API server, or a program with an offline engine, receives the engines' messages."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from guard.events.log.decision_log import DecisionLog
from guard.events.log.file import LogLimits
from guard.events.message import Decision, Delta, Health, Hello, Load, News, decode, serial_of
from guard.events.metrics import GuardMetrics
from guard.failures import Failures, Stage

KEPT_DECISIONS = 1_000
"""The latest decisions that stay readable in Python."""


class MessagesLostError(RuntimeError):
    """What an engine said did not reach this process: counters and decisions of it are missing here."""


class EventBus:
    """Feeds metrics, the decision log and `decisions`. One a process; safe to call from any thread.

    A fault in here is counted and logged, and never reaches the engine or a request.
    """

    def __init__(
        self,
        metrics: GuardMetrics,
        model: str,
        decision_log: Path | None = None,
        log_limits: LogLimits | None = None,
        *,
        log_chain: bool = True,
        log_key: Path | None = None,
    ) -> None:
        self._metrics = metrics
        self._model = model
        self.failures = Failures()
        self._lock = threading.Lock()
        self._greeting = threading.Condition(self._lock)
        self._greeted: set[int] = set()
        self._serials: dict[int, int] = {}  # of the last message of each engine
        self._log = (
            None
            if decision_log is None
            else DecisionLog(
                decision_log,
                self._dropped,
                log_limits,
                self._wrote,
                self._log_changed,
                chain=log_chain,
                key=log_key,
            )
        )
        self.hellos: dict[int, Hello] = {}
        self.health: dict[int, Health] = {}  # since the hello, where it changed
        self.decisions: deque[Decision] = deque(maxlen=KEPT_DECISIONS)
        self.on_hello: list[Callable[[Hello], None]] = []
        self.on_decision: list[Callable[[Decision], None]] = []  # of what must not wait

    def receive(self, data: bytes) -> None:
        """Take a message of `guard.events.message` from an engine."""
        with self._lock, self.failures.caught(Stage.DELIVER):
            message = decode(data)
            self._note_serial(message.engine, serial_of(data))
            match message:
                case Hello() as hello:
                    with self.failures.caught(Stage.METRICS):
                        self._metrics.greet(hello)
                    self.hellos[hello.engine] = hello
                    self.health.pop(hello.engine, None)
                    for listener in self.on_hello:
                        listener(hello)
                    self._greeted.add(hello.engine)
                    self._greeting.notify_all()
                case Delta() as delta:
                    self._take(delta)
                case News() as news:
                    for decision in news.decisions:
                        self._show(self._named(decision))
                case Health() as health:
                    self.health[health.engine] = health
                    with self.failures.caught(Stage.METRICS):
                        self._metrics.tell(health)
                case Load() as load:
                    with self.failures.caught(Stage.METRICS):
                        self._metrics.show(load)

    def _note_serial(self, engine: int, serial: int) -> None:
        """Nothing says that a message was lost but the number of the one behind it."""
        if serial == 0:
            return
        expected = self._serials.get(engine, serial - 1) + 1
        self._serials[engine] = serial
        if serial > expected:
            lost = serial - expected
            self.failures.note(
                Stage.DELIVER,
                MessagesLostError(f"{lost} messages of engine {engine} were lost on their way"),
            )

    def _take(self, delta: Delta) -> None:
        with self.failures.caught(Stage.METRICS):
            self._metrics.apply(delta)
        for decision in delta.decisions:
            named = self._named(decision)
            if self._log is not None:
                self._log.write(named)
            self._show(named)
        for stage, count in self.failures.take().items():
            for _ in range(count):
                self._metrics.fail(delta.engine, Stage(stage))

    def _named(self, decision: Decision) -> Decision:
        return msgspec.structs.replace(decision, model=self._model)

    def _show(self, decision: Decision) -> None:
        self.decisions.append(decision)
        for listener in tuple(self.on_decision):
            with self.failures.caught(Stage.DELIVER):
                listener(decision)

    @property
    def revision(self) -> str:
        """In force, as the first engine said last."""
        with self._lock:
            return self.hellos[min(self.hellos)].revision if self.hellos else ""

    def note_reload(self, *, succeeded: bool) -> None:
        """A policy set came into force in all engines, or was refused."""
        with self._lock, self.failures.caught(Stage.METRICS):
            for engine in self.hellos:
                self._metrics.reload(engine, succeeded=succeeded)

    def expect_hellos(self) -> None:
        """Engines are about to start: that others were up before says nothing of them."""
        with self._lock:
            self._greeted.clear()

    def wait_for_hellos(self, num_engines: int, timeout_s: float) -> list[Hello]:
        """What the engines said that greeted since `expect_hellos`, waiting until they are so many, or
        until the time is over."""
        with self._lock:
            self._greeting.wait_for(lambda: len(self._greeted) >= num_engines, timeout_s)
            return [self.hellos[engine] for engine in sorted(self._greeted)]

    def note_subscribers(self, count: int) -> None:
        """So many clients read the stream of events in this process."""
        with self.failures.caught(Stage.METRICS):
            self._metrics.subscribers(self._first_engine, count)

    def note_webhook(self, result: str, count: int = 1) -> None:
        """result: see `moe_guard_webhooks_total`"""
        with self.failures.caught(Stage.METRICS):
            self._metrics.webhook(self._first_engine, result, count)

    def note_drop(self, stage: Stage, count: int) -> None:
        """Called by the log's thread too: a fault here must not end that."""
        with self.failures.caught(Stage.METRICS):
            self._metrics.drop(self._first_engine, stage, count)

    def _dropped(self, count: int) -> None:
        self.note_drop(Stage.DECISION_LOG, count)

    def _log_changed(self, error: Exception) -> None:
        self.failures.note(Stage.DECISION_LOG, error)

    def _wrote(self, count: int) -> None:
        with self.failures.caught(Stage.METRICS):
            self._metrics.log_bytes(self._first_engine, count)

    @property
    def _first_engine(self) -> int:
        """What belongs to no engine is counted under the first."""
        return min(list(self.hellos), default=0)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
