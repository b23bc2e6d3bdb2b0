"""A long mixed workload on a real server: what each request got and what was decided about it is what
the same request gets alone on an empty server, and what vLLM's own record of routing says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.integration.server.conftest import Server, serving
from tests.integration.workload import requests as workload
from tests.integration.workload.requests import WorkRequest, work_requests
from tests.integration.workload.running import (
    Answer,
    decisions_since,
    log_length,
    run_alone,
    run_together,
)
from tests.support.support_facts import Runner
from tests.support.support_recorder import SupportRecord
from tests.support.tiny_models import write_tiny_moe

pytestmark = pytest.mark.vllm

_V2_ON_CPU = Path(__file__).parents[2] / "support" / "v2_on_cpu"
RUNNERS = ("v1", "v2")
NUM_BLOCKS = 22
"""Of 32 positions: a full batch wants more, so that requests are preempted."""

ALONE_EVERY = {"v1": 1, "v2": 6}
"""Of every so many requests one is run again alone: V2 is slow on a CPU."""


@dataclass
class Ran:
    """The mixed run of one runner, and its requests alone."""

    runner: Runner
    requests: list[WorkRequest]
    together: dict[int, Answer]
    alone: dict[int, Answer]
    metrics: dict[str, float]


@pytest.fixture(scope="package", params=RUNNERS)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    runner: Runner = request.param
    folder = tmp_path_factory.mktemp(f"workload-{runner}")
    write_tiny_moe(folder / "moe")
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    arguments = [
        *("--skip-tokenizer-init", "--dtype", "float32", "--block-size", str(workload.BLOCK_SIZE)),
        *("--num-gpu-blocks-override", str(NUM_BLOCKS), "--max-num-batched-tokens", "256"),
    ]
    if runner == "v2":
        environment |= {"MOE_GUARD_TEST_V2": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
        arguments.append("--enable-return-routed-experts")
    with serving(
        folder / "server",
        folder / "moe",
        *arguments,
        policies="\n---\n".join(json.dumps(policy) for policy in workload.policies()),
        environment=environment,
        python_path=[_V2_ON_CPU] if runner == "v2" else [],
    ) as server:
        yield _run(server, runner)


def _run(server: Server, runner: Runner) -> Ran:
    requests = work_requests()
    finished = [request for request in requests if not request.is_cancelled]
    together = run_together(server, requests)
    _wait_until_counted(server, len(requests))
    metrics = {
        name: server.metric(name)
        for name in (
            "vllm:num_preemptions_total",
            "vllm:prefix_cache_hits_total",
            "moe_guard_failures_total",
            "moe_guard_events_dropped_total",
            "moe_guard_requests_total",
        )
    }
    together_decisions = decisions_since(server, 0)
    lines = log_length(server)
    some = finished[:: ALONE_EVERY[runner]]
    alone = run_alone(server, some)
    _wait_until_counted(server, len(requests) + len(some))
    alone_decisions = decisions_since(server, lines)
    for answers, decisions in ((together, together_decisions), (alone, alone_decisions)):
        for number, answer in answers.items():
            answer.decisions = decisions.get(number, [])
    return Ran(runner, requests, together, alone, metrics)


def _wait_until_counted(server: Server, ended: int) -> None:
    server.wait_for(lambda: server.metric("moe_guard_requests_total") >= ended, timeout_s=120)


def test_the_workload_is_as_mixed_as_it_claims(ran: Ran) -> None:
    assert len(ran.requests) == 200
    assert ran.metrics["vllm:num_preemptions_total"] > 0
    assert ran.metrics["vllm:prefix_cache_hits_total"] > 0
    assert sum("isolate" in request.enforce for request in ran.requests) >= 80
    reasons = {answer.finish_reason for answer in ran.together.values()}
    assert reasons == {"length", "content_filter"}
    assert len(ran.together) == 180, "every tenth was cancelled"


def test_nothing_failed_and_each_request_ended_once(ran: Ran) -> None:
    assert ran.metrics["moe_guard_failures_total"] == 0
    assert ran.metrics["moe_guard_events_dropped_total"] == 0
    assert ran.metrics["moe_guard_requests_total"] == len(ran.requests)


def test_each_request_gets_the_tokens_that_it_gets_alone(ran: Ran) -> None:
    for number, alone in ran.alone.items():
        together = ran.together[number]
        assert (together.token_ids, together.finish_reason, together.stop_reason) == (
            alone.token_ids,
            alone.finish_reason,
            alone.stop_reason,
        ), number


def test_final_evidence_and_every_decision_are_those_of_the_request_alone(
    ran: Ran, support_record: SupportRecord
) -> None:
    support_record.feature("mixed load of 200 requests", runner=ran.runner)
    for number, alone in ran.alone.items():
        assert ran.together[number].decisions == alone.decisions, number
    assert sum(len(answer.decisions) for answer in ran.alone.values()) > len(ran.alone)


@pytest.mark.parametrize("ran", ["v2"], indirect=True)
def test_decisions_are_what_vllms_own_record_of_routing_says(ran: Ran) -> None:
    climbed = 0
    for request in ran.requests:
        answer = ran.together.get(request.number)
        if answer is None:
            continue
        assert answer.routed_experts is not None
        rungs = {
            rule: position
            for policy, rule, _, _, position, *_ in answer.decisions
            if policy == "ladder" and rule.startswith("at-")
        }
        # A blocked request has one row more than vLLM's record: the one that fired.
        last = len(answer.routed_experts) - 1
        assert {r: p for r, p in rungs.items() if p <= last} == _rungs(answer.routed_experts)
        climbed += len(rungs)
        if "isolate" in request.enforce:
            assert not np.isin(answer.routed_experts, workload.FLAGGED).any()
    assert climbed > len(ran.together)


def _rungs(record: NDArray[np.int64]) -> dict[str, int]:
    """The first position at which so many selections of watched experts were made."""
    climbed = np.isin(record, workload.WATCHED).sum(axis=(1, 2)).cumsum()
    return {
        f"at-{rung}": int(np.argmax(climbed >= rung)) for rung in workload.LADDER if climbed[-1] >= rung
    }
