"""Which API server tells webhooks of decisions, and until when."""

from __future__ import annotations

from pathlib import Path

import pytest
from guard_vllm import notifying
from guard_vllm.notifying import notify_webhooks
from guard_vllm.settings import Settings
from prometheus_client import CollectorRegistry

from guard.events.bus import EventBus
from guard.events.message import Delta, encode
from guard.events.metrics import GuardMetrics
from guard.events.webhooks import WebhookError
from tests.unit.events.reports import HELLO, decision
from tests.unit.events.test_notifier import receiving


class Engine:
    def __init__(self) -> None:
        self.stops = 0

    def shutdown(self) -> None:
        self.stops += 1


class Reloads:
    def __init__(self, *, watches: bool = True) -> None:
        self.watches = watches


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def bus(registry: CollectorRegistry) -> EventBus:
    made = EventBus(GuardMetrics("m", registry), "m")
    made.receive(encode(HELLO))
    return made


def file_of(folder: Path, url: str) -> str:
    path = folder / "webhooks.yaml"
    path.write_text(f"- url: {url}\n")
    return str(path)


def fire(bus: EventBus) -> None:
    bus.receive(encode(Delta(0, revision="rev-1", decisions=[decision()], selections=[0, 0])))


def test_the_first_server_tells_until_its_engine_is_shut_down(
    tmp_path: Path, bus: EventBus, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifying, "reloader", Reloads)
    engine = Engine()
    with receiving() as receiver:
        settings = Settings(policies="p", webhooks=file_of(tmp_path, receiver.url))
        for _ in range(2):  # vLLM asks more than once
            notify_webhooks(engine, settings, bus)
        fire(bus)
        engine.shutdown()  # what waits still goes out
        engine.shutdown()
        fire(bus)

    assert engine.stops == 2
    assert [len(body["alerts"]) for _, _, body in receiver.got] == [1]
    labels = {"model_name": "m", "engine": "0", "result": "success"}
    assert registry.get_sample_value("moe_guard_webhooks_total", labels) == 1


@pytest.mark.parametrize(
    ("own", "webhooks"), [(None, True), (Reloads(watches=False), True), (Reloads(), False)]
)
def test_others_tell_nobody(
    tmp_path: Path,
    bus: EventBus,
    monkeypatch: pytest.MonkeyPatch,
    own: Reloads | None,
    webhooks: bool,
) -> None:
    monkeypatch.setattr(notifying, "reloader", lambda: own)
    path = file_of(tmp_path, "https://a") if webhooks else None
    notify_webhooks(Engine(), Settings(policies="p", webhooks=path), bus)

    assert bus.on_decision == []


def test_a_file_that_went_bad_is_refused(
    tmp_path: Path, bus: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifying, "reloader", Reloads)
    with pytest.raises(WebhookError):
        notify_webhooks(Engine(), Settings(policies="p", webhooks=file_of(tmp_path, "ftp://a")), bus)
