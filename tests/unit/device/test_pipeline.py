"""Two ranks of a pipeline, a layer each, against one rank that has both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from guard.device.layout import Capacity
from guard.device.pipeline import PipelineStage, StageEvidence
from guard.policy import parse_policies
from guard.program.compile import compile_policies
from guard.program.step_report import Judged, RequestColumn, StepReport
from guard.staged import StagedGuard
from tests.support.opened import opened
from tests.support.ranks import run_ranks
from tests.unit.device.driving import FLAGGED, OTHER, TOPOLOGY, Engine, policy_text, rule_text

Rows = Mapping[str, tuple[int, Sequence[int]]]
"""Of each request its first position and the expert of each row, in both layers."""

SIZE = 2
BOTH = (
    "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: p}\n"
    "spec:\n  mode: enforce\n  experts: {f: [{layers: 0-1, experts: [3]}]}\n  rules:\n"
    + rule_text("{count: {experts: f, over: request, atLeast: 4}}", "{mask: {experts: f}}", name="m")
    + rule_text("{mass: {experts: f, over: 2, minTokens: 1, above: 0.4}}", name="r")
    + rule_text("{coactivation: {experts: f, members: 2, over: 3, atLeast: 2}}", name="c")
    + rule_text("{coactivation: {experts: f, layers: 2, over: request, above: 2}}", name="l")
    + rule_text("{entropy: {over: request, above: 2.5}}", name="e")
    + rule_text("{concentration: {over: 2, minTokens: 1, above: 1.5}}", name="n")
    + rule_text("{count: {experts: f, over: request, atLeast: 6}}", "{block: {message: x}}", name="b")
)


class Rank:
    """One rank of the pipeline; `step` returns on the last one what it decided."""

    def __init__(self, rank: int, group: dist.ProcessGroup, text: str = BOTH) -> None:
        program = compile_policies(parse_policies(text), TOPOLOGY)
        stage = PipelineStage([rank], rank, SIZE, group)
        capacity = Capacity(64, 4, max(1, program.masks.num_words))
        self.guard = StagedGuard(program, capacity, torch.device("cpu"), stage=stage)
        self.rank, self.group = rank, group
        self.masked: list[list[bool]] = []

    def step(self, rows: Rows, sampled: Sequence[str] | None = None) -> StepReport | None:
        guard = self.guard
        counts = [len(experts) for _, experts in rows.values()]
        starts = torch.from_numpy(np.cumsum([0, *counts]))
        positions = [np.arange(start, start + len(e)) for start, e in rows.values()]
        position_T = torch.from_numpy(np.concatenate(positions))
        num_rows = len(position_T)
        guard.idle()
        guard.begin_step(list(rows), starts, position_T)
        assert guard.mask is not None
        self.masked.append(guard.mask.row_bits_TW[:num_rows].ne(0).any(dim=1).tolist())
        chosen = torch.tensor([e for _, experts in rows.values() for e in experts])
        ids = torch.stack([chosen, torch.full_like(chosen, 7)], dim=1)
        guard.tap.record(self.rank, ids, torch.full(ids.shape, 0.5))
        width = guard.program.signals.num_evidence + guard.capacity.mask_words
        if self.rank == 0:
            evidence = guard.evidence(num_rows, len(rows), None)
            assert evidence is not None
            assert evidence.rows_TY.shape == (num_rows, width)
            self._send(evidence)
            guard.expect_decisions(
                list(rows), starts, position_T, list(rows) if sampled is None else sampled
            )
            position_T.fill_(-1)  # as an engine that writes its next step over these
            return None
        guard.evidence(num_rows, len(rows), self._received(torch.empty((num_rows, width))))
        return opened(guard.end_step(), guard)

    def _send(self, evidence: StageEvidence) -> None:
        dist.broadcast(evidence.rows_TY.clone(), group=self.group, group_src=0)
        found = evidence.findings_N
        size = torch.tensor(-1 if found is None else len(found))
        dist.broadcast(size, group=self.group, group_src=0)
        if found is not None:
            dist.broadcast(found.clone(), group=self.group, group_src=0)

    def _received(self, like_TY: torch.Tensor) -> StageEvidence:
        rows_TY = torch.empty(like_TY.shape, dtype=torch.int64)
        dist.broadcast(rows_TY, group=self.group, group_src=0)
        size = torch.tensor(0)
        dist.broadcast(size, group=self.group, group_src=0)
        if size < 0:
            return StageEvidence(rows_TY)
        findings_N = torch.empty(int(size), dtype=torch.int64)
        dist.broadcast(findings_N, group=self.group, group_src=0)
        return StageEvidence(rows_TY, findings_N)


STEPS: list[Rows] = [
    {"a": (0, [OTHER, FLAGGED]), "b": (0, [FLAGGED])},
    {"a": (2, [FLAGGED]), "b": (1, [OTHER])},
    {"b": (2, [FLAGGED]), "a": (3, [OTHER])},
    {"a": (4, [FLAGGED]), "b": (3, [FLAGGED])},
    {"b": (4, [OTHER])},
]


def admit(guard: Any) -> None:
    guard.add_request("a", 2)
    guard.add_request("b", 1)


def test_the_ranks_mask_at_the_same_rows_and_report_what_one_rank_would() -> None:
    alone = Engine(BOTH)
    admit(alone.guard)
    expected, masked = [], []
    for rows in STEPS:
        expected.append(alone.step(rows))
        assert alone.guard.mask is not None
        num_rows = sum(len(experts) for _, experts in rows.values())
        masked.append(alone.guard.mask.row_bits_TW[:num_rows].ne(0).any(dim=1).tolist())

    def run(rank: int, group: dist.ProcessGroup) -> tuple[list[Any], list[list[bool]]]:
        one = Rank(rank, group)
        admit(one.guard)
        return [one.step(rows) for rows in STEPS], one.masked

    first, last = run_ranks(SIZE, run)
    assert first[1] == last[1] == masked
    assert any(any(rows) for rows in masked)
    for report, alone_report in zip(last[0], expected, strict=True):
        np.testing.assert_array_equal(report.requests_B, alone_report.requests_B)
        np.testing.assert_array_equal(report.events_V, alone_report.events_V)
        np.testing.assert_array_equal(report.values_V, alone_report.values_V)
        np.testing.assert_array_equal(report.masked_BW, alone_report.masked_BW)


def test_chunks_of_a_prompt_do_not_wait_for_one_another() -> None:
    def run(rank: int, group: dist.ProcessGroup) -> None:
        one = Rank(rank, group)
        one.guard.add_request("a", 4)
        one.step({"a": (0, [FLAGGED, FLAGGED])}, sampled=[])
        one.step({"a": (2, [FLAGGED, FLAGGED])}, sampled=["a"])
        if rank == 0:
            assert len(one.guard.stage._pending) == 2
        one.step({"a": (4, [OTHER])})
        assert one.masked == [[False, False], [False, False], [True]]

    run_ranks(SIZE, run)


def test_a_slot_whose_request_ended_is_not_touched_by_what_comes_back_for_it() -> None:
    def run(rank: int, group: dist.ProcessGroup) -> StepReport | None:
        one = Rank(rank, group)
        one.guard.add_request("gone", 1)
        one.step({"gone": (0, [FLAGGED])}, sampled=[])
        one.guard.finish_requests(["gone"])
        one.guard.add_request("a", 1)  # in the slot of the one before
        one.step({"a": (0, [OTHER])})
        one.step({"a": (1, [OTHER])})
        last = one.step({"a": (2, [FLAGGED])})
        assert one.masked[-1] == [False]
        return last

    report = run_ranks(SIZE, run)[-1]
    assert report is not None
    assert report.requests_B[0, RequestColumn.UNSEEN] == 0


@pytest.mark.parametrize("broken_rank", range(SIZE))
@pytest.mark.parametrize("method", ["begin", "signals", "evaluate"])
def test_a_fault_on_any_rank_leaves_the_step_unjudged_and_hangs_nobody(
    broken_rank: int, method: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("injected")

    def run(rank: int, group: dist.ProcessGroup) -> list[bool]:
        one = Rank(rank, group)
        admit(one.guard)
        guard: Any = one.guard
        owner, name = {
            "begin": (guard._state, "apply_staged_writes"),
            "signals": (guard._evaluator, "signals"),
            "evaluate": (guard._evaluator, "evaluate"),
        }[method]
        stock = getattr(owner, name)
        reports = [one.step(STEPS[0])]
        if rank == broken_rank:
            setattr(owner, name, fail)
        reports.append(one.step(STEPS[1]))
        setattr(owner, name, stock)
        reports += [one.step(rows) for rows in STEPS[2:]]
        return [report is not None and _is_judged(report) for report in reports]

    judged = run_ranks(SIZE, run)[-1]
    assert judged[0]
    assert not all(judged[1:])
    if broken_rank == 0 and method != "signals":
        assert not any(judged[2:]), "the first rank's slots stay behind until the requests end"


def _is_judged(report: StepReport) -> bool:
    return not report.failed and bool((report.requests_B[:, RequestColumn.JUDGED] == Judged.YES).all())


def test_ranks_that_mask_otherwise_leave_the_row_unseen() -> None:
    def run(rank: int, group: dist.ProcessGroup) -> StepReport | None:
        one = Rank(rank, group, policy_text(rule_text("{always: {}}", "{mask: {experts: f}}")))
        one.guard.add_request("a", 1)
        if rank == 0:
            state: Any = one.guard._state
            state.masks_at = lambda slots, _: torch.zeros((len(slots), 1), dtype=torch.bool)
        return one.step({"a": (0, [OTHER])})

    report = run_ranks(SIZE, run)[-1]
    assert report is not None
    assert report.requests_B[0, RequestColumn.JUDGED] == Judged.RANKS_DIFFER
