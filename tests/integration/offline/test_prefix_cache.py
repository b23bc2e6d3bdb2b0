"""A prefix from the cache counts as if it had been computed, or events say that it was not seen; masks
keep caches apart."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.integration.offline.cases import BLOCK_SIZE, CACHED_TOKENS
from tests.integration.offline.engines import PLACES, Engines
from tests.integration.offline.reading import (
    counted_selections,
    counter,
    decisions,
    flagged,
    rows,
    selections,
)
from tests.support.support_recorder import SupportRecord

pytestmark = pytest.mark.vllm

MODES = ("eager", "v2")
ENGINES = ("main", "chunked", "chunked-oddly")


def _case(
    engines: Engines, mode: str, name: str, engine: str = "main"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    case = engines.case(f"{mode}-guarded", engine, name)
    return case, [output for batch in case["batches"] for output in batch]


def _facts(case: dict[str, Any], output: dict[str, Any]) -> list[tuple[Any, ...]]:
    """All that was decided about a request, but for its name and the time."""
    return [
        (
            *(d["policy"], d["rule"], d["mode"], d["action"], d["outcome"]),
            *(d["phase"], d["position"], d["evidence"], d["unseen_tokens"]),
        )
        for d in case["decisions"]
        if d["request_id"] == output["request_id"]
    ]


@pytest.mark.parametrize("mode", MODES)
def test_requests_share_blocks_with_those_under_the_same_masks_only(
    engines: Engines, mode: str
) -> None:
    case, outputs = _case(engines, mode, "prefix")
    assert [output["cached"] for output in outputs] == [
        0,  # the first without a mask
        CACHED_TOKENS,
        0,  # the first with one
        CACHED_TOKENS,
        CACHED_TOKENS,  # without again: the blocks of the first two
    ]
    for masked in outputs[2:4]:
        assert flagged(rows(case, masked)) == 0


@pytest.mark.parametrize("mode", MODES)
def test_an_unmasked_request_does_not_reuse_masked_blocks(engines: Engines, mode: str) -> None:
    _, outputs = _case(engines, mode, "prefix-masked-first")
    assert [output["cached"] for output in outputs] == [0, 0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["prefix", "prefix-in-step"])
def test_decisions_with_a_cached_prefix_are_those_of_the_same_request_computed_afresh(
    engines: Engines, mode: str, engine: str, name: str, support_record: SupportRecord
) -> None:
    support_record.feature("prefix caching", runner=PLACES[mode][0])
    case, outputs = _case(engines, mode, name, engine)
    alone, afresh = _case(engines, mode, f"{name}-alone")
    cached = [output["cached"] for output in outputs]
    assert sum(cached) >= 2 * CACHED_TOKENS
    assert not any(output["cached"] for output in afresh)
    in_cache = set()
    for output, fresh in zip(outputs, afresh, strict=True):
        facts = _facts(case, output)
        assert facts == _facts(alone, fresh)
        assert output["samples"][0]["stop_reason"] == fresh["samples"][0]["stop_reason"]
        in_cache |= {rule for _, rule, *_, at, _, _ in facts if at < output["cached"]}
    assert {"used", "burst", "mask"} <= in_cache, "some shall fire in the cached part"
    assert counter(case, "requests_total", outcome="unjudged") == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_prefix_may_lie_in_blocks_of_the_same_step(engines: Engines, mode: str) -> None:
    _, outputs = _case(engines, mode, "prefix-in-step")
    assert [output["cached"] for output in outputs[:3]] == [0, CACHED_TOKENS, 5 * BLOCK_SIZE]


@pytest.mark.parametrize("mode", MODES)
def test_a_block_decided_in_a_cached_prompt_withholds_the_first_token(
    engines: Engines, mode: str
) -> None:
    case, outputs = _case(engines, mode, "prefix-in-step")
    for output in outputs[3:]:
        [fired] = decisions(case, output, "stop-prompt")
        assert fired["position"] < output["cached"]
        assert output["samples"][0]["tokens"] == []
        assert output["samples"][0]["stop_reason"] == "moe_guard:stop-prompt/block"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["prefix", "prefix-in-step"])
def test_cached_tokens_count_as_evaluated(engines: Engines, mode: str, name: str) -> None:
    case, outputs = _case(engines, mode, name)
    evaluated = sum(len(output["prompt"]) for output in outputs)
    assert counter(case, "tokens_evaluated_total", phase="prompt") == evaluated


def test_selections_are_those_of_vllms_record_cached_prefixes_included(engines: Engines) -> None:
    case, outputs = _case(engines, "v2", "prefix")
    recorded = Counter[tuple[int, int]]()
    for output in outputs:
        record = output["samples"][0]["routed_experts"]
        fed_back = len(output["samples"][0]["tokens"]) - 1
        assert len(record) == len(output["prompt"]) + fed_back
        recorded += selections([0, ids] for ids in record)
    assert counted_selections(case) == recorded


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["prefix", "prefix-in-step"])
def test_selections_are_those_of_the_same_requests_computed_afresh(
    engines: Engines, mode: str, name: str
) -> None:
    case, _ = _case(engines, mode, name)
    alone, _ = _case(engines, mode, f"{name}-alone")
    assert counted_selections(case) == counted_selections(alone)


@pytest.mark.parametrize("mode", MODES)
def test_a_request_that_must_be_judged_takes_a_prefix_that_was_seen(
    engines: Engines, mode: str
) -> None:
    case, outputs = _case(engines, mode, "prefix-closed")
    assert [output["cached"] for output in outputs] == [0, CACHED_TOKENS]
    assert {d["unseen_tokens"] for d in case["decisions"]} == {0}
    assert [output["samples"][0]["finish_reason"] for output in outputs] == ["length"] * 2


def test_where_no_evidence_is_kept_events_say_how_many_tokens_were_not_seen(engines: Engines) -> None:
    case, outputs = _case(engines, "eager", "prefix", "unseen")
    for output in (outputs[0], outputs[1], outputs[4]):
        [fired] = decisions(case, output, "watch", "used")
        assert fired["unseen_tokens"] == output["cached"]
        assert fired["position"] >= output["cached"]
    assert counter(case, "requests_total", outcome="unjudged") == 2, "the masked one is `masked`"
    evaluated = sum(len(output["prompt"]) - output["cached"] for output in outputs)
    assert counter(case, "tokens_evaluated_total", phase="prompt") == evaluated


def test_where_no_evidence_is_kept_a_request_that_must_be_judged_takes_no_prefix(
    engines: Engines,
) -> None:
    _, outputs = _case(engines, "eager", "prefix-closed", "unseen")
    assert [output["cached"] for output in outputs] == [0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_a_preempted_request_is_decided_as_one_that_ran_through(
    engines: Engines, mode: str, support_record: SupportRecord
) -> None:
    support_record.feature("preemption and recompute", runner=PLACES[mode][0])
    crowded, outputs = _case(engines, mode, "crowd", "crowded")
    roomy, ran_through = _case(engines, mode, "crowd")
    for output, other in zip(outputs, ran_through, strict=True):
        assert _facts(crowded, output) == _facts(roomy, other)
