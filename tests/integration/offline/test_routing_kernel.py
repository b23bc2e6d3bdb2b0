"""Engines whose only kernel routes inside itself: masks reach it through its logits, or start fails."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.offline.cases import BATCH, MASKED
from tests.integration.offline.engines import Engines
from tests.integration.offline.policies import FLAGGED
from tests.integration.offline.reading import counter, rows, text
from tests.support.support_facts import IN_A_KERNEL, Mode
from tests.support.support_recorder import SupportRecord
from tests.support.tiny_models import NUM_LAYERS

pytestmark = pytest.mark.vllm

MODES = ("main", "compiled")


def _case(engines: Engines, mode: str, name: str) -> dict[str, Any]:
    return engines.case("kernel", mode, name)


def _by_kernel(some_rows: list[Any]) -> list[set[int]]:
    """Whom the kernel itself chose, in each layer of each row."""
    return [set(ids_K) for _, _, _, ids_LK in some_rows for ids_K in ids_LK]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["unmasked", "masked"])
def test_the_tap_holds_whom_the_kernel_chose(engines: Engines, mode: str, name: str) -> None:
    case = _case(engines, mode, name)
    for output in case["batches"][0]:
        own = rows(case, output)
        assert len(own) == len(output["prompt"]) + len(output["samples"][0]["tokens"]) - 1
        seen = [set(ids_K) for _, ids_LK, *_ in own for ids_K in ids_LK]
        assert seen == _by_kernel(own)


@pytest.mark.parametrize("mode", MODES)
def test_in_a_masked_request_the_kernel_chooses_no_masked_expert(
    engines: Engines, mode: str, support_record: SupportRecord
) -> None:
    place: Mode = "compiled" if mode == "compiled" else "eager"
    support_record(IN_A_KERNEL, "observe", "reroute", mode=place)
    support_record.feature("kernels that route inside: logits are enough", runner="v1", mode=place)
    for name, masked in (("unmasked", ()), ("masked", MASKED)):
        case = _case(engines, mode, name)
        for i, output in enumerate(case["batches"][0]):
            chosen = _by_kernel(rows(case, output))
            uses = [len(ids & {*FLAGGED}) for ids in chosen]
            assert (sum(uses) == 0) == (i in masked)
            assert len(uses) >= NUM_LAYERS
    assert counter(case, "requests_total", outcome="masked") == len(MASKED)
    assert counter(case, "requests_total") == BATCH


@pytest.mark.parametrize("mode", MODES)
def test_only_the_masked_requests_differ_from_those_of_a_server_without_policies(
    engines: Engines, mode: str
) -> None:
    """Compiled, from those of the same graph when nobody asks for a mask."""
    plain = engines.case("kernel", "off" if mode == "main" else mode, "unmasked")["batches"][0]
    for name, masked in (("unmasked", ()), ("masked", MASKED)):
        ours = _case(engines, mode, name)["batches"][0]
        differing = {
            i
            for i, (own, other) in enumerate(zip(ours, plain, strict=True))
            if text(own["samples"][0]) != text(other["samples"][0])
        }
        assert differing == {*masked}


def test_decisions_are_those_of_a_kernel_that_its_router_routes_for(engines: Engines) -> None:
    inside = engines.case("kernel", "main", "long")
    beside = engines.case("eager-guarded", "main", "long")

    def told(case: dict[str, Any]) -> list[tuple[Any, ...]]:
        names = ("policy", "rule", "action", "position")
        return [tuple(decision[name] for name in names) for decision in case["decisions"]]

    assert told(inside) == told(beside)
    assert told(inside)


@pytest.mark.parametrize("mode", MODES)
def test_the_running_check_finds_nothing_wrong(engines: Engines, mode: str) -> None:
    for name in ("unmasked", "masked"):
        case = _case(engines, mode, name)
        assert case["gauges"] == [{"up{}": 1.0, "blind_layers{}": 0.0}]
        assert counter(case, "failures_total") == counter(case, "mask_violations_total") == 0


def test_a_kernel_that_is_called_past_the_guard_is_a_silent_layer(engines: Engines) -> None:
    case = engines.case("kernel", "main", "uncalled-closed")
    assert [tuple(gauges.values()) for gauges in case["gauges"]] == [(1.0, 0.0), (0.0, 1.0), (1.0, 0.0)]
    assert counter(case, "failures_total", stage="routing") >= 1
    (_, closed) = (out["samples"][0]["stop_reason"] for out in case["batches"][1])
    assert closed == "moe_guard:closed/never"


def test_a_mask_that_is_not_in_the_logits_is_a_violation(engines: Engines) -> None:
    case = engines.case("kernel", "main", "ignores_masks-isolate")
    assert [gauges["up{}"] for gauges in case["gauges"]] == [1.0, 0.0, 0.0]
    assert counter(case, "mask_violations_total", policy="isolate") > 0
    assert counter(case, "requests_total", outcome="masked") == 1, "of the sound batch"


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("drops", "PolicyError", "layer 0 is routed inside its kernel, where a mask can reroute"),
        ("deaf", "NotLiveError", "layer 0 does not use the experts that its logits choose: DeafKernel"),
    ],
)
def test_what_its_logits_cannot_do_stops_the_start(
    engines: Engines, name: str, error: str, reason: str
) -> None:
    found = engines.result("kernel", name)["error"]
    assert f"{error}: " in found
    assert reason in found
