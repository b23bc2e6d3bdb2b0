"""Every router family in a real engine: routing is seen, masks hold, neighbours notice nothing."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from tests.integration.families.engines import (
    ASKED,
    METHODS,
    OUTPUT_TOKENS,
    FamilyEngines,
    masked_experts,
    masked_request,
)
from tests.integration.offline.reading import counter, rows, text
from tests.support.families import FAMILIES, Family
from tests.support.support_facts import Method, Mode, Runner
from tests.support.support_recorder import SupportRecord

pytestmark = pytest.mark.vllm

_PLACES: dict[str, tuple[Runner, Mode]] = {
    "v1": ("v1", "eager"),
    "v2": ("v2", "eager"),
    "compiled": ("v1", "compiled"),
}
_RUNS = [
    pytest.param(place, family, id=f"{place}-{family.slug}")
    for place in _PLACES
    for family in FAMILIES
    if family.runs_on(place)
]
_FAILS = [pytest.param(family, id=family.slug) for family in FAMILIES if family.failure]

_ROUNDED_OTHERWISE = ("DeepSeek-V3", "Llama 4")
"""On a CPU Inductor traces these routers, which are plain torch, and fuses them with the guard's own
code: last bits differ from those of vLLM alone. There, masks are compared with no masks under the same
graph. On CUDA the MoE layer is one operation that is not traced."""

Experts = Counter[tuple[int, int]]


def _cases(engines: FamilyEngines, place: str, family: Family) -> tuple[dict[str, Any], ...]:
    group = f"{place}-guarded"
    return tuple(engines.case(group, family.name, name) for name in ("unmasked", "masked"))


def _rows(case: dict[str, Any], number: int) -> list[Any]:
    return rows(case, case["batches"][0][number])


def _at_work(some_rows: list[Any], family: Family) -> Experts:
    """(layer number, expert) -> rows in which it has weight."""
    return Counter(
        (number, expert)
        for _, ids_LK, weights_LK in some_rows
        for number, ids_K, weights_K in zip(family.moe_layers, ids_LK, weights_LK, strict=True)
        for expert, weight in zip(ids_K, weights_K, strict=True)
        if weight != 0.0
    )


def _named(family: Family, asked: str) -> set[tuple[int, int]]:
    return {(n, e) for n, experts in masked_experts(family, asked).items() for e in experts}


@pytest.mark.parametrize(("place", "family"), _RUNS)
def test_every_row_chooses_different_experts_with_sound_weights(
    family_engines: FamilyEngines, place: str, family: Family, support_record: SupportRecord
) -> None:
    runner, mode = _PLACES[place]
    support_record(family.name, "observe", runner=runner, mode=mode)
    for case in _cases(family_engines, place, family):
        for number, output in enumerate(case["batches"][0]):
            judged = _rows(case, number)
            assert [row[0] for row in judged] == list(range(len(output["prompt"]) + OUTPUT_TOKENS - 1))
            for _, ids_LK, weights_LK in judged:
                assert len(ids_LK) == len(family.moe_layers)
                for ids_K, weights_K in zip(ids_LK, weights_LK, strict=True):
                    assert len(ids_K) == family.top_k
                    assert all(math.isfinite(weight) for weight in weights_K)
                    at_work = [e for e, w in zip(ids_K, weights_K, strict=True) if w != 0.0]
                    assert len(set(at_work)) == len(at_work), ids_K
                    assert all(0 <= expert < family.num_experts for expert in at_work)


@pytest.mark.parametrize(("place", "family"), _RUNS)
def test_without_a_mask_named_experts_are_at_work(
    family_engines: FamilyEngines, place: str, family: Family
) -> None:
    """What makes the next tests mean something: each named expert in some request of the batch, and
    in every layer some of them in the very request that will ask for the mask."""
    unmasked, _ = _cases(family_engines, place, family)
    everywhere = Experts()
    for number in range(len(unmasked["batches"][0])):
        everywhere += _at_work(_rows(unmasked, number), family)
    for asked in ASKED:
        judged = _rows(unmasked, masked_request(asked))
        own, named = _at_work(judged, family), _named(family, asked)
        assert named <= set(everywhere), f"{asked}: {sorted(named - set(everywhere))}"
        if asked == "force":
            assert all(own[pair] < len(judged) for pair in named)
        else:
            assert {layer for layer, _ in named & set(own)} == {n for n, _ in named}, asked


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize(("place", "family"), _RUNS)
def test_a_mask_holds_in_every_row_and_layer_of_the_request_that_asks(
    family_engines: FamilyEngines,
    place: str,
    family: Family,
    asked: str,
    support_record: SupportRecord,
) -> None:
    runner, mode = _PLACES[place]
    method: Method = "reroute" if asked == "reroute-most" else asked  # type: ignore[assignment]
    support_record(family.name, method, runner=runner, mode=mode)
    _, masked = _cases(family_engines, place, family)
    judged = _rows(masked, masked_request(asked))
    at_work = _at_work(judged, family)
    if asked == "force":
        assert {pair: at_work[pair] for pair in _named(family, asked)} == dict.fromkeys(
            _named(family, asked), len(judged)
        )
    else:
        assert not _named(family, asked) & set(at_work)
    sums = [sum(weights_K) for _, _, weights_LK in judged for weights_K in weights_LK]
    if method == "reroute":
        assert all(
            len([w for w in weights_K if w]) for *_, weights_LK in judged for weights_K in weights_LK
        )
    if method == "drop":
        assert min(sums) < max(sums)


@pytest.mark.parametrize(("place", "family"), _RUNS)
def test_only_the_masked_requests_differ_from_vllm_without_the_plugin(
    family_engines: FamilyEngines, place: str, family: Family, support_record: SupportRecord
) -> None:
    runner, mode = _PLACES[place]
    support_record(family.name, "observe", *METHODS, runner=runner, mode=mode)
    unmasked, masked = _cases(family_engines, place, family)
    plain = unmasked
    if place != "compiled" or family.name not in _ROUNDED_OTHERWISE:
        plain = family_engines.case(f"{place}-plain", family.name, "unmasked")
    asking = {masked_request(asked) for asked in ASKED}
    for case, differing in ((unmasked, set()), (masked, asking)):
        found = {
            number
            for number, (ours, theirs) in enumerate(
                zip(case["batches"][0], plain["batches"][0], strict=True)
            )
            if text(ours["samples"][0]) != text(theirs["samples"][0])
        }
        assert found == differing


@pytest.mark.parametrize(("place", "family"), _RUNS)
def test_the_running_check_finds_nothing_wrong(
    family_engines: FamilyEngines, place: str, family: Family
) -> None:
    for case in _cases(family_engines, place, family):
        assert case["gauges"] == [{"up{}": 1.0, "blind_layers{}": 0.0}]
        assert counter(case, "failures_total") == counter(case, "mask_violations_total") == 0


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, id=f.slug) for f in FAMILIES if f.runs_on("v2") and f.is_recorded],
)
def test_the_tap_holds_what_vllms_own_record_holds(
    family_engines: FamilyEngines, family: Family, support_record: SupportRecord
) -> None:
    support_record(family.name, "observe", runner="v2")
    for case in _cases(family_engines, "v2", family):
        for number, output in enumerate(case["batches"][0]):
            record = output["samples"][0]["routed_experts"]
            recorded = [[layers[n] for n in family.moe_layers] for layers in record]
            assert [row[1] for row in _rows(case, number)] == recorded


@pytest.mark.parametrize("family", _FAILS)
def test_vllm_itself_cannot_run_these_here(
    family_engines: FamilyEngines, family: Family, support_record: SupportRecord
) -> None:
    assert family.failure is not None
    why = f"vLLM 0.32 itself fails on a CPU: {family.failure.why}"
    support_record(family.name, "observe", *METHODS, untestable=why)
    assert family.failure.explains(family_engines.result("v1-plain", family.name)["error"])


@pytest.mark.parametrize("family", [pytest.param(f, id=f.slug) for f in FAMILIES if f.refusal])
def test_the_guard_does_not_start_on_what_it_cannot_mask(
    family_engines: FamilyEngines, family: Family, support_record: SupportRecord
) -> None:
    support_record(family.name, *METHODS, refused=family.refusal)
    last_line = family_engines.result("v1-guarded", family.name)["error"].strip().splitlines()[-1]
    assert last_line.partition(":")[0].endswith("UnsupportedHostError")
    assert family.refusal in last_line
