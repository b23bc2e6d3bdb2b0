"""Two tensor-parallel ranks decide as one does, say so once, and notice when one of them could not."""

from __future__ import annotations

import pytest

from tests.integration.offline.engines import Engines
from tests.integration.offline.policies import STOP_AT
from tests.integration.offline.reading import counter, decisions, facts, flagged, rows, samples
from tests.support.support_recorder import SupportRecord

pytestmark = pytest.mark.vllm

CASES = ("unmasked", "masked", "midway", "blocks")


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_decide_what_one_does_and_report_it_once(
    engines: Engines, name: str, support_record: SupportRecord
) -> None:
    support_record("Qwen3-MoE", "observe", parallelism="TP=2")
    alone, two = engines.case("eager-guarded", "main", name), engines.case("tp2", "main", name)
    assert [s["tokens"] for s in samples(two)] == [s["tokens"] for s in samples(alone)]
    assert facts(two) == facts(alone)
    assert any(facts(two)), "nothing was decided"
    assert two["counters"] == alone["counters"]


def test_masked_rows_use_no_masked_expert_and_the_others_do(
    engines: Engines, support_record: SupportRecord
) -> None:
    support_record("Qwen3-MoE", "reroute", parallelism="TP=2")
    case = engines.case("tp2", "main", "masked")
    for i, output in enumerate(case["batches"][0]):
        assert (flagged(rows(case, output)) == 0) == bool(i % 2)


def test_a_blocked_request_ends_on_both_ranks(engines: Engines) -> None:
    case = engines.case("tp2", "main", "blocks")
    assert {s["finish_reason"] for s in samples(case)} == {"content_filter"}
    for [output] in case["batches"]:
        for fired in decisions(case, output, "stop"):
            assert fired["evidence"][0]["value"] >= STOP_AT


def test_a_fault_on_the_rank_that_reports_nothing_is_noticed(engines: Engines) -> None:
    case = engines.case("tp2", "faulty", "fault")
    assert counter(case, "failures_total", stage="ranks") >= 1
    assert counter(case, "requests_total", outcome="unjudged") == 1
    assert counter(case, "requests_total") == 3
