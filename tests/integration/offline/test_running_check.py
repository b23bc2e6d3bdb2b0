"""Faults in the routing of a running engine: the guard falls, says why, and requests follow onError."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.offline.cases import (
    FAULT_LAYER,
    FIRST_STAGE_FAULT_LAYER,
    RANKED_FAULTS,
    RANKED_TOKENS,
)
from tests.integration.offline.engines import MODES, Engines
from tests.integration.offline.reading import Case, counter

pytestmark = pytest.mark.vllm

KINDS = ("silent", "out_of_range", "not_finite", "duplicate")
METHODS = ("reroute", "drop", "drop-renorm", "force")
TOKENS = 40
UP, DOWN, DOWN_AND_BLIND = (1.0, 0.0), (0.0, 0.0), (0.0, 1.0)


def _case(engines: Engines, mode: str, name: str) -> Case:
    return engines.case(f"{mode}-faults", "faults", name)


def _health(case: Case) -> list[tuple[float, float]]:
    """(moe_guard_up, moe_guard_blind_layers) behind each batch."""
    return [(gauges["up{}"], gauges["blind_layers{}"]) for gauges in case["gauges"]]


def _endings(case: Case) -> list[list[tuple[int, Any]]]:
    """(tokens, stop reason) of the open and of the closed request of each batch."""
    return [
        [(len(sample["tokens"]), sample["stop_reason"]) for out in batch for sample in out["samples"]]
        for batch in case["batches"]
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_cannot_be_believed_blinds_the_guard_until_it_can_again(
    engines: Engines, mode: str, kind: str
) -> None:
    case = _case(engines, mode, f"{kind}-closed")
    assert _health(case) == [UP, DOWN_AND_BLIND, UP]
    assert counter(case, "failures_total", stage="routing") >= 1
    assert counter(case, "failures_total") == counter(case, "failures_total", stage="routing")
    assert counter(case, "mask_violations_total") == 0
    sound, faulty, mended = _endings(case)
    assert faulty[0] == (TOKENS, None), "open: it passes"
    assert faulty[1][0] < TOKENS
    assert faulty[1][1] == "moe_guard:closed/never", "closed: it is blocked"
    assert sound == [(TOKENS, None)] * 2
    assert mended[0] == (TOKENS, None)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_ran_through_a_fault_is_unjudged_or_blocked(
    engines: Engines, mode: str, kind: str
) -> None:
    case = _case(engines, mode, f"{kind}-closed")
    blocked = sum(reason is not None for batch in _endings(case) for _, reason in batch)
    assert counter(case, "requests_total", outcome="blocked") == blocked
    assert counter(case, "requests_total", outcome="unjudged") >= 1
    assert counter(case, "requests_total") == 6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_a_mask_that_a_router_ignores_is_counted_and_the_guard_stays_down(
    engines: Engines, mode: str, method: str
) -> None:
    case = _case(engines, mode, f"ignores_masks-{method}-{method}-closed")
    assert _health(case) == [UP if method == METHODS[0] else DOWN, DOWN, DOWN]
    for policy in (method, f"{method}-closed"):
        assert counter(case, "mask_violations_total", policy=policy) >= 1
    assert counter(case, "failures_total") == 0
    sound, faulty, mended = _endings(case)
    assert sound == [(TOKENS, None)] * 2
    for ending in (faulty, mended):
        assert ending[0] == (TOKENS, None), "open: it passes"
        assert ending[1][1] == f"moe_guard:{method}-closed/mask", "closed: blocked, and ever after"
    assert counter(case, "requests_total", outcome="masked") == 2, "of the sound batch alone"
    assert counter(case, "requests_total", outcome="unjudged") == 2
    assert counter(case, "requests_total", outcome="blocked") == 2


RANKED = {"tp2": FAULT_LAYER, "v2-pp2": FIRST_STAGE_FAULT_LAYER}
"""With the fault on the one rank of two whose output does not reach the engine core, in this layer."""

_IN_THE_LOG = {
    "silent": "report nothing",
    "reports_not_finite": "gate weights that are NaN or infinite",
    "duplicate": "an expert twice in a row",
}


@pytest.mark.parametrize("group", RANKED)
@pytest.mark.parametrize("kind", RANKED_FAULTS)
def test_a_layer_of_a_rank_whose_word_reaches_nobody_blinds_the_guard_by_name(
    engines: Engines, group: str, kind: str
) -> None:
    case = engines.case(group, "faults", f"{kind}-closed")
    assert _health(case) == [UP, DOWN_AND_BLIND, UP]
    found = [line for line in engines.log(group).splitlines() if "does not see MoE layers" in line]
    assert any(f" {RANKED[group]} as" in line and _IN_THE_LOG[kind] in line for line in found)
    assert counter(case, "failures_total", stage="routing") >= 1
    assert counter(case, "mask_violations_total") == 0
    sound, faulty, mended = _endings(case)
    assert faulty[0] == (RANKED_TOKENS, None), "open: it passes"
    assert faulty[1][0] < RANKED_TOKENS
    assert faulty[1][1] == "moe_guard:closed/never", "closed: it is blocked"
    assert sound == [(RANKED_TOKENS, None)] * 2
    assert mended[0] == (RANKED_TOKENS, None)
    assert counter(case, "requests_total", outcome="unjudged") >= 1
    assert counter(case, "requests_total") == 6


@pytest.mark.parametrize("group", RANKED)
def test_a_mask_that_one_rank_ignores_is_counted_by_name_and_the_guard_stays_down(
    engines: Engines, group: str
) -> None:
    case = engines.case(group, "faults", "ignores_masks-reroute-reroute-closed")
    assert _health(case) == [UP, DOWN, DOWN]
    said = f"at work in MoE layers {RANKED[group]}, against the masks of reroute"
    assert said in engines.log(group)
    assert counter(case, "mask_violations_total", policy="reroute") >= 1
    assert counter(case, "failures_total", stage="routing") == 0
    sound, faulty, mended = _endings(case)
    assert sound == [(RANKED_TOKENS, None)] * 2
    for ending in (faulty, mended):
        assert ending[0] == (RANKED_TOKENS, None), "open: it passes"
    assert faulty[1][0] < RANKED_TOKENS
    assert faulty[1][1] == "moe_guard:reroute-closed/mask", "closed: it is blocked"
    assert counter(case, "requests_total", outcome="unjudged") == 2, "the open ones, then and later"
