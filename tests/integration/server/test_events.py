"""Where a real server with one API server tells of decisions: counters, log, stream and traces."""

from __future__ import annotations

import pytest

from tests.integration.server.conftest import ADMIN_KEY, Server
from tests.support.trace_collector import TraceCollector, attributes
from tools.accounting import Listener, by_key, counted, logged, series
from tools.mixed_load import KINDS, Kind, MixedLoad

pytestmark = pytest.mark.vllm

ASKED = (
    *KINDS,
    Kind("blocked", 3, ("benign",), chat=True, enforced=("stop-output",)),
    Kind("blocked stream", 3, ("benign",), streamed=True, enforced=("stop-output",)),
)
REQUESTS = 40
TRACE_ID, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_requests_log_counters_and_stream_agree_to_the_last_one(server: Server) -> None:
    kinds = [kind for kind in ASKED if kind.name != "stricter"]  # a policy that is not here
    ended, told = series(server.address, "moe_guard_requests_total", "outcome"), counted(server.address)
    lines = len(logged(server.decision_log))
    with Listener(server.address, ADMIN_KEY) as listener:
        seen = MixedLoad(f"{server.address}/v1", "tiny", kinds=kinds).run(requests=REQUESTS)

        def outcomes() -> int:
            now = series(server.address, "moe_guard_requests_total", "outcome")
            return now.total() - ended.total()

        server.wait_for(lambda: outcomes() >= seen.engine_requests)
        decided = counted(server.address) - told
        server.wait_for(lambda: len(logged(server.decision_log)) >= lines + decided.total())
        server.wait_for(lambda: len(listener.decisions) >= decided.total())

    assert not seen.errors
    assert seen.endings["content_filter"] > 0
    assert outcomes() == seen.engine_requests
    blocked = series(server.address, "moe_guard_requests_total", "outcome")[("blocked",)]
    assert blocked - ended[("blocked",)] == seen.endings["content_filter"]
    log = logged(server.decision_log)[lines:]
    assert decided.total() > REQUESTS
    assert by_key(log) == by_key(listener.decisions) == decided
    ids = sorted(row["decision_id"] for row in log)
    assert len(set(ids)) == len(ids)
    assert sorted(row["decision_id"] for row in listener.decisions) == ids
    assert listener.fault is None


def test_a_block_is_a_span_in_the_callers_trace_beside_vllms_own(
    server: Server, collector: TraceCollector
) -> None:
    reply = server.client.completions.create(
        model="tiny",
        prompt="the quick brown fox",
        max_tokens=8,
        extra_headers={"traceparent": f"00-{TRACE_ID}-{CALLER}-01"},
        extra_body={"vllm_xargs": {"moe_guard_enforce": ["stop-output"]}, "ignore_eos": True},
    )
    assert reply.choices[0].finish_reason == "content_filter"

    def blocks() -> list[dict[str, str]]:
        found = [attributes(s) for s in collector.spans(TRACE_ID) if s.name == "moe_guard.decision"]
        return [one for one in found if one["moe_guard.outcome"] == "blocked"]

    server.wait_for(lambda: len(blocks()) > 0)
    server.wait_for(lambda: "llm_request" in {span.name for span in collector.spans(TRACE_ID)})
    [block] = blocks()
    assert (block["moe_guard.policy"], block["moe_guard.rule"]) == ("stop-output", "third")
    assert block["gen_ai.request.id"].startswith(reply.id)
    spans = {span.name: span for span in collector.spans(TRACE_ID)}
    assert {span.parent_span_id.hex() for span in spans.values()} == {CALLER}
    assert attributes(spans["llm_request"])["gen_ai.request.id"] == block["gen_ai.request.id"]
