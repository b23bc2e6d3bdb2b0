"""Guards that judge by the kernels and by their twin: each step by both, from the same state.

Both must say and leave the same, bit for bit but for logarithms and exponentials. What the next step
goes on from is in turns what the one left and what the other did.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

import guard.prepared
from guard.device.check import LivenessCheck
from guard.device.evaluate import StepEvaluator
from guard.device.kept_evidence import KeepRows, KeptEvidence
from guard.device.kernels.backends import Judge, make_judge
from guard.device.kernels.choice import has_kernels
from guard.device.kernels.native.judge import NativeJudge
from guard.device.kernels.native.start import NativeStart
from guard.device.kernels.native.whole_step import WholeStep, make_whole_step
from guard.device.layout import NULL_SLOT, Capacity
from guard.device.load import ExpertLoad
from guard.device.mask import ExpertMask
from guard.device.readback import StepDecisions
from guard.device.rows import StepBatch
from guard.device.start import Started, TorchStart
from guard.device.state import SlotState
from guard.device.tap import RoutingTap
from guard.program.program import Program
from guard.program.step_report import PackedReport, StepReport, StepSummary

judged = Counter[str]()
"""Steps by who could decide them: `both`, or the `twin` alone."""


_KEPT = ("written_K", "narrow_KX", "wide_KX")


class JudgedTwice:
    def __init__(self, kernels: NativeJudge, twin: StepEvaluator) -> None:
        self.kernels, self.twin = kernels, twin
        self.is_twins_turn = itertools.cycle([False, True])

    def signals(self, tap: RoutingTap, num_rows: int) -> torch.Tensor:
        evidence_TX = self.kernels.signals(tap, num_rows)
        assert torch.equal(evidence_TX, self.twin.signals(tap, num_rows))
        return evidence_TX

    def kept_signals(
        self, tap: RoutingTap, num_rows: int, trusted_T1: torch.Tensor, keep: KeepRows | None
    ) -> torch.Tensor:
        expected_TX = self.twin.signals(tap, num_rows) * trusted_T1
        twins = None if keep is None else _copy_of_kept(keep.kept)
        if keep is not None and twins is not None:
            keep._replace(kept=twins).write(expected_TX)
        evidence_TX = self.kernels.kept_signals(tap, num_rows, trusted_T1, keep)
        assert torch.equal(evidence_TX, expected_TX)
        for name in _KEPT if keep is not None else ():
            assert keep is not None
            assert torch.equal(getattr(keep.kept, name)[:-1], getattr(twins, name)[:-1]), name
        return evidence_TX

    def evaluate(
        self,
        evidence_TX: torch.Tensor,
        batch: StepBatch,
        state: SlotState,
        rejected_B: torch.Tensor | None = None,
        *,
        computed_B: torch.Tensor | None = None,
    ) -> StepDecisions:
        judged["both"] += 1
        rows = (evidence_TX, batch)
        twins = _copy_of(state)
        expected = self.twin.evaluate(*rows, twins, rejected_B, computed_B=computed_B)
        decisions = self.kernels.evaluate(*rows, state, rejected_B, computed_B=computed_B)
        _assert_same_decisions(decisions, expected)
        self.compare(state, twins)
        return decisions

    def compare(self, state: SlotState, twins: SlotState) -> None:
        takes_twins = next(self.is_twins_turn)
        for name, tensor in _tensors(state).items():
            _assert_same(
                f"state.{name}", tensor[NULL_SLOT + 1 :], getattr(twins, name)[NULL_SLOT + 1 :]
            )
            if takes_twins:
                tensor.copy_(getattr(twins, name))


class BegunTwice:
    """What a step begins with, in the same way."""

    def __init__(self, tap: RoutingTap, mask: ExpertMask | None, state: SlotState) -> None:
        self._tap, self._mask = tap, mask
        self._kernels, self._twin = NativeStart(tap, mask), TorchStart(tap, mask)

    def begin(
        self,
        slots_B: torch.Tensor,
        query_start_B1: torch.Tensor,
        position_T: torch.Tensor,
        state: SlotState,
    ) -> Started:
        rows = (slots_B, query_start_B1, position_T, state)
        tap_TLK = self._tap.topk_ids_TLK.clone()
        expected = self._twin.begin(*rows)
        expected_bits_TW = None if self._mask is None else self._mask.row_bits_TW.clone()
        emptied_TLK = self._tap.topk_ids_TLK.clone()
        self._tap.topk_ids_TLK.copy_(tap_TLK)
        if self._mask is not None and state.program.masks.num_actions:
            self._mask.row_bits_TW[: len(position_T)].fill_(-1)  # as a step before left it
        started = self._kernels.begin(*rows)
        for ours, twins in zip(started.batch, expected.batch, strict=True):
            assert torch.equal(ours, twins)
        assert torch.equal(self._tap.topk_ids_TLK, emptied_TLK)
        if self._mask is not None and expected_bits_TW is not None:
            assert torch.equal(self._mask.row_bits_TW, expected_bits_TW)
        return started


class SteppedTwice:
    """A whole step in the same way, each of its parts by the twins."""

    def __init__(
        self,
        judge: JudgedTwice,
        tap: RoutingTap,
        mask: ExpertMask | None,
        state: SlotState,
        kept: KeptEvidence | None,
        check: LivenessCheck,
        load: ExpertLoad,
    ) -> None:
        whole = make_whole_step(judge.kernels, tap, mask, state, kept, check, load)
        assert whole is not None
        self.checks = whole.checks
        self._check, self._load = check, load
        self._whole, self._judge = whole, judge
        self._tap, self._mask, self._state, self._kept = tap, mask, state, kept
        self._twin = TorchStart(tap, mask)

    def begin(
        self,
        slots_B: torch.Tensor,
        query_start_B1: torch.Tensor,
        position_T: torch.Tensor,
        num_rows: int,
    ) -> None:
        before_TLK = self._tap.topk_ids_TLK.clone()
        starts_B1 = query_start_B1[: len(slots_B) + 1]
        started = self._twin.begin(slots_B, starts_B1, position_T[:num_rows], self._state)
        self._batch = started.batch
        emptied_TLK = self._tap.topk_ids_TLK.clone()
        self._tap.topk_ids_TLK.copy_(before_TLK)
        expected_bits_TW = None
        if self._mask is not None and self._state.program.masks.num_actions:
            expected_bits_TW = self._mask.row_bits_TW.clone()
            self._mask.row_bits_TW[:num_rows].fill_(-1)  # as a step before left it
        self._whole.begin(slots_B, query_start_B1, position_T, num_rows)
        assert torch.equal(self._tap.topk_ids_TLK, emptied_TLK)
        if self._mask is not None and expected_bits_TW is not None:
            assert torch.equal(self._mask.row_bits_TW, expected_bits_TW)

    def batch(self) -> StepBatch:
        batch = self._whole.batch()
        for ours, twins in zip(batch, self._batch, strict=True):
            assert torch.equal(ours, twins)
        return batch

    @torch.inference_mode()
    def is_sound(self) -> bool:
        in_force_TA = None
        if self._mask is not None and self._state.program.masks.num_actions:
            in_force_TA = self._state.masks_at(self._batch.slot_T, self._batch.position_T)
        findings, _ = self._check._find(self._tap, self._batch, in_force_TA)
        is_sound = self._whole.is_sound()
        assert is_sound == (not any(found.any() for found in findings))
        return is_sound

    @torch.inference_mode()  # for the twins: a whole step has no operation of torch
    def end(
        self, req_ids: tuple[str, ...], revision: str, kv_slot_T: torch.Tensor | None
    ) -> PackedReport | StepDecisions:
        judged["both"] += 1
        judged["whole"] += 1
        twins, twin, num_rows = _copy_of(self._state), self._judge.twin, len(self._batch.position_T)
        trusted = self._check.trusted
        expected_TX = twin.signals(self._tap, num_rows) * trusted
        twins_load = copy.copy(self._load)
        twins_load.counts, twins_load._native = self._load.counts.clone(), None
        if self._load.is_due:
            next_position_S = twins.next_position_S
            twins_load.add(self._tap, self._batch, next_position_S, None, trusted.reshape(1))
        kept = self._kept if kv_slot_T is not None else None
        twins_kept = None if kept is None else _copy_of_kept(kept)
        if twins_kept is not None and kv_slot_T is not None:
            KeepRows(twins_kept, kv_slot_T[:num_rows], self._batch, None).write(expected_TX)
        expected = twin.evaluate(expected_TX, self._batch, twins, None)
        decided = self._whole.end(req_ids, revision, kv_slot_T)
        assert torch.equal(self._load.counts[:-1], twins_load.counts[:-1])
        report = _report_of(decided, req_ids, revision)
        _assert_same("requests_B", torch.from_numpy(report.requests_B), expected.requests_B)
        _assert_same("masked_BW", torch.from_numpy(report.masked_BW), expected.masked_BW)
        _assert_same("extremes_BC", torch.from_numpy(report.extremes_BC), expected.extremes_BC)
        num_events = int(expected.num_events)
        assert report.num_events == num_events
        _assert_same("events_V", torch.from_numpy(report.events_V), expected.events_V[:num_events])
        if num_events:
            values_V = expected.values_V[:num_events]
            _assert_same("values_V", torch.from_numpy(report.values_V), values_V)
        summary, again = report.summary, StepSummary.of(replace(report, summary=None))
        assert summary is not None
        assert summary[:4] == again[:4]
        assert (summary.sums_F == again.sums_F).all()
        if kept is not None and twins_kept is not None:
            for name in _KEPT:
                assert torch.equal(getattr(kept, name)[:-1], getattr(twins_kept, name)[:-1]), name
        self._judge.compare(self._state, twins)
        return decided


def _report_of(
    decided: PackedReport | StepDecisions, req_ids: tuple[str, ...], revision: str
) -> StepReport:
    if isinstance(decided, PackedReport):
        return decided.unpacked()
    summarised = decided.summarised
    assert summarised is not None
    assert summarised.requests_B is decided.requests_B
    return StepReport(
        revision,
        req_ids,
        decided.requests_B.numpy(),
        decided.masked_BW.numpy(),
        decided.extremes_BC.numpy(),
        decided.events_V.numpy(),
        decided.values_V.numpy(),
        int(decided.num_events),
        summary=summarised.summary,
    )


def _copy_of_kept(kept: KeptEvidence) -> KeptEvidence:
    copied = copy.copy(kept)
    for name in _KEPT:
        setattr(copied, name, getattr(kept, name).clone())
    return copied


@contextmanager
def judging_twice() -> Iterator[None]:
    """In here, whatever guard is made. What the kernels do not cover is judged by the twin alone."""
    others = guard.prepared.make_evaluator.__module__ != "guard.prepared"
    if others or not has_kernels(torch.device("cpu")):
        yield  # other kernels are compared in this process, or none can be
        return
    with (
        mock.patch("guard.prepared.make_evaluator", _make_evaluator),
        mock.patch("guard.runtime.make_evaluator", _make_evaluator),
        mock.patch("guard.runtime.make_start", BegunTwice),
        mock.patch("guard.runtime.make_whole_step", _make_whole_step),
    ):
        yield


def _make_evaluator(program: Program, capacity: Capacity, device: torch.device) -> Judge | None:
    if not program.rules:
        return None
    judge = make_judge(program, capacity, device)
    if isinstance(judge, NativeJudge):
        return JudgedTwice(judge, StepEvaluator(program, device))
    judged["twin"] += 1
    return judge


def _make_whole_step(judge: object, *parts: Any) -> WholeStep | None:
    return SteppedTwice(judge, *parts) if isinstance(judge, JudgedTwice) else None


def _copy_of(state: SlotState) -> SlotState:
    copied = copy.copy(state)
    for name, tensor in _tensors(state).items():
        setattr(copied, name, tensor.clone())
    return copied


def _tensors(state: SlotState) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(state).items() if isinstance(value, torch.Tensor)}


def _assert_same_decisions(decisions: StepDecisions, expected: StepDecisions) -> None:
    num_events = int(expected.num_events)
    assert int(decisions.num_events) == num_events
    assert decisions.drafts is None
    assert expected.drafts is None
    for name in ("requests_B", "masked_BW", "extremes_BC"):
        _assert_same(name, getattr(decisions, name), getattr(expected, name))
    _assert_same("events_V", decisions.events_V, expected.events_V[:num_events])
    _assert_same("values_V", decisions.values_V, expected.values_V[:num_events])


def _assert_same(name: str, ours: torch.Tensor, twins: torch.Tensor) -> None:
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(ours.dtype, 0.0)
    torch.testing.assert_close(
        ours, twins, rtol=tolerance, atol=0.0, equal_nan=True, msg=lambda said: f"{name}: {said}"
    )
