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
from unittest import mock

import torch

import guard.prepared
from guard.device.evaluate import StepEvaluator
from guard.device.kept_evidence import KeepRows
from guard.device.kernels.backends import Judge, make_judge
from guard.device.kernels.choice import has_kernels
from guard.device.kernels.native.judge import NativeJudge
from guard.device.kernels.native.start import NativeStart
from guard.device.layout import NULL_SLOT, Capacity
from guard.device.mask import ExpertMask
from guard.device.readback import StepDecisions
from guard.device.rows import StepBatch
from guard.device.start import Started, TorchStart
from guard.device.state import SlotState
from guard.device.tap import RoutingTap
from guard.program.program import Program

judged = Counter[str]()
"""Steps by who could decide them: `both`, or the `twin` alone."""


_KEPT = ("written_K", "narrow_KX", "wide_KX")


class JudgedTwice:
    def __init__(self, kernels: NativeJudge, twin: StepEvaluator) -> None:
        self._kernels, self._twin = kernels, twin
        self._is_twins_turn = itertools.cycle([False, True])

    def signals(self, tap: RoutingTap, num_rows: int) -> torch.Tensor:
        evidence_TX = self._kernels.signals(tap, num_rows)
        assert torch.equal(evidence_TX, self._twin.signals(tap, num_rows))
        return evidence_TX

    def kept_signals(
        self, tap: RoutingTap, num_rows: int, trusted_T1: torch.Tensor, keep: KeepRows | None
    ) -> torch.Tensor:
        expected_TX = self._twin.signals(tap, num_rows) * trusted_T1
        twins = None if keep is None else copy.copy(keep.kept)
        if keep is not None and twins is not None:
            for name in _KEPT:
                setattr(twins, name, getattr(keep.kept, name).clone())
            keep._replace(kept=twins).write(expected_TX)
        evidence_TX = self._kernels.kept_signals(tap, num_rows, trusted_T1, keep)
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
        expected = self._twin.evaluate(*rows, twins, rejected_B, computed_B=computed_B)
        decisions = self._kernels.evaluate(*rows, state, rejected_B, computed_B=computed_B)
        _assert_same_decisions(decisions, expected)
        takes_twins = next(self._is_twins_turn)
        for name, tensor in _tensors(state).items():
            _assert_same(
                f"state.{name}", tensor[NULL_SLOT + 1 :], getattr(twins, name)[NULL_SLOT + 1 :]
            )
            if takes_twins:
                tensor.copy_(getattr(twins, name))
        return decisions


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
