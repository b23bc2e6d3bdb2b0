"""The bus goes on feeding what still works when something else is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import msgspec
from prometheus_client import CollectorRegistry

from guard.events.bus import KEPT_DECISIONS, EventBus
from guard.events.message import Delta, Hello, encode
from guard.events.metrics import GuardMetrics
from tests.unit.events.reports import HELLO, decision

LABELS = {"model_name": "m", "engine": "0"}


class BrokenMetrics(GuardMetrics):
    def greet(self, hello: object) -> NoReturn:
        raise RuntimeError("injected")

    apply = drop = fail = greet  # type: ignore[assignment]


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
