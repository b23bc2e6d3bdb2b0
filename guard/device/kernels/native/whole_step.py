"""A whole step on a CPU in two calls of machine code, where nothing in it is out of the ordinary."""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np
import torch

from guard.device.kept_evidence import KeptEvidence
from guard.device.kernels.native.interface import (
    KeptAddresses,
    SlotAddresses,
    StepAddresses,
    functions,
)
from guard.device.kernels.native.judge import NativeJudge, whole
from guard.device.mask import ExpertMask
from guard.device.readback import StepDecisions, Summarised
from guard.device.rows import StepBatch
from guard.device.state import SlotState
from guard.device.tap import RoutingTap
from guard.program.step_report import PackedReport

_FLAGS, _FIRINGS = 15, 16  # as in `step.cpp`


class WholeStep(Protocol):
    """`StepStart`, `KeepsSignals` and `Judge` in one, for a step without drafts, checks or cached
    prefixes."""

    def begin(
        self,
        slots_B: torch.Tensor,
        query_start_B1: torch.Tensor,
        position_T: torch.Tensor,
        num_rows: int,
    ) -> None:
        """As `StepStart.begin`. query_start_B1, position_T: [B+1] and [T], or longer"""

    def batch(self) -> StepBatch:
        """The step that was begun, for a step that is out of the ordinary after all."""

    def end(
        self, req_ids: tuple[str, ...], revision: str, kv_slot_T: torch.Tensor | None
    ) -> PackedReport | StepDecisions:
        """Decide. Decisions where something fired. kv_slot_T: None where nothing is kept"""


class NativeWholeStep:
    """
    trusted: bool, whether rows are, see `LivenessCheck.check`; it is read in each step
    """

    def __init__(
        self,
        judge: NativeJudge,
        tap: RoutingTap,
        mask: ExpertMask | None,
        state: SlotState,
        kept: KeptEvidence | None,
        trusted: torch.Tensor,
    ) -> None:
        self._judge, self._mask, self._state = judge, mask, state
        self._form = judge.form
        self._begin = functions().moe_guard_begin_step
        self._end = functions().moe_guard_end_step
        self._slot_addresses = SlotAddresses()
        self._kept = None if kept is None else KeptAddresses.of(kept)
        self._keep_alive = (tap, kept, trusted)
        masks = mask is not None and judge.decision_tables.num_actions > 0
        row_bits_TW = mask.row_bits_TW if masks and mask is not None else None
        self._masks = row_bits_TW is not None
        self._places = StepAddresses(
            signals=ctypes.addressof(judge.signal_tables),
            decisions=ctypes.addressof(judge.decision_tables),
            kept=None if self._kept is None else ctypes.addressof(self._kept),
            trusted=trusted.data_ptr(),
            ids_TLK=tap.topk_ids_TLK.data_ptr(),
            weights_TLK=tap.topk_weights_TLK.data_ptr(),
            row_bits_TW=None if row_bits_TW is None else row_bits_TW.data_ptr(),
            num_words=0 if row_bits_TW is None else row_bits_TW.shape[1],
        )
        self._address = ctypes.addressof(self._places)
        self._sum_SX: torch.Tensor | None = None
        self._slots_B: torch.Tensor | None = None
        self._query_start_B1: torch.Tensor | None = None
        self._position_T: torch.Tensor | None = None
        self._kv_slot_T: torch.Tensor | None = None
        self._kv_slot_address: int | None = None
        self._num_requests = self._num_rows = 0
        self._make_room(1)

    def _make_room(self, num_requests: int) -> None:
        self._room = num_requests
        self._starts_B1 = np.empty(num_requests + 1, dtype=np.int64)
        decided = np.zeros(self._form.num_bytes(num_requests) // 8, dtype=np.int64)
        self._decided = decided.data.cast("B")
        self._places.starts_B1 = self._starts_B1.ctypes.data
        self._places.decided = decided.ctypes.data

    def begin(
        self,
        slots_B: torch.Tensor,
        query_start_B1: torch.Tensor,
        position_T: torch.Tensor,
        num_rows: int,
    ) -> None:
        places = self._places
        if self._sum_SX is not self._state.sum_SX:  # there are more slots now
            places.slots = ctypes.addressof(self._slot_addresses.of(self._state))
            self._sum_SX = self._state.sum_SX
        if self._slots_B is not slots_B:
            self._slots_B = slots_B
            self._num_requests = len(slots_B)
            places.slots_B = slots_B.data_ptr()
            if self._num_requests > self._room:
                self._make_room(2 * self._num_requests)
        if self._query_start_B1 is not query_start_B1:
            is_narrow = query_start_B1.dtype == torch.int32
            # Itself as a rule, or else a copy, which is made anew in each step.
            self._query_start_B1 = query_start_B1.contiguous() if is_narrow else whole(query_start_B1)
            places.query_start_B1 = self._query_start_B1.data_ptr()
            places.query_start_bytes = self._query_start_B1.itemsize
        if self._position_T is not position_T:
            self._position_T = whole(position_T)
            places.position_T = self._position_T.data_ptr()
        self._num_rows = num_rows
        num_rows_before = self._mask.take_rows(num_rows) if self._masks and self._mask else 0
        self._begin(self._address, self._num_requests, num_rows, num_rows_before)

    def batch(self) -> StepBatch:
        assert self._slots_B is not None, "no step was begun"
        assert self._position_T is not None, "no step was begun"
        query_start_B1 = torch.from_numpy(self._starts_B1[: self._num_requests + 1])
        return StepBatch.of(self._slots_B, query_start_B1, self._position_T[: self._num_rows])

    def end(
        self, req_ids: tuple[str, ...], revision: str, kv_slot_T: torch.Tensor | None
    ) -> PackedReport | StepDecisions:
        num_requests = self._num_requests
        if self._kv_slot_T is not kv_slot_T:
            self._kv_slot_T = None if kv_slot_T is None else whole(kv_slot_T)
            self._kv_slot_address = None if self._kv_slot_T is None else self._kv_slot_T.data_ptr()
        held = self._end(self._address, num_requests, self._num_rows, self._kv_slot_address)
        data = bytes(self._decided[: self._form.num_bytes(num_requests)])
        packed = PackedReport(revision, req_ids, self._form, data, held & _FLAGS)
        if held < _FIRINGS:
            return packed
        report = packed.unpacked()
        assert report.summary is not None, "it has one"
        requests_B = torch.from_numpy(report.requests_B)
        return StepDecisions(
            requests_B,
            torch.from_numpy(report.masked_BW),
            torch.from_numpy(report.extremes_BC),
            *self._judge.firings(held // _FIRINGS),
            summarised=Summarised(requests_B, report.summary),
        )


def make_whole_step(
    judge: object,
    tap: RoutingTap,
    mask: ExpertMask | None,
    state: SlotState,
    kept: KeptEvidence | None,
    trusted: torch.Tensor,
) -> WholeStep | None:
    """None where something else than `NativeJudge` judges."""
    if not isinstance(judge, NativeJudge):
        return None
    return NativeWholeStep(judge, tap, mask, state, kept, trusted)
