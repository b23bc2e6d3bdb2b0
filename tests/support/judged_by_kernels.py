"""A pytest plugin: guards judge by the Triton kernels, under its interpreter, and by their twin beside.

Every step is decided twice from the same state, and both must say and leave the same, bit for bit but
for logarithms and exponentials. Run in a process of its own, with `TRITON_INTERPRET=1` from its start:
what Triton's own functions are is settled when it is imported.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from typing import Final

import pytest
import torch

import guard.device.state
import guard.prepared
import guard.runtime
from guard.device.kept_evidence import KeepRows, KeptEvidence
from guard.device.kernels.triton_judge import judge, reducer
from guard.device.kernels.triton_judge.start import TritonStart
from guard.device.layout import Capacity
from guard.device.mask import ExpertMask
from guard.device.packed import PinnedPool
from guard.device.readback import StepDecisions, copy_packed
from guard.device.rows import StepBatch
from guard.device.start import Started, TorchStart
from guard.device.state import SlotState
from guard.device.tap import RoutingTap
from guard.program.program import Program

judged = Counter[str]()
"""Steps by who decided them: `kernel` or `twin`."""


_POOL: Final = PinnedPool(pinned=False)


class CheckedJudge(judge.TritonJudge):
    """Goes on from what the kernels left in one step, and from what their twin left in the next."""

    def __init__(self, program: Program, device: torch.device, max_draft_tokens: int = 0) -> None:
        super().__init__(program, device, max_draft_tokens)
        self._is_twins_turn = itertools.cycle([False, True])

    def signals(self, tap: RoutingTap, num_rows: int) -> torch.Tensor:
        evidence_TX = super().signals(tap, num_rows)
        assert torch.equal(evidence_TX, self.twin.signals(tap, num_rows))
        return evidence_TX

    def kept_signals(
        self, tap: RoutingTap, num_rows: int, trusted_T1: torch.Tensor, keep: KeepRows | None
    ) -> torch.Tensor:
        twins = None if keep is None else keep._replace(kept=_copy_of_kept(keep.kept))
        evidence_TX = super().kept_signals(tap, num_rows, trusted_T1, keep)
        expected_TX = self.twin.signals(tap, num_rows) * trusted_T1
        assert torch.equal(evidence_TX, expected_TX)
        if keep is not None and twins is not None:
            twins.write(expected_TX)
            all_K = torch.arange(len(keep.kept.written_K) - 1)  # the last one is anybody's
            assert torch.equal(keep.kept.read(all_K), twins.kept.read(all_K))
            judged["kept"] += int((keep.kv_slot_T >= 0).sum())
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
        args = (evidence_TX, batch)
        if not self.covers(batch):
            judged["twin"] += 1
            return super().evaluate(*args, state, rejected_B, computed_B=computed_B)
        judged["kernel"] += 1
        twins = _copy_of(state)
        expected = self.twin.evaluate(*args, twins, rejected_B, computed_B=computed_B)
        decisions = super().evaluate(*args, state, rejected_B, computed_B=computed_B)
        _assert_equal(decisions, expected)
        assert decisions.packed is not None
        for _ in range(2):  # the second time into the same buffer
            copied, buffer = copy_packed(decisions, decisions.packed, _POOL)
            _assert_equal(copied, expected)
            _POOL.give_back(buffer)
        for name, tensor in _tensors(state).items():
            _assert_close(f"state.{name}", tensor[1:], getattr(twins, name)[1:])
            if next(self._is_twins_turn):
                tensor.copy_(getattr(twins, name))
        return decisions


class CheckedStart(TritonStart):
    """Compares what a step begins with with what it would begin with on its twin."""

    def __init__(self, tap: RoutingTap, mask: ExpertMask | None, state: SlotState) -> None:
        super().__init__(tap, mask)
        self._buffers = [tap.topk_ids_TLK] if mask is None else [tap.topk_ids_TLK, mask.row_bits_TW]
        self._twin = TorchStart(tap, mask)
        self._own_mask = mask

    def begin(
        self,
        slots_B: torch.Tensor,
        query_start_B1: torch.Tensor,
        position_T: torch.Tensor,
        state: SlotState,
    ) -> Started:
        before = [buffer.clone() for buffer in self._buffers]
        rows_before = 0 if self._own_mask is None else self._own_mask.take_rows(0)
        if self._own_mask is not None:
            self._own_mask.take_rows(rows_before)
        expected = self._twin.begin(slots_B, query_start_B1, position_T, state).batch
        left = [buffer.clone() for buffer in self._buffers]
        for buffer, stood in zip(self._buffers, before, strict=True):
            buffer.copy_(stood)
        if self._own_mask is not None:
            self._own_mask.take_rows(rows_before)
        started = super().begin(slots_B, query_start_B1, position_T, state)
        for name, ours, twins in zip(expected._fields, started.batch, expected, strict=True):
            assert torch.equal(ours, twins), name
        for buffer, twins in zip(self._buffers, left, strict=True):
            assert torch.equal(buffer, twins)
        judged["begun"] += 1
        return started


def _copy_of_kept(kept: KeptEvidence) -> KeptEvidence:
    copied = copy.copy(kept)
    for name in ("written_K", "narrow_KX", "wide_KX"):
        setattr(copied, name, getattr(kept, name).clone())
    return copied


def _copy_of(state: SlotState) -> SlotState:
    copied = copy.copy(state)
    for name, tensor in _tensors(state).items():
        setattr(copied, name, tensor.clone())
    return copied


def _tensors(state: SlotState) -> dict[str, torch.Tensor]:
    return {n: value for n, value in vars(state).items() if isinstance(value, torch.Tensor)}


def _assert_equal(decisions: StepDecisions, expected: StepDecisions) -> None:
    num_events = int(expected.num_events)
    assert int(decisions.num_events) == num_events
    assert decisions.drafts is None
    for name in ("requests_B", "masked_BW", "extremes_BC", "events_V", "values_V"):
        ours, twins = getattr(decisions, name), getattr(expected, name)
        if name in ("events_V", "values_V"):
            used = min(num_events, len(ours))
            ours, twins = ours[:used], twins[:used]
        _assert_close(name, ours, twins)


def _assert_close(name: str, ours: torch.Tensor, twins: torch.Tensor) -> None:
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(ours.dtype, 0.0)
    torch.testing.assert_close(
        ours, twins, rtol=tolerance, atol=0.0, equal_nan=True, msg=lambda said: f"{name}: {said}"
    )


def _make_evaluator(program: Program, capacity: Capacity, device: torch.device) -> CheckedJudge | None:
    if not program.rules:
        return None
    return CheckedJudge(program, device, capacity.max_draft_tokens)


def _apply_staged_writes(state: SlotState) -> None:
    """Both ways, with the same outcome."""
    twins = _copy_of(state)
    twins.staged_writes = dict(state.staged_writes)
    _stock_writes(twins)
    state.admits_by_kernel = not len(state.histogram_SHLE[0]) and not len(state.recent_position_SQ[0])
    judged["admitted"] += len(state.staged_writes) if state.admits_by_kernel else 0
    _stock_writes(state)
    for name, tensor in _tensors(state).items():
        _assert_close(f"state.{name}", tensor, getattr(twins, name))


_stock_writes = SlotState.apply_staged_writes


def pytest_configure(config: pytest.Config) -> None:
    vars(guard.device.state)["SlotState"].apply_staged_writes = _apply_staged_writes
    for module in (guard.runtime, guard.prepared):
        vars(module)["make_evaluator"] = _make_evaluator
    vars(guard.runtime)["make_start"] = CheckedStart
    for kernels in (judge, reducer):  # so that even small programs are several blocks
        vars(kernels)["_BLOCK"] = 4
