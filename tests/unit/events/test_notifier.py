"""Webhooks over real HTTP: what is sent, what is sent again, what is given up, what is dropped."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest

from guard.events import notifier
from guard.events.message import Decision
from guard.events.notification import MAX_ALERTS, notification
from guard.events.notifier import Notifier
from guard.events.webhooks import Webhook
from guard.failures import Failures
from tests.unit.events.reports import decision


class Receiver:
    """answers: codes, one for each request; then 200"""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: list[int] = []
        self.location: str | None = None
        self.go_on = threading.Event()
        self.go_on.set()
        self.got: list[tuple[str, dict[str, str], Any]] = []

    def wait_for(self, count: int, timeout_s: float = 10.0) -> None:
        wait_until(lambda: len(self.got) >= count, timeout_s)


def wait_until(is_so: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


@contextmanager
def receiving() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.got.append((self.command, dict(self.headers), json.loads(body)))
            made.go_on.wait(10)
            self.send_response(made.answers.pop(0) if made.answers else 200)
            if made.location is not None:
                self.send_header("Location", made.location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            made.got.append((self.command, dict(self.headers), None))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made = Receiver(f"http://127.0.0.1:{server.server_port}/hook/SECRET-PATH")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as one:
        yield one


class Counted:
    def __init__(self) -> None:
        self.results: Counter[str] = Counter()

    def __call__(self, result: str, count: int) -> None:
        self.results[result] += count


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifier, "GROUP_SECONDS", 0.2)
    monkeypatch.setattr(notifier, "FIRST_DELAY_S", 0.05)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)


@contextmanager
def notifying(counted: Counted, *webhooks: Webhook) -> Iterator[Notifier]:
    failures = Failures()
    running = Notifier(webhooks, counted, failures)
    running.start()
    yield running
    running.stop()
    assert not failures.count


def of(policy: str = "p", rule: str = "r", **facts: Any) -> Decision:
    return msgspec.structs.replace(decision(), policy=policy, rule=rule, **facts)


def test_a_decision_reaches_the_receiver_with_the_token(receiver: Receiver, counted: Counted) -> None:
    with notifying(counted, Webhook(receiver.url, token="s3cret")) as running:
        running.offer(of())
        receiver.wait_for(1)
        wait_until(lambda: counted.results["success"] == 1)

    ((command, headers, body),) = receiver.got
    assert command == "POST"
    assert headers["Authorization"] == "Bearer s3cret"
    assert headers["Content-Type"] == "application/json"
    assert body["alerts"][0]["labels"]["policy"] == "p"
    assert counted.results == {"success": 1}


def test_decisions_of_a_rule_within_a_second_come_together(
    receiver: Receiver, counted: Counted
) -> None:
    with notifying(counted, Webhook(receiver.url)) as running:
        for rule in ("a", "b", "a", "a"):
            running.offer(of(rule=rule))
        receiver.wait_for(2)

    assert [(body["groupLabels"]["rule"], len(body["alerts"])) for _, _, body in receiver.got] == [
        ("a", 3),
        ("b", 1),
    ]


def test_what_fails_is_sent_again_the_same_until_it_is_taken(
    receiver: Receiver, counted: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    receiver.answers = [500, 429, 503]
    with notifying(counted, Webhook(receiver.url)) as running:
        running.offer(of())
        receiver.wait_for(4)
        wait_until(lambda: counted.results["success"] == 1)

    assert len(receiver.got) == 4
    assert len({json.dumps(body) for _, _, body in receiver.got}) == 1
    assert counted.results == {"success": 1}
    told = [record.message for record in caplog.records]
    assert told == [
        "MoE Guard: the webhook at 127.0.0.1 answers 500",
        "MoE Guard: the webhook at 127.0.0.1 takes notifications again",
    ]


def test_waits_grow_and_vary(
    receiver: Receiver, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        spread.append((low, high))
        return 1.0

    monkeypatch.setattr("random.uniform", uniform)
    monkeypatch.setattr(notifier, "MAX_DELAY_S", 0.15)
    receiver.answers = [500] * 4
    begun = time.monotonic()
    with notifying(counted, Webhook(receiver.url)) as running:
        running.offer(of())
        receiver.wait_for(5)

    assert spread == [(0.5, 1.5)] * 4
    assert time.monotonic() - begun > 0.2 + 0.05 + 0.1 + 0.15 + 0.15


@pytest.mark.parametrize("code", [400, 401, 404, 410])
def test_a_refusal_that_will_not_pass_is_not_repeated(
    receiver: Receiver, counted: Counted, code: int
) -> None:
    receiver.answers = [code]
    with notifying(counted, Webhook(receiver.url)) as running:
        running.offer(of())
        wait_until(lambda: counted.results["failure"] == 1)

    assert len(receiver.got) == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_its_token_goes_nowhere(
    receiver: Receiver, counted: Counted, code: int
) -> None:
    with receiving() as elsewhere:
        receiver.answers, receiver.location = [code], elsewhere.url
        with notifying(counted, Webhook(receiver.url, token="s3cret")) as running:
            running.offer(of())
            wait_until(lambda: counted.results["failure"] == 1)

        assert elsewhere.got == []


def test_after_a_while_it_is_given_up_and_the_next_one_goes_out(
    receiver: Receiver, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "GIVE_UP_S", 0.3)
    receiver.answers = [500] * 100
    with notifying(counted, Webhook(receiver.url)) as running:
        running.offer(of())
        wait_until(lambda: counted.results["failure"] == 1)
        receiver.answers = []
        running.offer(of())
        wait_until(lambda: counted.results["success"] == 1)

    assert len(receiver.got) < 12


def test_a_host_that_is_not_there_is_a_failure_without_its_secrets(
    counted: Counted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notifier, "GIVE_UP_S", 0.1)
    with notifying(counted, Webhook("http://127.0.0.1:9/SECRET?x=SECRET", token="SECRET")) as running:
        running.offer(of())
        wait_until(lambda: counted.results["failure"] == 1)

    assert "the webhook at 127.0.0.1 cannot be reached" in caplog.text
    assert "SECRET" not in caplog.text


def test_a_slow_receiver_loses_what_does_not_fit_and_holds_up_nobody(
    receiver: Receiver, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "MAX_WAITING", 3)
    receiver.go_on.clear()
    with receiving() as other, notifying(counted, Webhook(receiver.url), Webhook(other.url)) as running:
        running.offer(of())
        receiver.wait_for(1)
        wait_until(lambda: counted.results["success"] == 1)  # the other's
        begun = time.monotonic()
        for _ in range(10):
            running.offer(of())
        assert time.monotonic() - begun < 0.1
        receiver.go_on.set()
        wait_until(lambda: counted.results["success"] == 4)

    assert counted.results["dropped"] == 7 * 2  # both had room for three
    assert [len(body["alerts"]) for _, _, body in receiver.got] == [1, 3]


def test_at_the_end_what_waits_is_sent_once_more(
    receiver: Receiver, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "GROUP_SECONDS", 60.0)
    with notifying(counted, Webhook(receiver.url)) as running:
        running.offer(of())
        time.sleep(0.05)
    assert counted.results == {"success": 1}
    running.offer(of())
    assert counted.results == {"success": 1, "dropped": 1}


def test_the_end_does_not_wait_for_a_receiver_that_hangs(
    receiver: Receiver, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "CLOSE_SECONDS", 0.3)
    receiver.go_on.clear()
    running = Notifier([Webhook(receiver.url)], counted, Failures())
    running.start()
    running.offer(of())
    receiver.wait_for(1)
    begun = time.monotonic()
    running.stop()

    assert time.monotonic() - begun < 2


def test_the_payload_is_what_alertmanager_sends() -> None:
    first = of(decision_id="d1", time="2026-11-30T10:00:00.000Z", request_id="cmpl-1", model="m")
    second = msgspec.structs.replace(first, decision_id="d2", request_id="cmpl-2", phase="prompt")

    payload = notification([first, second])

    labels = {
        "alertname": "MoeGuardPolicyFired", "policy": "p", "rule": "r", "severity": first.severity,
        "mode": first.mode, "action": first.action, "outcome": first.outcome, "phase": first.phase,
        "model_name": "m",
    }  # fmt: skip
    assert payload == {
        "version": "4",
        "groupKey": '{}:{alertname="MoeGuardPolicyFired", policy="p", rule="r"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "moe-guard",
        "groupLabels": {"alertname": "MoeGuardPolicyFired", "policy": "p", "rule": "r"},
        "commonLabels": {name: value for name, value in labels.items() if name != "phase"},
        "commonAnnotations": {
            "summary": payload["alerts"][0]["annotations"]["summary"],
            "description": "rate 0.5, threshold 0.25; mass unknown, threshold 0.1",
            "revision": first.revision,
        },
        "externalURL": "",
        "alerts": payload["alerts"],
    }
    one, other = payload["alerts"]
    assert one["labels"] == labels
    assert one["startsAt"] == "2026-11-30T10:00:00.000Z"
    assert one["endsAt"] == "0001-01-01T00:00:00Z"
    assert one["annotations"]["request_id"] == "cmpl-1"
    assert set(one) == {
        "status", "labels", "annotations", "startsAt", "endsAt", "generatorURL", "fingerprint",
    }  # fmt: skip
    assert one["fingerprint"] != other["fingerprint"]
    assert notification([first])["alerts"][0]["fingerprint"] == one["fingerprint"]


def test_of_very_many_the_first_are_told_and_the_rest_counted() -> None:
    payload = notification([of()] * (MAX_ALERTS + 7))

    assert (len(payload["alerts"]), payload["truncatedAlerts"]) == (MAX_ALERTS, 7)
