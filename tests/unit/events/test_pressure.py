"""A policy fires on every token of every request, while what comes behind the engine stands still."""

from __future__ import annotations

import os
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry, make_asgi_app
from prometheus_client.parser import text_string_to_metric_families

from guard.events import tally
from guard.events.bus import KEPT_DECISIONS, EventBus
from guard.events.ledger import Ledger
from guard.events.log import decision_log
from guard.events.log.decision_log import MAX_QUEUED_LINES
from guard.events.message import Delta, Hello, SetFacts, encode
from guard.events.metrics import GuardMetrics
from guard.events.rulebook import RuleBook
from guard.program.step_report import StepReport
from tests.support.drills import drilling
from tests.unit.events.reports import Row, everyone, report, rule

RULES = (rule("first"), rule("second"), rule("third", "mask"))
REQUESTS = 16
FIRINGS = REQUESTS * len(RULES)
SOON_S = 60.0
HELLO = Hello(0, "rev-1", ("p",), RULES, (SetFacts("p", "f"),), {"p": 1}, 0, live=True)


def firing(step: int) -> StepReport:
    """Every rule fires for every request."""
    return report(
        *(
            Row(f"req-{i}", selections=1, extreme=0.5, events=[(r, step, True) for r in range(3)])
            for i in range(REQUESTS)
        )
    )


class Served:
    """An engine's ledger and the bus of the API server that it tells."""

    def __init__(self, log: Path | None = None) -> None:
        self.registry = CollectorRegistry()
        self.bus = EventBus(GuardMetrics("m", self.registry), "m", log)
        self.ledger = Ledger(0, RuleBook("rev-1", RULES, (2,), 1))
        self.steps = 0
        self.bus.receive(encode(HELLO))

    def step(self, *, delivers: bool = True, ends: bool = False) -> None:
        self.steps += 1
        made = firing(self.steps)
        self.ledger.note_step(made)
        self.ledger.begin_step(made, everyone)
        if ends:
            for i in range(REQUESTS):
                self.ledger.finish(f"req-{i}")
        self.ledger.end_step()
        while (delta := self.ledger.take(idle=False)) is not None:
            if not delivers:
                self.ledger.put_back(delta)
                return
            self.bus.receive(encode(delta))

    def deliver(self) -> Delta | None:
        delta = self.ledger.take(idle=True)
        if delta is not None:
            self.bus.receive(encode(delta))
        return delta

    def total(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == f"moe_guard_{name}" and labels.items() <= sample.labels.items()
        )


def grown(run: Callable[[], Any]) -> int:
    """Bytes that are held behind it and were not before."""
    before, _ = tracemalloc.get_traced_memory()
    run()
    after, _ = tracemalloc.get_traced_memory()
    return after - before


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.fixture
def stuck_pipe(tmp_path: Path) -> Iterator[Path]:
    """A decision log whose reader never reads: once it is full, a write waits."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # to write as well, so that it can be emptied
    yield path
    os.set_blocking(reader, False)
    deadline = time.monotonic() + SOON_S
    while time.monotonic() < deadline and any(
        thread.name == "moe-guard-decision-log" for thread in threading.enumerate()
    ):
        try:
            os.read(reader, 1 << 20)
        except BlockingIOError:
            time.sleep(0.01)
    os.close(reader)


@pytest.mark.usefixtures("traced")
def test_while_the_disk_hangs_memory_is_bounded_drops_are_counted_and_counters_are_exact(
    stuck_pipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_log, "CLOSE_SECONDS", 0.1)
    served = Served(stuck_pipe)
    log = served.bus._log
    assert log is not None
    full = MAX_QUEUED_LINES // FIRINGS + 50

    def run(steps: int) -> None:
        for _ in range(steps):
            served.step()

    run(full)
    assert log._lines.qsize() == MAX_QUEUED_LINES
    assert len(served.bus.decisions) == KEPT_DECISIONS
    assert grown(lambda: run(100)) < 200_000, "of 4,800 decisions nothing is held"
    fired = served.steps * FIRINGS
    assert served.total("decisions_total") == fired
    assert served.total("tokens_evaluated_total", phase="output") == served.steps * REQUESTS
    assert served.total("expert_selections_total") == served.steps * REQUESTS
    dropped = served.total("events_dropped_total", stage="decision_log")
    written = fired - dropped - log._lines.qsize()
    assert dropped > 0
    assert 0 <= written < MAX_QUEUED_LINES
    served.bus.close()


@pytest.mark.usefixtures("traced")
def test_while_nothing_gets_out_memory_is_bounded_and_no_counter_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tally, "MAX_PENDING_DECISIONS", 1_000)
    monkeypatch.setattr(tally, "MAX_PENDING_VALUES", 500)
    served = Served()

    def run(steps: int) -> None:
        for _ in range(steps):
            served.step(delivers=False, ends=True)

    run(60)
    assert grown(lambda: run(200)) < 100_000
    delta = served.deliver()
    assert delta is not None
    assert len(delta.decisions) <= 1_000
    assert sum(len(values) for _, _, values in delta.values) == 500
    ended = served.steps * REQUESTS
    assert served.total("decisions_total") == ended * len(RULES)
    assert served.total("requests_total") == ended
    assert served.total("steps_total") == served.steps
    lost = served.total("events_dropped_total", stage="deliver")
    left_out = served.total("events_dropped_total", stage="event_buffer")
    left_out_values = ended * len(RULES) - 500
    assert lost + left_out - left_out_values + len(delta.decisions) == ended * len(RULES)


def test_decisions_of_earlier_revisions_that_could_not_be_told_count_among_those_that_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tally, "MAX_PENDING_DECISIONS", 100)
    served = Served()
    served.ledger.begin_step(firing(1), everyone)
    served.ledger.begin_step(firing(2), everyone)
    for number in range(5):
        book = RuleBook(f"rev-{number + 2}", RULES, (2,), 1)
        served.ledger.follow(book)
        step = firing(number)
        object.__setattr__(step, "revision", book.revision)
        served.ledger.begin_step(step, everyone)
    told = []
    while (delta := served.ledger.take(idle=True)) is not None:
        told.append(delta)
    assert sum(len(delta.decisions) for delta in told) == 100
    counted = sum(count.count for delta in told for count in delta.decision_counts)
    assert counted == 7 * FIRINGS
    assert sum(delta.dropped.get("event_buffer", 0) for delta in told) == counted - 100


def test_a_buffer_without_room_loses_lines_and_no_counter() -> None:
    served = Served()
    with drilling("event_buffer@*/2"):
        for _ in range(4):
            served.step()
    assert served.total("decisions_total") == 4 * FIRINGS
    assert served.total("events_dropped_total", stage="event_buffer") == 4 * FIRINGS / 2
    assert len(served.bus.decisions) == 4 * FIRINGS / 2


@pytest.mark.parametrize(
    ("faults", "dropped"), [("decision_log@*", FIRINGS), ("decision_log@*/3", FIRINGS // 3)]
)
def test_a_full_disk_loses_lines_and_no_counter(tmp_path: Path, faults: str, dropped: int) -> None:
    served = Served(tmp_path / "log")
    with drilling(faults):
        served.step()
        served.bus.close()
    assert served.total("events_dropped_total", stage="decision_log") == dropped
    assert len((tmp_path / "log").read_text().splitlines()) == FIRINGS - dropped
    assert served.total("decisions_total") == FIRINGS


def test_a_slow_disk_holds_up_nobody_and_loses_nothing_that_fits(tmp_path: Path) -> None:
    """The lines are written when the disk comes to them; whoever makes decisions goes on."""
    served = Served(tmp_path / "log")
    with drilling("decision_log=1ms@*"):
        served.step()
        assert served.total("decisions_total") == FIRINGS
        served.bus.close()
    assert served.total("events_dropped_total", stage="decision_log") == 0
    assert len((tmp_path / "log").read_text().splitlines()) == FIRINGS


@pytest.fixture
def page() -> Iterator[tuple[Served, int]]:
    """The metrics page as vLLM mounts it, and its port."""
    served = Served()
    for _ in range(3):
        served.step()
    config = uvicorn.Config(make_asgi_app(served.registry), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield served, listening.getsockname()[1]
    server.should_exit = True
    thread.join(SOON_S)
    listening.close()


def scraped(port: int) -> float:
    text = httpx.get(f"http://127.0.0.1:{port}/", timeout=SOON_S).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "moe_guard_decisions_total"
    )


def test_scrapers_that_never_read_hold_up_neither_the_guard_nor_another_scraper(
    page: tuple[Served, int],
) -> None:
    served, port = page
    stuck = []
    for _ in range(20):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect(("127.0.0.1", port))
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        stuck.append(client)
    try:
        for _ in range(5):
            served.step()
            assert scraped(port) == served.steps * FIRINGS
    finally:
        for client in stuck:
            client.close()
