"""A real server whose routing breaks while it serves: what a scrape of /metrics and clients see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.server.conftest import Server, serving

pytestmark = pytest.mark.vllm

TOKENS = 20
"""More than the running check leaves out steps."""

_MASK = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {{name: mask-{0}}}
spec:
  mode: audit
  onError: {0}
  experts: {{some: [{{layers: 0-1, experts: [0-4]}}]}}
  rules: [{{name: always, when: always, then: {{mask: {{experts: some}}}}}}]
"""
_CLOSED = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: closed}
spec:
  mode: audit
  onError: closed
  experts: {some: [{layers: 0-1, experts: [0-4]}]}
  rules: [{name: never, when: {count: {experts: some, over: request, atLeast: 1000000}}}]
"""
POLICIES = "---\n".join([_CLOSED, _MASK.format("open"), _MASK.format("closed")])

FAULTS = "tests.support.routing_faults.RoutingFaults"


@pytest.fixture(scope="module")
def breakable(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its worker takes faults from a test, over vLLM's own /collective_rpc."""
    with serving(
        tmp_path_factory.mktemp("breakable"),
        tiny_model,
        *("--worker-extension-cls", FAULTS),
        policies=POLICIES,
        environment={"VLLM_SERVER_DEV_MODE": "1"},
        ends=True,
    ) as running:
        yield running


def call_worker(server: Server, method: str, *args: Any) -> None:
    body = {"method": method, "args": list(args)}
    httpx.post(f"{server.address}/collective_rpc", json=body).raise_for_status()


def generate(server: Server, *policies: str, stream: bool = False) -> tuple[str, str | None]:
    """(finish reason, stop reason) of a chat under these policies."""
    reply: Any = server.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "the quick brown fox"}],
        max_tokens=TOKENS,
        temperature=0,
        stream=stream,
        extra_body={"vllm_xargs": {"moe_guard_enforce": list(policies)}, "ignore_eos": True},
    )
    choice = list(reply)[-1].choices[0] if stream else reply.choices[0]
    return choice.finish_reason, choice.stop_reason


def health(server: Server) -> tuple[float, float]:
    """(moe_guard_up, moe_guard_blind_layers), which the scrape shows once each for the engine."""
    scraped = httpx.get(f"{server.address}/metrics").text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(scraped):
        for sample in family.samples:
            if sample.name in ("moe_guard_up", "moe_guard_blind_layers"):
                assert sample.labels == {"model_name": "tiny", "engine": "0"}
                assert family.type == "gauge"
                assert sample.name not in found
                found[sample.name] = sample.value
    return found["moe_guard_up"], found["moe_guard_blind_layers"]


WHOLE = ("length", None)
BLIND, UP, DOWN = (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)


def test_a_layer_that_stops_reporting_is_scraped_and_requests_follow_on_error(
    breakable: Server,
) -> None:
    assert health(breakable) == UP
    assert generate(breakable, "closed") == WHOLE
    outcome = "moe_guard_requests_total"
    unjudged = breakable.metric(outcome, outcome="unjudged")
    call_worker(breakable, "set_routing_fault", "silent", [1])
    assert generate(breakable) == WHOLE
    breakable.wait_for(lambda: health(breakable) == BLIND)
    for stream in (False, True):
        assert generate(breakable, "closed", stream=stream) == (
            "content_filter",
            "moe_guard:closed/never",
        )
    assert generate(breakable) == WHOLE
    breakable.wait_for(lambda: breakable.metric(outcome, outcome="unjudged") == unjudged + 2)
    assert breakable.metric(outcome, outcome="blocked") == 2
    assert breakable.metric("moe_guard_failures_total", stage="routing") >= 1
    assert breakable.metric("moe_guard_mask_violations_total") == 0
    call_worker(breakable, "clear_routing_faults")
    generate(breakable)
    breakable.wait_for(lambda: health(breakable) == UP)
    assert generate(breakable, "closed") == WHOLE


def test_masked_experts_at_work_are_scraped_and_the_guard_stays_down(breakable: Server) -> None:
    assert generate(breakable, "mask-closed") == WHOLE
    assert breakable.metric("moe_guard_mask_violations_total") == 0
    blocked = breakable.metric("moe_guard_requests_total", outcome="blocked")
    call_worker(breakable, "set_routing_fault", "ignores_masks", [0, 1])
    assert generate(breakable, "mask-open") == WHOLE
    violations = "moe_guard_mask_violations_total"
    breakable.wait_for(lambda: breakable.metric(violations, policy="mask-open") >= 1)
    assert breakable.metric(violations, policy="mask-closed") == 0
    breakable.wait_for(lambda: health(breakable) == DOWN)
    assert generate(breakable, "mask-closed") == ("content_filter", "moe_guard:mask-closed/always")
    breakable.wait_for(lambda: breakable.metric(violations, policy="mask-closed") >= 1)
    call_worker(breakable, "clear_routing_faults")
    assert generate(breakable, "mask-closed") == ("content_filter", "moe_guard:mask-closed/always")
    assert generate(breakable, "mask-open") == WHOLE
    assert generate(breakable, "closed") == WHOLE, "no mask of its own was broken"
    breakable.wait_for(
        lambda: breakable.metric("moe_guard_requests_total", outcome="blocked") == blocked + 2
    )
    assert health(breakable) == DOWN, "until a restart"


def test_an_engine_core_that_is_killed_ends_the_server_and_no_request_passes(
    breakable: Server,
) -> None:
    """The last of the tests with this server."""
    kill_and_see_it_end(breakable, "EngineCore")


def test_a_worker_that_is_killed_ends_the_server_and_no_request_passes(
    tiny_model: Path, tmp_path: Path
) -> None:
    with serving(tmp_path, tiny_model, policies=POLICIES, ends=True) as server:
        assert generate(server, "closed") == WHOLE
        kill_and_see_it_end(server, "Worker")


def kill_and_see_it_end(server: Server, title: str) -> None:
    serving_process = psutil.Process(server.pid)
    [killed] = [
        process
        for process in serving_process.children(recursive=True)
        if title in " ".join(process.cmdline())
    ]
    killed.kill()
    for _ in range(3):
        with pytest.raises(openai.APIError):  # refused, or nobody answers any more
            generate(server)
    assert serving_process.wait(timeout=120) == 1, "vLLM alone ends as if it had been asked to"
