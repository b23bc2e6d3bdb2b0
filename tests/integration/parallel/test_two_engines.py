"""Two data-parallel engines route each other's rows; each judges and masks its own alone."""

from __future__ import annotations

import pytest

from tests.integration.offline.policies import STOP_AT
from tests.integration.offline.reading import (
    Case,
    counted_selections,
    counter,
    decisions,
    facts,
    flagged,
    rows,
    samples,
    selections,
    text,
)
from tests.integration.parallel.engines import RANKS, EnginePairs
from tests.support.support_recorder import SupportRecord

pytestmark = pytest.mark.vllm

LAYOUTS = {"": f"DP={RANKS}", "-experts": f"DP={RANKS}, EP={RANKS}"}
GUARDED = ("eager-guarded", "eager-guarded-experts", "v2-guarded")
NAMES = ("masked", "midway", "blocks")


def on_ranks(pairs: EnginePairs, group: str, name: str) -> list[Case]:
    return [pairs.case(group, f"rank{rank}", name) for rank in range(RANKS)]


@pytest.mark.parametrize("name", NAMES)
def test_each_engine_decides_what_it_would_alone(pairs: EnginePairs, name: str) -> None:
    groups = [on_ranks(pairs, group, name) for group in ("eager-guarded", "eager-alone")]
    for here, there in zip(*groups, strict=True):
        assert [s["tokens"] for s in samples(here)] == [s["tokens"] for s in samples(there)]
        assert facts(here) == facts(there)
        assert here["counters"] == there["counters"]
    assert any(any(facts(case)) for case in groups[0]), "nothing was decided"


@pytest.mark.parametrize("group", GUARDED)
def test_a_masked_request_uses_no_masked_expert_and_the_others_of_both_engines_do(
    pairs: EnginePairs, group: str
) -> None:
    number = 0
    for case in on_ranks(pairs, group, "masked"):
        for output in case["batches"][0]:
            assert (flagged(rows(case, output)) == 0) == bool(number % 2), f"request {number}"
            number += 1


@pytest.mark.parametrize(("layout", "parallelism"), LAYOUTS.items())
def test_unmasked_requests_of_both_engines_get_bit_for_bit_what_vllm_alone_gives(
    pairs: EnginePairs, layout: str, parallelism: str, support_record: SupportRecord
) -> None:
    number = 0
    groups = [on_ranks(pairs, f"eager-{way}{layout}", "masked") for way in ("guarded", "plain")]
    for guarded, plain in zip(*groups, strict=True):
        for output, plain_output in zip(guarded["batches"][0], plain["batches"][0], strict=True):
            same = text(output["samples"][0]) == text(plain_output["samples"][0])
            assert same == (number % 2 == 0), f"request {number}"
            number += 1
    support_record("Qwen3-MoE", "observe", "reroute", parallelism=parallelism)
    name = "expert parallelism" if "EP" in parallelism else "data parallelism"
    support_record.feature(name, runner="v1")


def test_where_experts_lie_changes_no_decision(pairs: EnginePairs) -> None:
    groups = [on_ranks(pairs, f"eager-guarded{layout}", "masked") for layout in LAYOUTS]
    for one, other in zip(*groups, strict=True):
        assert [s["tokens"] for s in samples(one)] == [s["tokens"] for s in samples(other)]
        assert facts(one) == facts(other)


def test_an_idle_engine_counts_nothing_while_it_routes_for_the_other(pairs: EnginePairs) -> None:
    busy, idle = on_ranks(pairs, "eager-guarded", "midway")
    assert counter(busy, "tokens_evaluated_total") > 0
    assert idle["counters"] == {}
    assert idle["decisions"] == []


@pytest.mark.parametrize("group", GUARDED)
def test_an_engine_counts_the_selections_of_its_own_rows_alone(pairs: EnginePairs, group: str) -> None:
    for case in on_ranks(pairs, group, "masked"):
        recorded = [row for output in case["batches"][0] for row in rows(case, output)]
        assert counted_selections(case) == selections(recorded)
        assert counter(case, "requests_total") == len(case["batches"][0])


def test_a_block_leaves_the_other_engine_to_its_requests(pairs: EnginePairs) -> None:
    blocking, going_on = on_ranks(pairs, "eager-guarded", "blocks")
    assert {s["finish_reason"] for s in samples(blocking)} == {"content_filter"}
    for [output] in blocking["batches"]:
        for fired in decisions(blocking, output, "stop"):
            assert fired["evidence"][0]["value"] >= STOP_AT
    assert {s["finish_reason"] for s in samples(going_on)} == {"length"}
    assert all(flagged(rows(going_on, output)) == 0 for [output] in going_on["batches"])


def test_vllms_own_record_is_what_was_judged(pairs: EnginePairs, support_record: SupportRecord) -> None:
    number = 0
    for case in on_ranks(pairs, "v2-guarded", "masked"):
        for output in case["batches"][0]:
            record = output["samples"][0]["routed_experts"]
            assert record[: len(rows(case, output))] == [ids for _, ids in rows(case, output)]
            assert (flagged(enumerate(record)) == 0) == bool(number % 2)  # type: ignore[arg-type]
            number += 1
    support_record("Qwen3-MoE", "observe", "reroute", runner="v2", parallelism=f"DP={RANKS}")
    support_record.feature("data parallelism", runner="v2")


def test_tensor_parallel_ranks_with_half_of_the_experts_each_mask_and_count_as_one(
    pairs: EnginePairs, support_record: SupportRecord
) -> None:
    case = pairs.case("tensor-experts", "main", "masked")
    for number, output in enumerate(case["batches"][0]):
        assert (flagged(rows(case, output)) == 0) == bool(number % 2), f"request {number}"
    recorded = [row for output in case["batches"][0] for row in rows(case, output)]
    assert counted_selections(case) == selections(recorded)
    assert counter(case, "failures_total") == 0
    support_record("Qwen3-MoE", "observe", "reroute", parallelism=f"TP={RANKS}, EP={RANKS}")


def test_ranks_with_an_engine_core_each_decide_the_same_and_the_first_one_tells(
    pairs: EnginePairs, support_record: SupportRecord
) -> None:
    telling, silent = on_ranks(pairs, "launched", "masked")
    assert [s["tokens"] for s in samples(telling)] == [s["tokens"] for s in samples(silent)]
    for case in (telling, silent):
        for number, output in enumerate(case["batches"][0]):
            assert (flagged(rows(case, output)) == 0) == bool(number % 2), f"request {number}"
    assert any(facts(telling)), "nothing was decided"
    assert counter(telling, "requests_total") == len(telling["batches"][0])
    assert silent["decisions"] == []
    assert silent["counters"] == {}
    support_record.feature("external launcher", runner="v1")
