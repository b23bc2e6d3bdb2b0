"""A real Prometheus beside a real server under a mixed load: everything that ships shows something, all
ways to learn of decisions agree to the last one, and what goes wrong raises its alert."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from guard.cli.demonstration.assets import find_assets
from guard.fault_injection import ALLOW_VARIABLE, FAULTS_VARIABLE
from tests.integration.server.conftest import Server, serving
from tools.accounting import Listener, by_key, counted, logged, series
from tools.mixed_load import TENANT_HEADER, MixedLoad, Seen
from tools.mixed_policies import write_policies
from tools.prometheus import Prometheus, running
from tools.promql_check import RULES, check, dashboard_queries, rule_queries

pytestmark = pytest.mark.vllm

KEY = "operators-key"
API_SERVERS = 2
REQUESTS = 60
LISTENERS = 4
"""Each at one of the API servers, by chance."""

PATIENCE_S = 60.0
SCRAPE_S = 3
LOST_LINE = 1_500
"""Of the decision log: its thread fails there, later than the first load."""

EMPTY_AT_REST = {"alert MoeGuardMissing", "alert MoeGuardAbsent"}
"""Alerts about series that are not there; see `test_queries.py`."""

LAYER, EXPERT = 1, 5
WATCH_ONE = f"""\
apiVersion: moe-guard/v1
kind: Policy
metadata: {{name: watch-one, severity: info}}
spec:
  mode: enforce
  experts: {{one: [{{layer: {LAYER}, experts: [{EXPERT}]}}]}}
  rules:
    - {{name: any, when: {{count: {{experts: one, over: request, above: 100000}}}}}}
"""
BROKEN = "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: Not A Name}\n"


@dataclass(frozen=True)
class Scene:
    """listened: by each listener, what it heard of a load; seen: what the load's clients saw"""

    server: Server
    prometheus: Prometheus
    base_url: str
    seen: Seen
    listened: list[list[dict[str, Any]]]

    def admin(self, method: str, path: str, body: object = None) -> Any:
        headers = {"Authorization": f"Bearer {KEY}"}
        url = f"{self.server.address}/guard/v1{path}"
        answer = httpx.request(method, url, json=body, headers=headers, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def call_worker(self, method: str, *args: Any) -> None:
        url, body = f"{self.server.address}/collective_rpc", {"method": method, "args": list(args)}
        httpx.post(url, json=body, timeout=60).raise_for_status()

    def wait_for(self, condition: Callable[[], bool], what: str, times: int = 1) -> None:
        deadline = time.monotonic() + times * PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.3)

    def tokens(self) -> float:
        """That Prometheus knows to have been evaluated."""
        return self.total("moe_guard_tokens_evaluated_total")

    def total(self, series: str) -> float:
        """As of the last scrape that succeeded: a busy machine may miss some."""
        [sample] = self.prometheus.query(f"sum(last_over_time({series}[1m]))")
        return float(sample["value"][1])

    def alerts(self) -> set[str]:
        firing = self.prometheus.get("alerts", {})["alerts"]
        return {alert["labels"]["alertname"] for alert in firing if alert["state"] == "firing"}


@contextmanager
def load_going_on(server: Server) -> Iterator[None]:
    done = threading.Event()
    load = MixedLoad(f"{server.address}/v1", "tiny", concurrency=3, seed=1)
    worker = threading.Thread(target=load.run, kwargs={"until": done.is_set})
    worker.start()
    try:
        yield
    finally:
        done.set()
        worker.join()
        assert not load.seen.errors


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("monitored")
    keys = folder / "keys.yaml"
    keys.write_text(f"{KEY}: {{name: alice, role: admin}}\n")
    keys.chmod(0o600)
    options = ["--admin-keys", str(keys), "--state-dir", str(folder / "state")]
    options += ["--api-server-count", str(API_SERVERS), "--label-header", f"tenant={TENANT_HEADER}"]
    options += ["--worker-extension-cls", "tests.support.routing_faults.RoutingFaults"]
    policies = write_policies(folder / "policies")
    (policies / "watch-one.yaml").write_text(WATCH_ONE)
    prometheus_folder = folder / "prometheus"
    prometheus_folder.mkdir()
    with (
        serving(
            folder / "server",
            find_assets().model,
            *options,
            policies=policies,
            environment={
                "VLLM_SERVER_DEV_MODE": "1",  # by which a test reaches the worker
                FAULTS_VARIABLE: f"decision_log@{LOST_LINE}",
                ALLOW_VARIABLE: "1",
            },
        ) as server,
        running(
            prometheus_folder,
            [server.address.removeprefix("http://")],
            RULES.read_text("utf-8"),
            is_hasty=True,
            scrape_s=SCRAPE_S,
        ) as base_url,
    ):
        with ExitStack() as listening:
            listeners = [
                listening.enter_context(Listener(server.address, KEY)) for _ in range(LISTENERS)
            ]
            seen = MixedLoad(f"{server.address}/v1", "tiny").run(requests=REQUESTS)
            _wait_until_told(server, seen, listeners)
            listened = [listener.decisions for listener in listeners]
            assert not [listener.fault for listener in listeners if listener.fault]
        yield Scene(server, Prometheus(base_url), base_url, seen, listened)


def _wait_until_told(server: Server, seen: Seen, listeners: list[Listener]) -> None:
    def ended() -> int:
        return series(server.address, "moe_guard_requests_total").total()

    server.wait_for(lambda: ended() >= seen.engine_requests, PATIENCE_S)
    total = counted(server.address).total()
    server.wait_for(lambda: len(logged(server.decision_log)) >= total, PATIENCE_S)
    server.wait_for(lambda: all(len(one.decisions) >= total for one in listeners), PATIENCE_S)


def test_the_load_is_as_mixed_as_it_claims(scene: Scene) -> None:
    assert not scene.seen.errors
    assert {"content_filter", "length", "hung up"} <= scene.seen.endings.keys()
    outcomes = series(scene.server.address, "moe_guard_requests_total", "outcome")
    assert {"observed", "masked", "blocked"} <= {outcome for (outcome,) in +outcomes}
    assert any(row["exempt"] for row in logged(scene.server.decision_log))


def test_requests_log_counters_and_streams_agree_to_the_last_one(scene: Scene) -> None:
    address = scene.server.address
    outcomes = series(address, "moe_guard_requests_total", "outcome")
    assert outcomes.total() == scene.seen.engine_requests
    assert outcomes[("blocked",)] == scene.seen.endings["content_filter"]
    log = logged(scene.server.decision_log)
    assert by_key(log) == counted(address)
    assert series(address, "moe_guard_events_dropped_total").total() == 0
    ids = {row["decision_id"] for row in log}
    assert len(ids) == len(log)
    for heard in scene.listened:
        assert sorted(row["decision_id"] for row in heard) == sorted(ids)
    blocked = {row["request_id"] for row in log if row["outcome"] == "blocked"}
    assert len(blocked) <= scene.seen.endings["content_filter"], "two samples share an id"


def test_every_query_of_every_rule_and_panel_gives_data(scene: Scene) -> None:
    scene.admin("POST", "/masks", {"experts": ["L0/E5"], "reason": "to be seen", "duration": "10m"})
    queries = [query for query in rule_queries() if query.where not in EMPTY_AT_REST]
    with load_going_on(scene.server):
        found = check(scene.base_url, [*queries, *dashboard_queries()], patience_s=PATIENCE_S)
    assert (found.broken, found.empty) == ({}, ())
    [mask] = scene.admin("GET", "/masks")
    scene.admin("DELETE", f"/masks/{mask['id']}?reason=seen")


def test_an_experts_selections_go_flat_under_a_mask_and_come_back_when_it_ends(scene: Scene) -> None:
    watched = 'moe_guard_expert_selections_total{policy="watch-one"}'

    def selected() -> float:
        return scene.total(watched)

    def mask_shows() -> bool:
        return scene.total("moe_guard_operator_masks") == 1

    with load_going_on(scene.server):
        before = selected()
        scene.wait_for(lambda: selected() > before, "the expert is in use")
        body = {"experts": [f"L{LAYER}/E{EXPERT}"], "reason": "flat", "duration": "25s"}
        scene.admin("POST", "/masks", body)
        scene.wait_for(mask_shows, "Prometheus has seen the mask, and what was counted ahead of it")
        flat, evaluated = selected(), scene.tokens()
        scene.wait_for(lambda: scene.tokens() > evaluated + 200, "tokens go on")
        assert selected() == flat
        assert scene.admin("GET", "/masks"), "the machine is too slow for so short a mask"
        scene.wait_for(lambda: not scene.admin("GET", "/masks"), "the mask ends by itself")
        scene.wait_for(lambda: selected() > flat, "the expert is in use again")


def test_a_bad_reload_raises_its_alert_and_stands_in_no_good_ones_way(scene: Scene) -> None:
    assert "MoeGuardReloadFailing" not in scene.alerts()
    bad = scene.server.policies / "broken.yaml"
    bad.write_text(BROKEN)
    scene.wait_for(lambda: "MoeGuardReloadFailing" in scene.alerts(), "the alert fires")
    bad.unlink()
    reloaded = scene.total('moe_guard_reloads_total{result="success"}')
    extra = scene.server.policies / "extra.yaml"
    extra.write_text(WATCH_ONE.replace("watch-one", "watch-another"))
    succeeded = 'moe_guard_reloads_total{result="success"}'
    scene.wait_for(lambda: scene.total(succeeded) > reloaded, "the next good set is taken")


def test_a_blind_layer_raises_its_alerts_until_it_reports_again(scene: Scene) -> None:
    alerts = {"MoeGuardBlind", "MoeGuardDown"}
    assert not alerts & scene.alerts()
    with load_going_on(scene.server):
        scene.call_worker("set_routing_fault", "silent", [LAYER])
        scene.wait_for(lambda: alerts <= scene.alerts(), "both alerts fire")
        scene.call_worker("clear_routing_faults")
        scene.wait_for(lambda: not alerts & scene.alerts(), "the guard sees all layers again")


def test_a_fault_in_the_thread_that_writes_decisions_raises_its_alert(scene: Scene) -> None:
    with load_going_on(scene.server):
        scene.wait_for(lambda: "MoeGuardEventsDropped" in scene.alerts(), "the alert fires", 10)
    dropped = series(scene.server.address, "moe_guard_events_dropped_total", "stage")
    assert +dropped == {("decision_log",): 1}

    def is_told() -> bool:
        lines = len(logged(scene.server.decision_log))
        return lines == counted(scene.server.address).total() - 1

    scene.wait_for(is_told, "the log lacks that line alone")
