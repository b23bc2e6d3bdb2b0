"""What ranks that compute the same rows learn of each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from guard.failures import Stage
from guard.program.step_report import Judged, RequestColumn, StepReport
from tests.support.ranks import run_ranks
from tests.unit.device.driving import COUNT, FLAGGED, MASK, OTHER, Engine, policy_text, rule_text

MASKS = policy_text(rule_text(COUNT, MASK))


def engine_of(group: dist.ProcessGroup, text: str = MASKS) -> Engine:
    engine = Engine(text)
    engine.guard.agree_with(group)
    return engine


def judged(report: StepReport) -> list[int]:
    found: list[int] = report.requests_B[:, RequestColumn.JUDGED].tolist()
    return found


def test_ranks_that_decide_alike_are_left_as_they_are() -> None:
    def run(_: int, group: dist.ProcessGroup) -> list[list[int]]:
        engine = engine_of(group)
        engine.guard.add_request("a", 1)
        engine.guard.add_request("b", 1)
        rows = {"a": (0, [FLAGGED]), "unknown": (0, [OTHER]), "b": (0, [OTHER])}
        return [judged(engine.step(rows)), judged(engine.step({"b": (1, [OTHER])}))]

    assert run_ranks(2, run) == [[[Judged.YES, Judged.NO, Judged.YES], [Judged.YES]]] * 2


def test_only_the_request_that_was_routed_otherwise_on_one_rank_is_marked_on_all_of_them() -> None:
    def run(rank: int, group: dist.ProcessGroup) -> list[list[int]]:
        engine = engine_of(group)
        engine.guard.add_request("a", 1)
        engine.guard.add_request("b", 1)
        other = FLAGGED if rank == 2 else OTHER
        first = engine.step({"a": (0, [OTHER]), "b": (0, [other])})
        later = engine.step({"b": (1, [OTHER]), "a": (1, [OTHER])})
        return [judged(first), judged(later)]

    differ = Judged.RANKS_DIFFER
    # Later: the other rank still masks what these do not.
    assert run_ranks(3, run) == [[[Judged.YES, differ], [differ, Judged.YES]]] * 3


@pytest.mark.parametrize("stage", [Stage.BEGIN_STEP, Stage.EVALUATE])
def test_a_fault_of_one_rank_marks_the_step_on_the_others(stage: Stage) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("injected")

    def run(rank: int, group: dist.ProcessGroup) -> tuple[bool, list[int]]:
        engine = engine_of(group)
        engine.guard.add_request("a", 1)
        if rank == 1:
            owner: Any = engine.guard
            if stage is Stage.BEGIN_STEP:
                owner._state.apply_staged_writes = fail
            else:
                owner._evaluator.evaluate = fail
        report = engine.step({"a": (0, [OTHER])})
        return report.failed, judged(report)

    assert run_ranks(2, run) == [(False, [Judged.RANKS_DIFFER]), (True, [])]


def test_a_rank_that_never_learned_of_its_rows_still_answers() -> None:
    def run(rank: int, group: dist.ProcessGroup) -> list[int] | None:
        engine = engine_of(group)
        engine.guard.add_request("a", 1)
        if rank == 1:
            engine.guard.idle()
            assert engine.guard.end_step() is None
            return None
        return judged(engine.step({"a": (0, [OTHER])}))

    assert run_ranks(2, run) == [[Judged.RANKS_DIFFER], None]
