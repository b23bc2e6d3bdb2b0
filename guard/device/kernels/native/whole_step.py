"""A whole step on a CPU in two calls of machine code, where nothing in it is out of the ordinary."""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np
import torch

from guard.device.check import LivenessCheck
from guard.device.kept_evidence import KeptEvidence
from guard.device.kernels.native.interface import (
    KeptAddresses,
    SlotAddresses,
    StepAddresses,
    functions,
    step_functions,
)
from guard.device.kernels.native.judge import NativeJudge, whole
from guard.device.load import ExpertLoad
from guard.device.mask import ExpertMask
from guard.device.readback import StepDecisions, Summarised
from guard.device.rows import StepBatch
from guard.device.state import SlotState
from guard.device.tap import RoutingTap
from guard.program.step_report import PackedFlag, PackedReport

_FLAGS, _FIRINGS = 15, 32  # as in `step.cpp`


class WholeStep(Protocol):
    """`StepStart`, `KeepsSignals` and `Judge` in one, for a step without drafts or cached prefixes.

    checks: it knows `is_sound`
    """

    checks: bool

    def begin(
        self,
        slots_B: torch.Tensor,
        query_start_B1: torch.Tensor,
        position_T: torch.Tensor,
        num_rows: int,
    ) -> None:
        """As `StepStart.begin`. query_start_B1, position_T: [B+1] and [T], or longer. Where no row is
        masked, the mask's `rows_in_use` are 0."""

    def batch(self) -> StepBatch:
        """The step that was begun, for a step that is out of the ordinary after all."""

    def is_sound(self) -> bool:
        """Whether the running check, which is due, finds nothing in the step at hand."""

    def end(
        self, req_ids: tuple[str, ...], revision: str, kv_slot_T: torch.Tensor | None
    ) -> PackedReport | StepDecisions:
        """Decide. Decisions where something fired. kv_slot_T: None where nothing is kept"""


class NativeWholeStep:
    def __init__(
        self,
        judge: NativeJudge,
        tap: RoutingTap,
        mask: ExpertMask | None,
        state: SlotState,
        kept: KeptEvidence | None,
        check: LivenessCheck,
        load: ExpertLoad,
    ) -> None:
        self._judge, self._state, self._check, self._load = judge, state, check, load
        self._form = judge.form
        self._begin, self._end = step_functions()
        self._is_sound = functions().moe_guard_step_is_sound
        self._slot_addresses = SlotAddresses()
        self._kept = None if kept is None else KeptAddresses.of(kept)
        soundness = check.soundness
        self.checks = soundness is not None
        used_L, excluding_LEW = None, None
        if soundness is not None:
            used_L, excluding_LEW = soundness.used_L, soundness.excluding_LEW
        self._mask = mask if judge.decision_tables.num_actions else None
        row_bits_TW = None if self._mask is None else self._mask.row_bits_TW
        self._keep_alive = (tap, kept, used_L, excluding_LEW)
        self._places = StepAddresses(
            signals=ctypes.addressof(judge.signal_tables),
            decisions=ctypes.addressof(judge.decision_tables),
            kept=None if self._kept is None else ctypes.addressof(self._kept),
            trusted=check.trusted.data_ptr(),
            ids_TLK=tap.topk_ids_TLK.data_ptr(),
            weights_TLK=tap.topk_weights_TLK.data_ptr(),
            row_bits_TW=None if row_bits_TW is None else row_bits_TW.data_ptr(),
            num_words=0 if row_bits_TW is None else row_bits_TW.shape[1],
            used_L=None if used_L is None else used_L.data_ptr(),
            excluding_LEW=None if excluding_LEW is None else excluding_LEW.data_ptr(),
            counts_LE=load.counts.data_ptr(),
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
        self._decided = self._decided_room

    def _make_room(self, num_requests: int) -> None:
        self._room = num_requests
        self._starts_B1 = np.empty(num_requests + 1, dtype=np.int64)
        decided = np.zeros(self._form.num_bytes(num_requests) // 8, dtype=np.int64)
        self._decided_room = decided.data.cast("B")
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
            self._decided = self._decided_room[: self._form.num_bytes(self._num_requests)]
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
        mask = self._mask
        if mask is None:
            self._begin(self._address, self._num_requests, num_rows, 0)
        elif self._begin(self._address, self._num_requests, num_rows, mask.rows_in_use):
            mask.rows_in_use = num_rows
        else:
            mask.rows_in_use = 0

    def batch(self) -> StepBatch:
        assert self._slots_B is not None, "no step was begun"
        assert self._position_T is not None, "no step was begun"
        query_start_B1 = torch.from_numpy(self._starts_B1[: self._num_requests + 1])
        return StepBatch.of(self._slots_B, query_start_B1, self._position_T[: self._num_rows])

    def is_sound(self) -> bool:
        sound: bool = self._is_sound(self._address, self._num_requests, self._num_rows)
        return sound

    def end(
        self, req_ids: tuple[str, ...], revision: str, kv_slot_T: torch.Tensor | None
    ) -> PackedReport | StepDecisions:
        num_requests = self._num_requests
        if self._kv_slot_T is not kv_slot_T:
            self._kv_slot_T = None if kv_slot_T is None else whole(kv_slot_T)
            self._kv_slot_address = None if self._kv_slot_T is None else self._kv_slot_T.data_ptr()
        held = self._end(
            self._address,
            num_requests,
            self._num_rows,
            self._kv_slot_address,
            self._load.is_due,
        )
        flags = held & _FLAGS
        if self._check.is_due:
            flags |= PackedFlag.CHECKED
        packed = PackedReport(revision, req_ids, self._form, bytes(self._decided), flags)
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
    check: LivenessCheck,
    load: ExpertLoad,
) -> WholeStep | None:
    """None where something else than `NativeJudge` judges."""
    if not isinstance(judge, NativeJudge):
        return None
    return NativeWholeStep(judge, tap, mask, state, kept, check, load)
