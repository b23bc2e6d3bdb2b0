"""A routing fault on a rank whose output reaches nobody is in the report of the one whose does."""

from __future__ import annotations

import math
import uuid
from typing import Any

import pytest
import torch
import torch.distributed as dist

from guard.device.check import CHECK_EVERY_STEPS
from guard.device.pipeline import StageEvidence
from guard.program.step_report import Finding, Judged, RequestColumn, RoutingCheck, StepReport
from tests.support.ranks import make_group, run_ranks
from tests.unit.device.driving import FLAGGED, MASK, OTHER, policy_text, rule_text
from tests.unit.device.test_check import FaultyEngine
from tests.unit.device.test_pipeline import BOTH, SIZE, Rank

ALWAYS = policy_text(rule_text("{always: {}}", MASK))
RANKS = 3
LAST = RANKS - 1

Reported = tuple[list[int], list[float]]
FAULTS: dict[str, Reported | None] = {
    "silent": None,
    "missing": ([OTHER, -1], [0.5, 0.5]),
    "out of range": ([OTHER, 8], [0.5, 0.5]),
    "not finite": ([OTHER, 7], [math.nan, 0.5]),
    "duplicate": ([OTHER, OTHER], [0.5, 0.5]),
    "masked": ([FLAGGED, 7], [0.5, 0.5]),
}
KINDS = pytest.mark.parametrize("kind", FAULTS)


def numbers(check: RoutingCheck | None) -> list[Any]:
    assert check is not None
    return [
        check.layers,
        check.findings_LF.tolist(),
        check.silent_L.tolist(),
        check.findings_BF.tolist(),
        check.violations_L.tolist(),
        check.violations_BA.tolist(),
    ]


def break_(engine: FaultyEngine, kind: str) -> None:
    engine.reported = FAULTS[kind]
    engine.silent_layer = 0 if kind == "silent" else None


def alone(kind: str) -> list[Any]:
    engine = FaultyEngine(ALWAYS)
    engine.guard.add_request("a", 1)
    break_(engine, kind)
    return numbers(engine.one().check)


def tensor_parallel(group: dist.ProcessGroup) -> FaultyEngine:
    engine = FaultyEngine(ALWAYS)
    engine.guard.agree_with(group)
    engine.guard.add_request("a", 1)
    return engine


@KINDS
@pytest.mark.parametrize("broken", [[LAST], [0, LAST]], ids=["one rank", "two ranks"])
def test_what_a_tensor_parallel_rank_finds_all_report_once(kind: str, broken: list[int]) -> None:
    def run(rank: int, group: dist.ProcessGroup) -> tuple[list[Any], int]:
        engine = tensor_parallel(group)
        if rank in broken:
            break_(engine, kind)
        report = engine.one()
        return numbers(report.check), int(report.requests_B[0, RequestColumn.JUDGED])

    for found, judged in run_ranks(RANKS, run):
        assert found == alone(kind)
        assert judged == Judged.RANKS_DIFFER


def test_steps_that_are_not_checked_say_nothing_and_agree() -> None:
    def run(_: int, group: dist.ProcessGroup) -> list[bool]:
        engine = tensor_parallel(group)
        reports = [engine.one() for _ in range(CHECK_EVERY_STEPS + 1)]
        assert all(r.requests_B[0, RequestColumn.JUDGED] == Judged.YES for r in reports)
        return [report.check is not None for report in reports]

    assert run_ranks(2, run) == [[True, *[False] * (CHECK_EVERY_STEPS - 1), True]] * 2


def test_after_a_layer_was_silent_on_one_rank_all_distrust_it_until_it_reports_again() -> None:
    def run(rank: int, group: dist.ProcessGroup) -> None:
        engine = tensor_parallel(group)
        if rank == 1:
            engine.silent_layer = 1
        assert engine.one().check is not None
        engine.guard.finish_requests(["a"])
        engine.guard.add_request("a", 1)
        engine.position = 0
        blind = engine.one()
        assert blind.requests_B[0, RequestColumn.UNSEEN] == 1
        assert blind.requests_B[0, RequestColumn.JUDGED] == Judged.YES, "the ranks are at one"
        engine.silent_layer = None
        assert not engine.until_checked().silent_L.any()
        assert engine.one().requests_B[0, RequestColumn.OUTPUT_TOKENS] == 1

    run_ranks(2, run)


def test_ranks_that_do_not_check_the_same_steps_differ_and_do_not_hang() -> None:
    def run(rank: int, group: dist.ProcessGroup) -> int:
        engine = tensor_parallel(group)
        if rank == 1:
            engine.guard.count_step()
        return int(engine.one().requests_B[0, RequestColumn.JUDGED])

    assert run_ranks(2, run) == [Judged.RANKS_DIFFER] * 2


class FaultyRank(Rank):
    """Of a pipeline; its own layer is the one with its number."""

    def break_(self, kind: str) -> None:
        stock = self.guard.tap.record

        def record(layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
            if (faulty := FAULTS[kind]) is not None:
                reported = (torch.tensor([values]).expand(ids.shape) for values in faulty)
                stock(layer, *reported)

        self.guard.tap.record = record  # type: ignore[assignment]


PIPELINED = BOTH.replace("{count: {experts: f, over: request, atLeast: 4}}", "{always: {}}")


@KINDS
@pytest.mark.parametrize("broken", [[0], [1], [0, 1]], ids=["first", "last", "both"])
def test_the_last_rank_of_a_pipeline_reports_the_layers_of_all(kind: str, broken: list[int]) -> None:
    def run(rank: int, group: dist.ProcessGroup) -> list[Any] | None:
        one = FaultyRank(rank, group, PIPELINED)
        one.guard.add_request("a", 2)
        one.guard.add_request("b", 1)
        if rank in broken:
            one.break_(kind)
        report = one.step({"a": (0, [OTHER, OTHER]), "b": (0, [OTHER])})
        return None if report is None else numbers(report.check)

    found = run_ranks(SIZE, run)[-1]
    assert found is not None
    layers, by_layer, silent, by_request, violations_L, violations_BA = found
    assert layers == (0, 1)
    column = {"silent": Finding.MISSING, "missing": Finding.MISSING, "masked": None}.get(
        kind, {"out of range": 1, "not finite": 2, "duplicate": 3}.get(kind)
    )
    per_row = [int(column == number) for number in range(Finding.NUM)]
    assert by_layer == [[3 * n * (layer in broken) for n in per_row] for layer in range(SIZE)]
    assert silent == [kind == "silent" and layer in broken for layer in range(SIZE)]
    assert by_request == [[rows * len(broken) * n for n in per_row] for rows in (2, 1)]
    masked = int(kind == "masked")
    assert violations_L == [3 * masked * (layer in broken) for layer in range(SIZE)]
    assert violations_BA == [[2 * len(broken) * masked], [len(broken) * masked]]


def test_ranks_of_a_pipeline_that_do_not_check_the_same_steps_speak_for_no_row() -> None:
    def run(rank: int, group: dist.ProcessGroup) -> StepReport | None:
        one = Rank(rank, group)
        one.guard.add_request("a", 1)
        if rank == 0:
            one.guard.count_step()
        return one.step({"a": (0, [OTHER])})

    report = run_ranks(SIZE, run)[-1]
    assert report is not None
    assert report.requests_B[0, RequestColumn.JUDGED] == Judged.RANKS_DIFFER


class Corner(FaultyRank):
    """One of two stages of two ranks each. Where both ranks of a stage send on the same, vLLM takes of
    each what suits it: here nothing of the second one's word arrives."""

    def __init__(self, number: int, name: str) -> None:
        stage, rank = divmod(number, 2)
        super().__init__(stage, make_group(f"{name}-pipeline-{rank}", stage, SIZE), PIPELINED)
        self.stage_group = make_group(f"{name}-stage-{stage}", rank, 2)
        self.guard.agree_with(self.stage_group)
        self.guard.add_request("a", 1)

    def _send(self, evidence: StageEvidence) -> None:
        for word in evidence:
            if word is not None:
                dist.broadcast(word, group=self.stage_group, group_src=0)
        super()._send(evidence)


@KINDS
def test_what_any_tensor_parallel_rank_of_a_first_stage_finds_is_reported(kind: str) -> None:
    name = uuid.uuid4().hex

    def run(number: int, _: dist.ProcessGroup) -> list[Any] | None:
        one = Corner(number, name)
        if number == 1:
            one.break_(kind)
        report = one.step({"a": (0, [OTHER])})
        if report is None:
            return None
        assert report.requests_B[0, RequestColumn.JUDGED] == Judged.RANKS_DIFFER
        return numbers(report.check)

    *_, first, second = run_ranks(4, run)
    assert first == second
    assert first == alone(kind)


def test_a_fault_of_a_rank_of_a_first_stage_leaves_its_step_unjudged_and_hangs_nobody() -> None:
    name = uuid.uuid4().hex

    def run(number: int, _: dist.ProcessGroup) -> int | None:
        one = Corner(number, name)
        one.step({"a": (0, [OTHER])})
        if number == 1:
            one.guard._state.apply_staged_writes = _fail  # type: ignore[method-assign]
        report = one.step({"a": (1, [OTHER])})
        return None if report is None else int(report.requests_B[0, RequestColumn.JUDGED])

    assert run_ranks(4, run) == [None, None, Judged.RANKS_DIFFER, Judged.RANKS_DIFFER]


def _fail() -> None:
    raise RuntimeError("injected")
