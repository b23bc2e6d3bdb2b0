"""What an operator's masks count, though the condition of their rules is `always`."""

from __future__ import annotations

import pytest

from guard.device.kernels.choice import KERNELS_VARIABLE
from guard.overrides.apply import apply_overrides
from guard.overrides.model import OPERATOR, Overrides
from guard.policy import parse_policies
from guard.program.applicability import RequestFacts
from guard.program.compile import compile_policies
from guard.program.program import Program
from guard.program.step_report import RequestColumn, StepReport
from tests.unit.device.driving import (
    COUNT,
    FLAGGED,
    OTHER,
    TOPOLOGY,
    Engine,
    policy_text,
    rule_text,
)


def program(*, kill_switch: bool = False) -> Program:
    overrides, _ = Overrides(kill_switch=kill_switch).with_mask(
        [(0, FLAGGED)], by="alice", reason="a look", labels={"tenant": "red"}
    )
    overrides, _ = overrides.with_mask([(1, OTHER), (1, 7)], by="alice", reason="a look")
    text = policy_text(rule_text(COUNT))
    return compile_policies(apply_overrides(parse_policies(text), overrides), TOPOLOGY)


def selections(engine: Engine, report: StepReport) -> dict[tuple[str, str], list[int]]:
    """By policy and set, of each request."""
    return {
        (named.policy, named.name): report.requests_B[:, RequestColumn.NUM + number].tolist()
        for number, named in enumerate(engine.program.sets)
    }


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_each_mask_counts_its_own_experts(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, kernels)
    engine = Engine("", compiled=program())
    engine.guard.add_request("red", 1, RequestFacts("red", labels={"tenant": "red"}))
    engine.guard.add_request("other", 1)

    report = engine.step({"red": (0, [OTHER, FLAGGED]), "other": (0, [FLAGGED, FLAGGED, OTHER])})

    found = selections(engine, report)
    assert found[OPERATOR, "mask-1"] == [1, 2]
    assert found[OPERATOR, "mask-2"] == [3, 4], "each row's second expert, and two rows' first"
    assert found["p", "f"] == [1, 2]


def test_it_counts_where_the_kill_switch_holds_the_masks_back() -> None:
    engine = Engine("", compiled=program(kill_switch=True))
    engine.guard.add_request("a", 1)
    report = engine.step({"a": (0, [FLAGGED])})

    assert selections(engine, report)[OPERATOR, "mask-1"] == [1]
    assert engine.masked_rows(1) == [False]
