"""Two ranks of a pipeline, each with half of the layers, decide what one rank with all of them does."""

from __future__ import annotations

import pytest

from tests.integration.offline.engines import Engines
from tests.integration.offline.reading import counter, facts, samples, texts
from tests.support.support_facts import Method
from tests.support.support_recorder import SupportRecord

pytestmark = pytest.mark.vllm

CASES = ("unmasked", "masked", "blocks")


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_decides_what_one_rank_does_and_reports_it_once(
    engines: Engines, name: str, support_record: SupportRecord
) -> None:
    method: Method = "reroute" if name == "masked" else "observe"
    support_record("Qwen3-MoE", method, runner="v2", parallelism="PP=2")
    alone, two = engines.case("v2-guarded", "main", name), engines.case("v2-pp2", "main", name)
    assert [s["tokens"] for s in samples(two)] == [s["tokens"] for s in samples(alone)]
    assert [s["logprobs"] for s in samples(two)] == [s["logprobs"] for s in samples(alone)]
    assert facts(two) == facts(alone)
    assert any(facts(two)), "nothing was decided"
    assert two["counters"] == alone["counters"]


def test_a_mask_that_comes_on_midway_is_on_for_the_layers_of_both_ranks(engines: Engines) -> None:
    alone, two = (engines.case(group, "main", "midway") for group in ("v2-guarded", "v2-pp2"))
    assert facts(two)[:2] == facts(alone)[:2]
    assert texts(two)[:2] == texts(alone)[:2]


def test_a_prefix_from_the_cache_is_reported_as_unseen(engines: Engines) -> None:
    case = engines.case("v2-pp2", "main", "midway")
    cached = [output for batch in case["batches"] for output in batch if output["cached"]]
    assert cached
    assert counter(case, "requests_total", outcome="unjudged") == len(cached)


def test_chunks_of_a_prompt_in_flight_together_change_no_decision(engines: Engines) -> None:
    whole = engines.case("v2-guarded", "main", "long")
    chunked = engines.case("v2-pp2", "chunked", "long")
    assert facts(chunked) == facts(whole)
    assert [s["tokens"] for s in samples(chunked)] == [s["tokens"] for s in samples(whole)]
    assert counter(chunked, "failures_total") == 0
