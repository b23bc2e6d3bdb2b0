"""A fault in each stage of the guard: requests go on or end as onError says, and it is counted."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.offline.cases import (
    STAGE_FAULT_TOKENS,
    STAGES_BEHIND_IT,
    STAGES_IN_A_STEP,
)
from tests.integration.offline.engines import Engines
from tests.integration.offline.reading import Case, counter, samples

pytestmark = pytest.mark.vllm

WHOLE = (STAGE_FAULT_TOKENS, None)
BLOCKED = (0, "moe_guard:closed/never")


def endings(case: Case) -> list[tuple[int, Any]]:
    """(tokens, stop reason) of an open and a closed request that met the fault, then of two later."""
    return [(len(sample["tokens"]), sample["stop_reason"]) for sample in samples(case)]


def outcomes(case: Case) -> dict[str, float]:
    names = ("passed", "observed", "unjudged", "masked", "blocked")
    counted = {name: counter(case, "requests_total", outcome=name) for name in names}
    return {name: count for name, count in counted.items() if count}


def of_stage(engines: Engines, stage: str) -> Case:
    return engines.case("eager-faults", "stages", stage)


@pytest.mark.parametrize("stage", STAGES_IN_A_STEP)
def test_a_step_that_is_not_judged_follows_on_error_and_the_next_one_is_judged(
    engines: Engines, stage: str
) -> None:
    case = of_stage(engines, stage)
    assert endings(case) == [WHOLE, BLOCKED, WHOLE, WHOLE]
    assert outcomes(case) == {"observed": 2, "unjudged": 1, "blocked": 1}
    faults = counter(case, "failures_total", stage=stage)
    assert faults == counter(case, "failures_total") == (2 if stage == "admit" else 1)
    assert case["gauges"][-1]["up{}"] == 1


@pytest.mark.parametrize("stage", STAGES_BEHIND_IT)
def test_what_is_lost_behind_a_step_is_counted_and_touches_no_request(
    engines: Engines, stage: str
) -> None:
    case = of_stage(engines, stage)
    assert endings(case) == [WHOLE] * 4
    assert outcomes(case) == {"observed": 4}
    lost = "failures_total" if stage in ("deliver", "metrics") else "events_dropped_total"
    assert counter(case, lost, stage=stage) >= 1
    assert counter(case, "failures_total") + counter(case, "events_dropped_total") == counter(
        case, lost, stage=stage
    )
    assert [gauges["up{}"] for gauges in case["gauges"]] == [1, 1]
