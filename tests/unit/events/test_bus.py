"""The bus goes on feeding what still works when something else is broken."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import NoReturn

import msgspec
from prometheus_client import CollectorRegistry

from guard.events.bus import KEPT_DECISIONS, EventBus
from guard.events.log.file import LogLimits
from guard.events.message import Decision, Delta, Hello, News, encode
from guard.events.metrics import GuardMetrics
from tests.unit.events.log.chains import check_files, make_key
from tests.unit.events.reports import HELLO, decision

LABELS = {"model_name": "m", "engine": "0"}


class BrokenMetrics(GuardMetrics):
    def greet(self, hello: object) -> NoReturn:
        raise RuntimeError("injected")

    apply = drop = fail = webhook = subscribers = greet  # type: ignore[assignment]


def test_broken_metrics_stop_neither_the_log_nor_the_greeting(tmp_path: Path) -> None:
    bus = EventBus(BrokenMetrics("m", CollectorRegistry()), "m", tmp_path / "log")
    heard: list[Hello] = []
    bus.on_hello.append(heard.append)

    bus.receive(encode(HELLO))
    bus.receive(encode(Delta(0, revision="rev-1", decisions=[decision()], selections=[0, 0])))
    bus.close()

    assert heard == bus.wait_for_hellos(1, 0) == [HELLO]
    assert [d.model for d in bus.decisions] == ["m"]
    assert json.loads((tmp_path / "log").read_text())["model"] == "m"


def test_faults_are_counted_by_stage_with_the_next_delta() -> None:
    registry = CollectorRegistry()
    bus = EventBus(GuardMetrics("m", registry), "m")
    bus.receive(encode(HELLO))
    bus.receive(b"garbage")
    bus.receive(encode(Delta(0, revision="rev-1", selections=[1, 2, 3])))

    def failures(stage: str) -> float | None:
        return registry.get_sample_value("moe_guard_failures_total", {**LABELS, "stage": stage})

    assert (failures("deliver"), failures("metrics")) == (1, 1)


def test_what_the_log_drops_is_counted_and_never_ends_its_thread(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    bus = EventBus(GuardMetrics("m", registry), "m", tmp_path / "log")
    bus.receive(encode(HELLO))
    bus.close()
    bus.receive(
        encode(Delta(0, revision="rev-1", decisions=[decision(), decision()], selections=[0, 0]))
    )

    name = "moe_guard_events_dropped_total"
    assert registry.get_sample_value(name, {**LABELS, "stage": "decision_log"}) == 2
    EventBus(BrokenMetrics("m", CollectorRegistry()), "m")._dropped(1)


def test_a_log_that_was_cut_off_counts_as_a_failure_of_its_stage(tmp_path: Path) -> None:
    bus = EventBus(GuardMetrics("m", CollectorRegistry()), "m", tmp_path / "log")
    bus.receive(encode(HELLO))
    for count in (2, 1):
        delta = Delta(0, revision="rev-1", decisions=[decision()] * count, selections=[0, 0])
        bus.receive(encode(delta))
        deadline = time.monotonic() + 60
        while (tmp_path / "log").read_bytes().count(b"\n") < count and time.monotonic() < deadline:
            time.sleep(0.01)
        os.truncate(tmp_path / "log", 9)
    bus.close()

    assert bus.failures.count == {"decision_log": 1}


def test_a_bus_seals_its_log_or_leaves_the_chain_out(tmp_path: Path) -> None:
    first_key = make_key(tmp_path / "key")
    metrics = GuardMetrics("m", CollectorRegistry())
    sealed = EventBus(metrics, "m", tmp_path / "sealed", log_key=tmp_path / "key")
    bare = EventBus(metrics, "m", tmp_path / "bare", log_chain=False)
    for bus in (sealed, bare):
        bus.receive(encode(HELLO))
        bus.receive(encode(Delta(0, "rev-1", decisions=[decision()], selections=[0, 0])))
        bus.close()

    assert check_files(tmp_path / "sealed", first_key).num_good == 1
    assert "chain" not in json.loads((tmp_path / "bare").read_text())


def test_nobody_is_greeted_until_an_engine_says_hello() -> None:
    bus = EventBus(GuardMetrics("m", CollectorRegistry()), "m")

    assert bus.wait_for_hellos(1, 0) == []
    bus.receive(encode(HELLO))
    bus.receive(encode(HELLO))
    assert bus.wait_for_hellos(2, 0) == [HELLO]
    other = msgspec.structs.replace(HELLO, engine=1)
    bus.receive(encode(other))
    assert bus.wait_for_hellos(2, 0) == [HELLO, other]
    assert bus.hellos == {0: HELLO, 1: other}


def test_what_engines_said_before_others_start_is_not_counted() -> None:
    bus = EventBus(GuardMetrics("m", CollectorRegistry()), "m")
    bus.receive(encode(HELLO))
    bus.expect_hellos()
    assert bus.wait_for_hellos(1, 0) == []


def test_the_latest_decisions_stay_readable_and_no_more() -> None:
    bus = EventBus(GuardMetrics("m", CollectorRegistry()), "m")
    bus.receive(encode(HELLO))
    many = [decision(str(n)) for n in range(KEPT_DECISIONS + 5)]
    bus.receive(encode(Delta(0, revision="rev-1", decisions=many, selections=[0, 0])))

    assert [d.request_id for d in bus.decisions] == [str(n) for n in range(5, KEPT_DECISIONS + 5)]


def test_news_is_shown_and_neither_counted_nor_written_down(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    bus = EventBus(GuardMetrics("m", registry), "m", tmp_path / "log")
    heard: list[Decision] = []
    bus.on_decision.append(heard.append)
    bus.receive(encode(HELLO))
    before = [(s.name, s.labels, s.value) for m in registry.collect() for s in m.samples]

    bus.receive(encode(News(0, [decision("a"), decision("b")])))
    bus.close()

    assert [(one.request_id, one.model) for one in heard] == [("a", "m"), ("b", "m")]
    assert list(bus.decisions) == heard
    assert (tmp_path / "log").read_text() == ""
    assert before == [(s.name, s.labels, s.value) for m in registry.collect() for s in m.samples]


def test_what_the_log_writes_and_what_becomes_of_webhooks_is_counted(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    bus = EventBus(GuardMetrics("m", registry), "m", tmp_path / "log", LogLimits(max_bytes=1, keep=2))
    bus.receive(encode(HELLO))
    bus.receive(encode(Delta(0, revision="rev-1", decisions=[decision()] * 3, selections=[0, 0])))
    bus.close()
    bus.note_webhook("success")
    bus.note_webhook("dropped", 3)
    bus.note_subscribers(2)

    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    value = registry.get_sample_value
    assert value("moe_guard_log_bytes_total", LABELS) == written > 0
    assert value("moe_guard_event_subscribers", LABELS) == 2
    found = {
        result: value("moe_guard_webhooks_total", {**LABELS, "result": result})
        for result in ("success", "failure", "dropped")
    }
    assert found == {"success": 1, "failure": 0, "dropped": 3}
    broken = EventBus(BrokenMetrics("m", CollectorRegistry()), "m")
    broken.note_subscribers(1)
    broken.note_webhook("success")


def test_a_listener_that_fails_keeps_nobody_else_from_a_decision() -> None:
    def fail(one: object) -> NoReturn:
        raise RuntimeError("injected")

    bus = EventBus(GuardMetrics("m", CollectorRegistry()), "m")
    heard: list[Decision] = []
    bus.on_decision += [fail, heard.append]
    bus.receive(encode(HELLO))
    bus.receive(encode(Delta(0, revision="rev-1", decisions=[decision()] * 2, selections=[0, 0])))

    assert [one.model for one in heard] == ["m", "m"]
    assert bus.failures.count == {"deliver": 2}
