"""The stream of decisions and the live page, over real HTTP with the routes of the plugin."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from guard_vllm.admin import context as admin
from guard_vllm.admin import live, stream
from guard_vllm.admin.context import AdminContext
from guard_vllm.admin.stream import EventStream, end_streams_with, event_stream

from guard.failures import Stage
from tools.fake_admin import KEY, VIEWER_KEY, FakeServer, fake_server

STREAM = "/guard/v1/events/stream"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with fake_server(tmp_path) as fake:
        yield fake


class Client:
    """A connection of its own, so that a stream can be left open."""

    def __init__(self, server: FakeServer, path: str, key: str | None = VIEWER_KEY) -> None:
        parts = urlsplit(server.base_url)
        self.connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.connection.request("GET", path, headers=headers)
        self.response = self.connection.getresponse()

    def event(self) -> dict[str, str]:
        """The next one; a comment is under ''."""
        found: dict[str, str] = {}
        while line := self.response.readline().decode().rstrip("\n"):
            name, _, value = line.partition(": ")
            found[name] = value
        return found

    def close(self) -> None:
        self.response.close()
        self.connection.close()


@pytest.fixture
def connect(server: FakeServer) -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def make(path: str = STREAM, key: str | None = VIEWER_KEY) -> Client:
        clients.append(Client(server, path, key))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def subscribers(server: FakeServer) -> float | None:
    labels = {"model_name": "demo/model", "engine": "0"}
    return server.registry.get_sample_value("moe_guard_event_subscribers", labels)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


@pytest.mark.parametrize("path", [STREAM, "/guard/events"])
def test_each_decision_comes_with_its_id_as_it_happens(
    server: FakeServer, connect: Callable[..., Client], path: str
) -> None:
    client = connect(path)
    assert client.response.status == 200
    assert client.response.headers["Content-Type"].startswith("text/event-stream")
    assert client.response.headers["Cache-Control"] == "no-store"
    assert client.event() == {"": "MoE Guard"}
    for _ in range(2):
        server.decide()
        event = client.event()
        data = json.loads(event["data"])
        assert event["event"] == "decision"
        assert event["id"] == data["decision_id"] == server.bus.decisions[-1].decision_id
        assert data["model"] == "demo/model"


@pytest.mark.parametrize("path", [STREAM, "/guard/events"])
@pytest.mark.parametrize(
    ("key", "status"), [(None, 401), ("wrong", 401), (VIEWER_KEY, 200), (KEY, 200)]
)
def test_who_has_no_key_reads_nothing(
    connect: Callable[..., Client], path: str, key: str | None, status: int
) -> None:
    assert connect(path, key).response.status == status


def test_clients_are_counted_and_a_place_is_free_again_when_one_goes(
    server: FakeServer, connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MAX_SUBSCRIBERS", 2)
    first, second, third = connect(), connect(), connect()
    assert [one.response.status for one in (first, second, third)] == [200, 200, 503]
    assert "close one" in json.loads(third.response.read())["detail"]
    assert subscribers(server) == 2

    first.close()
    wait_until(lambda: subscribers(server) == 1)
    assert connect().response.status == 200
    assert subscribers(server) == 2


def test_a_silent_stream_has_a_heartbeat(
    connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.05)
    client = connect()

    assert [client.event().keys() for _ in range(3)] == [{""}] * 3


def test_streams_end_with_the_engine(server: FakeServer, connect: Callable[..., Client]) -> None:
    class Engine:
        def shutdown(self) -> str:
            return "down"

    engine = Engine()
    end_streams_with(engine, server.bus)
    end_streams_with(engine, server.bus)
    client = connect()
    server.decide()

    assert engine.shutdown() == "down"
    assert client.response.read().count(b"event: decision") == 1
    wait_until(lambda: subscribers(server) == 0)


def test_a_slow_client_is_told_how_much_it_lost_and_where(server: FakeServer) -> None:
    """Nothing is read until all has happened, in another thread than the loop's."""

    async def read() -> list[bytes]:
        events = EventStream(server.bus)
        subscription = events.subscribe()
        assert subscription is not None
        thread = threading.Thread(target=server.decide, kwargs={"times": 8})
        thread.start()
        thread.join()
        lines = subscription.lines()
        found = [await anext(lines) for _ in range(3)]
        server.decide()  # there is room again
        return [*found, *[await anext(lines) for _ in range(3)]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "MAX_QUEUED_EVENTS", 3)
        events = asyncio.run(read())

    kinds = [re.findall(rb"^(?:event: |: )(.*)$", event, re.MULTILINE)[0].decode() for event in events]
    assert kinds == ["MoE Guard", "decision", "decision", "decision", "dropped", "decision"]
    assert b'data: {"count":5}\n' in events[4]
    labels = {"model_name": "demo/model", "engine": "0", "stage": Stage.DELIVER}
    assert server.registry.get_sample_value("moe_guard_events_dropped_total", labels) == 5


def test_a_loop_that_is_stuck_gets_one_wake_up_and_a_closed_one_is_left(server: FakeServer) -> None:
    woken: list[object] = []
    is_closed = False

    class Loop:
        def call_soon_threadsafe(self, *what: object) -> None:
            if is_closed:
                raise RuntimeError("Event loop is closed")
            woken.append(what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "get_running_loop", Loop)
        events = EventStream(server.bus)
        assert events.subscribe() is not None
        server.decide(times=500)
        assert len(woken) == 1
        assert subscribers(server) == 1
        is_closed = True
        assert events.subscribe() is not None
        server.decide()

    assert subscribers(server) == 1  # the one that did not have to be woken again


def test_a_bus_has_one_stream(server: FakeServer) -> None:
    assert event_stream(server.bus) is event_stream(server.bus)
    assert event_stream(server.bus) in [
        getattr(listener, "__self__", None) for listener in server.bus.on_decision
    ]


def test_the_page_needs_no_key_and_may_load_nothing_but_itself(connect: Callable[..., Client]) -> None:
    client = connect("/guard/", None)
    html = client.response.read().decode()
    headers = client.response.headers

    assert client.response.status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_the_page_is_one_file_that_makes_no_html_of_what_it_gets() -> None:
    html = live.PAGE.read_text("utf-8")

    assert not re.findall(r"""(?:src|href)\s*=|https?://|@import|url\(""", html)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", html)
    assert not re.findall(
        r"""\son\w+\s*=\s*["']|\sstyle\s*=\s*["']""", html
    )  # the policy would refuse them
    assert "localStorage" not in html
    assert len(html) < 30_000


@pytest.mark.parametrize("path", ["/guard/", STREAM, "/guard/events"])
def test_without_admin_keys_there_is_nothing(
    server: FakeServer, connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    own = server.context
    keyless = AdminContext(own.settings, own.bus, own.store, own.desk, own.reloader, None)
    for contexts in ([keyless], []):
        monkeypatch.setattr(admin, "_contexts", contexts)
        assert connect(path, KEY).response.status == 404


def test_the_description_of_the_api_has_the_stream(connect: Callable[..., Client]) -> None:
    paths: dict[str, Any] = json.loads(connect("/openapi.json", None).response.read())["paths"]
    assert {STREAM, "/guard/events"} <= set(paths)
    assert "/guard/" not in paths
    assert "text/event-stream" in paths[STREAM]["get"]["responses"]["200"]["content"]
