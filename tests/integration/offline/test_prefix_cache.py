"""A cached prefix was never routed here: events say so, and masks keep caches apart."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.offline.cases import CACHED_TOKENS
from tests.integration.offline.engines import Engines
from tests.integration.offline.reading import counter, decisions, flagged, rows

pytestmark = pytest.mark.vllm

MODES = ("eager", "v2")


def _case(engines: Engines, mode: str, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    case = engines.case(f"{mode}-guarded", "main", name)
    return case, [output for [output] in case["batches"]]


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
def test_an_event_says_how_many_tokens_came_from_the_cache_unseen(engines: Engines, mode: str) -> None:
    case, outputs = _case(engines, mode, "prefix")
    for output in (outputs[0], outputs[1], outputs[4]):
        [fired] = decisions(case, output, "watch", "used")
        assert fired["unseen_tokens"] == output["cached"]
        assert fired["position"] >= output["cached"]
    assert counter(case, "requests_total", outcome="unjudged") == 2, "the masked one is `masked`"


@pytest.mark.parametrize("mode", MODES)
def test_cached_tokens_are_not_counted_as_evaluated(engines: Engines, mode: str) -> None:
    case, outputs = _case(engines, mode, "prefix")
    evaluated = sum(len(output["prompt"]) - output["cached"] for output in outputs)
    assert counter(case, "tokens_evaluated_total", phase="prompt") == evaluated
