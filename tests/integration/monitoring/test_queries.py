"""A real Prometheus scrapes what GuardMetrics exposes, and is asked every query that ships."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry, start_http_server

from tests.support.ports import free_port
from tests.support.synthetic_metrics import MODEL, BusyServer, VllmMetrics
from tools.prometheus import Prometheus, PromQLError, running
from tools.promql_check import (
    RULES,
    Query,
    check,
    dashboard_queries,
    faulty_rules,
    rule_queries,
)

PATIENCE_S = 20.0
EMPTY_AT_REST = {"alert MoeGuardMissing", "alert MoeGuardAbsent"}
"""Alerts about series that are not there; each has a test below that fills it."""


@dataclass(frozen=True)
class Scene:
    """started: before anything was scraped. other: what a second server exposes, at first nothing."""

    base_url: str
    started: float
    other: CollectorRegistry
    other_address: str


@contextmanager
def exposed(registry: CollectorRegistry) -> Iterator[str]:
    port = free_port()
    server, thread = start_http_server(port, "127.0.0.1", registry)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def busy(server: BusyServer) -> Iterator[None]:
    done = threading.Event()

    def work() -> None:
        while not done.wait(0.3):
            server.step()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield
    finally:
        done.set()
        worker.join()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    started = time.time()
    registry, other = CollectorRegistry(), CollectorRegistry()
    with (
        exposed(registry) as address,
        exposed(other) as other_address,
        busy(BusyServer(registry)),
        running(
            tmp_path_factory.mktemp("prometheus"), [address, other_address], RULES.read_text("utf-8")
        ) as base_url,
    ):
        assert check(base_url, [Query("a guard", "moe_guard_up")], patience_s=PATIENCE_S).empty == ()
        yield Scene(base_url, started, other, other_address)


def test_every_query_of_every_rule_gives_data(scene: Scene) -> None:
    silent = [query for query in rule_queries() if query.where in EMPTY_AT_REST]
    others = [query for query in rule_queries() if query not in silent]
    assert len(silent) == len(EMPTY_AT_REST) <= 5

    found = check(scene.base_url, others, patience_s=PATIENCE_S)

    assert (found.broken, found.empty) == ({}, ())
    assert check(scene.base_url, silent).broken == {}
    assert faulty_rules(scene.base_url) == {}


def test_every_query_of_every_panel_variable_and_annotation_gives_data(scene: Scene) -> None:
    queries = dashboard_queries()
    assert len(queries) > 60

    found = check(scene.base_url, queries, patience_s=PATIENCE_S)

    assert (found.broken, found.empty) == ({}, ())


def test_a_query_that_does_not_parse_or_gives_nothing_is_told(scene: Scene) -> None:
    asked = [Query("nonsense", "rate(moe_guard_up"), Query("nobody", "moe_guard_nobody")]

    found = check(scene.base_url, asked)

    assert "unclosed left parenthesis" in found.broken["nonsense"]
    assert found.empty == ("nobody",)
    with pytest.raises(PromQLError):
        Prometheus(scene.base_url).query("rate(moe_guard_up)")


def test_absent_gives_data_where_no_guard_is_seen(scene: Scene) -> None:
    (absent,) = (query for query in rule_queries() if query.where == "alert MoeGuardAbsent")
    prometheus = Prometheus(scene.base_url)
    assert prometheus.query(absent.expr) == []

    found = prometheus.query(absent.expr, at=scene.started - 3600)

    assert [sample["value"][1] for sample in found] == ["1"]


def test_missing_names_the_server_that_shows_vllm_and_no_guard(scene: Scene) -> None:
    (missing,) = (query for query in rule_queries() if query.where == "alert MoeGuardMissing")
    prometheus = Prometheus(scene.base_url)
    assert prometheus.query(missing.expr) == []

    VllmMetrics(scene.other).step()

    assert check(scene.base_url, [missing], patience_s=PATIENCE_S).empty == ()
    (sample,) = prometheus.query(missing.expr)
    labels = sample["metric"]
    assert (labels["instance"], labels["model_name"]) == (scene.other_address, MODEL)


def test_alerts_of_what_the_synthetic_server_does_are_pending_or_firing(scene: Scene) -> None:
    expected = {
        "MoeGuardCriticalPolicyFired",
        "MoeGuardPolicyBlocks",
        "MoeGuardRequestsUnjudged",
        "MoeGuardFaults",
        "MoeGuardEventsDropped",
        "MoeGuardWebhooksFailing",
    }

    deadline = time.monotonic() + PATIENCE_S
    while True:
        alerts = Prometheus(scene.base_url).get("alerts", {})["alerts"]
        active = {alert["labels"]["alertname"] for alert in alerts}
        if expected <= active or time.monotonic() > deadline:
            break
        time.sleep(0.5)

    assert expected <= active
    assert not active & {"MoeGuardDown", "MoeGuardBlind", "MoeGuardUnreachable", "MoeGuardAbsent"}
    texts = [text for alert in alerts for text in alert["annotations"].values()]
    assert not [text for text in texts if "<error" in text or "<no value>" in text]
