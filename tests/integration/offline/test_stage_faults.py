"""A fault in each stage of the guard: requests go on or end as onError says, and it is counted."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.offline.cases import (
    LASTING_FAULTS,
    LOST_BEHIND_IT,
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
    assert counter(case, lost, stage=stage) == 1
    assert counter(case, "failures_total") + counter(case, "events_dropped_total") == 1
    assert [gauges["up{}"] for gauges in case["gauges"]] == [1, 1]


@pytest.mark.parametrize("name", LASTING_FAULTS)
def test_while_a_stage_fails_in_every_step_the_guard_is_down_and_it_comes_back_by_itself(
    engines: Engines, name: str
) -> None:
    case = of_stage(engines, name)
    without_ledger = "ledger" in LASTING_FAULTS[name]
    blocked = (0, "moe_guard") if without_ledger else BLOCKED  # nobody is there to name the rule
    assert endings(case) == [WHOLE, blocked, WHOLE, WHOLE]
    ended = {} if without_ledger else {"unjudged": 1, "blocked": 1}
    assert outcomes(case) == {"observed": 2} | ended
    assert counter(case, "failures_total") >= STAGE_FAULT_TOKENS
    assert [gauges["up{}"] for gauges in case["gauges"]] == [0, 1]


@pytest.mark.parametrize("name", LOST_BEHIND_IT)
def test_while_nothing_gets_out_requests_are_judged_and_the_loss_is_counted(
    engines: Engines, name: str
) -> None:
    """Counters that could not be delivered come later; those that could not be shown are lost."""
    case = of_stage(engines, name)
    assert endings(case) == [WHOLE] * 4
    assert outcomes(case) == {"observed": 2 if name == "never counted" else 4}
    assert [gauges["up{}"] for gauges in case["gauges"]] == [1, 1]
    stage = "deliver" if name == "message lost" else LOST_BEHIND_IT[name].partition("@")[0]
    lost = "events_dropped_total" if stage == "decision_log" else "failures_total"
    assert counter(case, lost, stage=stage) >= 1
    assert counter(case, "failures_total") + counter(case, "events_dropped_total") == counter(
        case, lost, stage=stage
    )
