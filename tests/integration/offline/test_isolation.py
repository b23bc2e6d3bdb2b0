"""A mask reaches the requests that it is for, and no other one of their batch."""

from __future__ import annotations

import pytest

from tests.integration.offline.cases import BATCH, MASKED
from tests.integration.offline.engines import MODES, Engines
from tests.integration.offline.policies import FLAGGED, expert_set
from tests.integration.offline.reading import (
    counter,
    decisions,
    flagged,
    rows,
    selections,
    text,
)
from tests.support.tiny_models import NUM_LAYERS

pytestmark = pytest.mark.vllm

GROUPS = [*(f"{mode}-guarded" for mode in MODES), "processes"]
MASKED_EXPERTS = [(layer, expert) for layer in range(NUM_LAYERS) for expert in FLAGGED]


@pytest.mark.parametrize("group", GROUPS)
def test_unguarded_routing_selects_every_masked_expert_often(engines: Engines, group: str) -> None:
    case = engines.case(group, "main", "unmasked")
    counts = {
        pair: counter(case, "expert_selections_total", policy="every-expert", set=expert_set(*pair))
        for pair in MASKED_EXPERTS
    }
    assert min(counts.values()) >= 50, counts
    to_be_masked = [row for i in MASKED for row in rows(case, case["batches"][0][i])]
    of_their_own = selections(to_be_masked)
    assert min(of_their_own[pair] for pair in MASKED_EXPERTS) >= 50, of_their_own


@pytest.mark.parametrize("group", GROUPS)
def test_a_masked_request_selects_no_masked_expert(engines: Engines, group: str) -> None:
    case = engines.case(group, "main", "masked")
    for i, output in enumerate(case["batches"][0]):
        uses = flagged(rows(case, output))
        fired = decisions(case, output, "watch", "used")
        if i in MASKED:
            assert uses == 0
            assert fired == []
        else:
            assert uses > 0
            assert len(fired) == 1
    assert counter(case, "requests_total", outcome="masked") == len(MASKED)
    assert counter(case, "requests_total") == BATCH
    assert counter(case, "events_dropped_total") == counter(case, "failures_total") == 0


@pytest.mark.parametrize("mode", MODES)
def test_the_others_get_bit_for_bit_what_vllm_without_the_plugin_gives(
    engines: Engines, mode: str
) -> None:
    guarded = engines.case(f"{mode}-guarded", "main", "masked")["batches"][0]
    plain = engines.case(f"{mode}-plain", "plain", "unmasked")["batches"][0]
    for i, (output, plain_output) in enumerate(zip(guarded, plain, strict=True)):
        same = text(output["samples"][0]) == text(plain_output["samples"][0])
        assert same == (i not in MASKED), f"request {i}"


def test_the_others_get_the_same_from_an_engine_in_a_process_of_its_own(engines: Engines) -> None:
    guarded = engines.case("processes", "main", "masked")["batches"][0]
    plain = engines.case("eager-plain", "plain", "unmasked")["batches"][0]
    for i, (output, plain_output) in enumerate(zip(guarded, plain, strict=True)):
        same = text(output["samples"][0]) == text(plain_output["samples"][0])
        assert same == (i not in MASKED), f"request {i}"


def test_vllms_own_record_has_no_masked_expert_in_a_masked_request(engines: Engines) -> None:
    case = engines.case("v2-guarded", "main", "masked")
    for i, output in enumerate(case["batches"][0]):
        record = output["samples"][0]["routed_experts"]
        assert (flagged(enumerate(record)) == 0) == (i in MASKED)  # type: ignore[arg-type]
