"""What an engine records is what its guard saw: replayed, it gives the engine's own decisions."""

from __future__ import annotations

import stat
from collections import Counter, defaultdict
from typing import Any

import pytest

from guard.offline.evaluator import OfflineEvaluator
from guard.offline.replay import replay
from guard.policy import load_policies
from guard.program.compile import compile_policies
from guard.trace.format import TracedRequest
from guard.trace.reader import TraceReader, trace_files
from tests.integration.offline.engines import Engines

pytestmark = pytest.mark.vllm

MODES = ("eager", "v2")


def reader(engines: Engines, mode: str) -> TraceReader:
    """Of the one trace of a group; the engine has run."""
    engines.result(f"{mode}-guarded", "main")
    (path,) = trace_files(engines.traces(f"{mode}-guarded"))
    return TraceReader(path)


def cases(engines: Engines, mode: str) -> list[dict[str, Any]]:
    return list(engines.result(f"{mode}-guarded", "main")["cases"].values())


def external(req_id: str) -> str:
    """The id that decisions have: without what vLLM puts around it."""
    return req_id.rpartition("-")[0].rpartition("_")[2]


def is_whole(request: TracedRequest) -> bool:
    return request.routing.first_seen == 0 and not request.routing.unseen


@pytest.mark.parametrize("mode", MODES)
def test_replayed_decisions_are_the_engines_own_position_by_position(
    engines: Engines, mode: str
) -> None:
    trace = reader(engines, mode)
    program = compile_policies(load_policies(engines.folder / "main"), trace.header.topology)
    replayed: dict[str, Counter[tuple[str, str, int]]] = defaultdict(Counter)
    not_whole = {external(request.request_id) for request in trace if not is_whole(request)}
    for one in replay(OfflineEvaluator(program), trace):
        for firing in one.outcome.verdict.firings:
            name = external(one.request.request_id)
            replayed[name][firing.policy, firing.rule, firing.position] += 1
    decided: dict[str, Counter[tuple[str, str, int]]] = defaultdict(Counter)
    for case in cases(engines, mode):
        for decision in case["decisions"]:
            key = decision["policy"], decision["rule"], decision["position"]
            decided[decision["request_id"]][key] += 1
    compared = decided.keys() - not_whole
    assert len(compared) > 10
    for name in compared:
        assert replayed[name] == decided[name], name
    assert not replayed.keys() - not_whole - decided.keys()


@pytest.mark.parametrize("mode", MODES)
def test_a_trace_has_the_rows_that_the_guard_judged(engines: Engines, mode: str) -> None:
    rows = {req_id: rows for case in cases(engines, mode) for req_id, rows in case["rows"].items()}
    compared = 0
    for request in reader(engines, mode):
        routing = request.routing
        for position, ids_LK in rows.get(request.request_id, ()):
            if position < len(routing.topk_ids):
                compared += 1
                assert sorted(map(sorted, routing.topk_ids[position].tolist())) == sorted(
                    map(sorted, ids_LK)
                )
    assert compared > 100


@pytest.mark.parametrize("mode", MODES)
def test_a_trace_is_private_and_whole(engines: Engines, mode: str) -> None:
    trace = reader(engines, mode)
    assert stat.S_IMODE(trace.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(trace.path.parent.stat().st_mode) == 0o700
    requests = list(trace)
    assert not trace.torn
    assert all(not request.labels for request in requests)
    samples = sum(
        len(output["samples"])
        for case in cases(engines, mode)
        for batch in case["batches"]
        for output in batch
    )
    assert len({request.request_id for request in requests}) == len(requests) == samples
