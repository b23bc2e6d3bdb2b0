"""The judge on a CPU: two or three calls of machine code a step, behind the interface of
`StepEvaluator`."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from guard.device.kept_evidence import KeepRows, KeptColumns
from guard.device.kernels.native.build import library
from guard.device.kernels.program_tables import decision_tables, signal_tables
from guard.device.layout import MAX_EVENTS_PER_STEP
from guard.device.readback import StepDecisions, Summarised
from guard.device.rows import StepBatch
from guard.device.state import SlotState
from guard.device.tap import RoutingTap
from guard.program.program import WORD_BITS, Program
from guard.program.step_report import EventColumn, RequestColumn, StepSummary

_SIGNAL_ARRAYS = (
    "num_experts_L",
    "unit_start_P1",
    "unit_signal",
    "unit_value",
    "spread_start_P1",
    "spread_signal",
    "mass_start_P1",
    "mass_signal",
    "mass_value",
    "layer_start_L1",
    "layer_signal",
    "layer_value",
)
_DECISION_ARRAYS = (
    "signals",
    "readings",
    "conditions",
    "real",
    "rules",
    "conditions_RC",
    "node_start_R1",
    "node_N",
    "nodes",
    "actions",
    "set_signal_N",
)
_SLOT_ARRAYS = (
    "next_position_S",
    "prompt_tokens_S",
    "unseen_S",
    "sum_SX",
    "prompt_sum_SX",
    "recent_sum_SQX",
    "hits_SR",
    "recent_hits_SHR",
    "active_SR",
    "applies_SR",
    "enforced_SR",
    "exempt_SR",
    "mask_from_SIA",
    "mask_to_SIA",
    "block_at_SR",
    "extreme_SC",
)


def _fields(addresses: tuple[str, ...], sizes: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [*((name, c_void_p) for name in addresses), *((name, c_int64) for name in sizes)]


class _SignalTables(ctypes.Structure):
    _fields_ = _fields(
        _SIGNAL_ARRAYS,
        (
            "num_tokens",
            "first_spread",
            "first_mass",
            "max_experts",
            "num_columns",
            "num_layers",
            "top_k",
        ),
    )


class _DecisionTables(ctypes.Structure):
    _fields_ = _fields(
        _DECISION_ARRAYS,
        (
            "num_evidence",
            "num_signals",
            "num_readings",
            "num_conditions",
            "num_rules",
            "most_conditions",
            "num_nodes",
            "node_width",
            "num_actions",
            "num_sets",
            "num_words",
        ),
    )


class _Slots(ctypes.Structure):
    _fields_ = _fields(_SLOT_ARRAYS, ("kept_sums", "kept_hits", "num_intervals"))


_ARGUMENTS: dict[str, tuple[list[Any], Any]] = {
    "moe_guard_sizes": ([c_int64], c_int64),
    "moe_guard_begin": (
        [c_void_p] * 4 + [c_int64] * 3 + [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p],
        None,
    ),
    "moe_guard_reduce": (
        [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_bool, c_void_p],
        None,
    ),
    "moe_guard_keep": (
        [c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p]
        + [c_void_p, c_int64] * 2
        + [c_int32, c_void_p, c_void_p, c_int64, c_void_p],
        None,
    ),
    "moe_guard_decide": ([c_void_p] * 8 + [c_int64] + [c_void_p] * 4, c_int64),
    "moe_guard_take_firings": ([c_void_p, c_void_p], None),
    "moe_guard_count_load": (
        [c_void_p] * 8 + [c_bool, c_int64, c_void_p] + [c_int64] * 3 + [c_void_p],
        None,
    ),
    "moe_guard_is_sound": (
        [c_void_p, c_void_p, c_int64, c_int64, c_int64] + [c_void_p] * 3 + [c_int64, c_void_p, c_int64],
        c_bool,
    ),
}


@cache
def functions() -> ctypes.PyDLL:
    """The library, its functions' types known."""
    found = library()
    assert found is not None, "asked for where there is no library"
    for name, (arguments, result) in _ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result
    for which, structure in enumerate((_SignalTables, _DecisionTables, _Slots)):
        assert found.moe_guard_sizes(which) == ctypes.sizeof(structure), structure.__name__
    return found


class SlotAddresses:
    """Where a `SlotState` lies: looked up again where it is another one, or has grown."""

    def __init__(self) -> None:
        self._tensor: torch.Tensor | None = None
        self._slots = _Slots()

    def of(self, state: SlotState) -> _Slots:
        if self._tensor is not state.sum_SX:
            tensors = [getattr(state, name) for name in _SLOT_ARRAYS]
            assert all(tensor.is_contiguous() for tensor in tensors), "slots lie one behind another"
            self._slots = _Slots(
                *(tensor.data_ptr() for tensor in tensors),
                state.recent_sum_SQX.shape[1],
                state.recent_hits_SHR.shape[1],
                state.mask_from_SIA.shape[1],
            )
            self._tensor = state.sum_SX
        return self._slots


class _KeepAddresses(NamedTuple):
    """Of `KeptEvidence` under one `KeptColumns`, in the order in which the function takes them."""

    narrow_source: int
    num_narrow: int
    wide_source: int
    num_wide: int
    tag: int
    written: int
    narrow: int
    narrow_bytes: int
    wide: int

    @staticmethod
    def of(keep: KeepRows) -> _KeepAddresses:
        kept, columns = keep.kept, keep.kept.columns
        return _KeepAddresses(
            columns.narrow_source.data_ptr(),
            len(columns.narrow_source),
            columns.wide_source.data_ptr(),
            len(columns.wide_source),
            columns.tag,
            kept.written_K.data_ptr(),
            kept.narrow_KX.data_ptr(),
            kept.narrow_KX.itemsize,
            kept.wide_KX.data_ptr(),
        )


class NativeJudge:
    """Decides on the same state as its twin, so that each step can be either's.

    It covers every program without conditions on distributions, where nothing is speculated.
    """

    def __init__(self, program: Program) -> None:
        assert self.covers(program, max_draft_tokens=0)
        self._functions = functions()
        topology, masks = program.topology, program.masks
        signals, decisions = signal_tables(program), decision_tables(program)
        self._keep_alive = (signals, decisions)
        self._signal_tables = _SignalTables(
            *(getattr(signals, name).ctypes.data for name in _SIGNAL_ARRAYS),
            *map(int, signals.sizes),
            program.signals.num_evidence,
            len(topology.layers),
            topology.max_top_k,
        )
        self._num_evidence = program.signals.num_evidence
        self._num_columns = RequestColumn.NUM + len(program.sets)
        self._num_words = max(1, -(-masks.num_actions // WORD_BITS))
        self._num_conditions = program.conditions.num_conditions
        self._most_conditions = program.rule_table.conditions.shape[1]
        self._decision_tables = _DecisionTables(
            *(getattr(decisions, name).ctypes.data for name in _DECISION_ARRAYS),
            self._num_evidence,
            program.signals.num_signals,
            len(decisions.readings),
            self._num_conditions,
            program.rule_table.num_rules,
            self._most_conditions,
            len(decisions.nodes),
            decisions.nodes.shape[1],
            masks.num_actions,
            len(program.sets),
            self._num_words,
        )
        self._summary = np.zeros(4 + self._num_columns, dtype=np.int64)
        self._summary_address = self._summary.ctypes.data
        self._slots = SlotAddresses()
        self._kept: tuple[KeptColumns, _KeepAddresses] | None = None
        self._all_trusted = torch.ones(1, dtype=torch.bool)
        self._no_events_V = torch.zeros((0, EventColumn.NUM), dtype=torch.int64)
        self._no_values_V = torch.zeros((0, self._most_conditions), dtype=torch.float64)
        self._no_event = torch.zeros(1, dtype=torch.int64)

    @staticmethod
    def covers(program: Program, max_draft_tokens: int) -> bool:
        return (
            not program.distributions.num_conditions
            and not program.signals.routing_words
            and not max_draft_tokens
        )

    def signals(self, tap: RoutingTap, num_rows: int) -> torch.Tensor:
        """int64 [T, columns]: the evidence of the tap's first `num_rows` rows."""
        return self.kept_signals(tap, num_rows, self._all_trusted, None)

    def kept_signals(
        self, tap: RoutingTap, num_rows: int, trusted_T1: torch.Tensor, keep: KeepRows | None
    ) -> torch.Tensor:
        """As `KeepsSignals.kept_signals`."""
        evidence_TX = torch.empty((num_rows, self._num_evidence), dtype=torch.int64)
        trusted_T1 = trusted_T1.contiguous()
        self._functions.moe_guard_reduce(
            ctypes.byref(self._signal_tables),
            tap.topk_ids_TLK.data_ptr(),
            tap.topk_weights_TLK.data_ptr(),
            num_rows,
            trusted_T1.data_ptr(),
            trusted_T1.numel() == 1,
            evidence_TX.data_ptr(),
        )
        if keep is not None:
            query_start_B1, kv_slot_T = _whole(keep.batch.query_start_B1), _whole(keep.kv_slot_T)
            rejected_B = None if keep.rejected_B is None else _whole(keep.rejected_B)
            self._functions.moe_guard_keep(
                evidence_TX.data_ptr(),
                self._num_evidence,
                query_start_B1.data_ptr(),
                None if rejected_B is None else rejected_B.data_ptr(),
                len(query_start_B1) - 1,
                kv_slot_T.data_ptr(),
                *self._addresses(keep),
            )
        return evidence_TX

    def _addresses(self, keep: KeepRows) -> _KeepAddresses:
        columns = keep.kept.columns
        if self._kept is None or self._kept[0] is not columns:  # a reload may move them
            self._kept = (columns, _KeepAddresses.of(keep))
        return self._kept[1]

    def evaluate(
        self,
        evidence_TX: torch.Tensor,
        batch: StepBatch,
        state: SlotState,
        rejected_B: torch.Tensor | None = None,
        *,
        computed_B: torch.Tensor | None = None,
    ) -> StepDecisions:
        """As `StepEvaluator.evaluate`."""
        num_requests = len(batch.slots_B)
        evidence_TX, slots_B = _whole(evidence_TX), _whole(batch.slots_B)
        query_start_B1, position_T = _whole(batch.query_start_B1), _whole(batch.position_T)
        rejected_B = None if rejected_B is None else _whole(rejected_B)
        computed_B = None if computed_B is None else _whole(computed_B)
        requests_B = torch.empty((num_requests, self._num_columns), dtype=torch.int64)
        masked_BW = torch.empty((num_requests, self._num_words), dtype=torch.int64)
        extremes_BC = torch.empty((num_requests, self._num_conditions), dtype=torch.float32)
        num_events = self._functions.moe_guard_decide(
            ctypes.byref(self._decision_tables),
            ctypes.byref(self._slots.of(state)),
            evidence_TX.data_ptr(),
            slots_B.data_ptr(),
            query_start_B1.data_ptr(),
            position_T.data_ptr(),
            None if rejected_B is None else rejected_B.data_ptr(),
            None if computed_B is None else computed_B.data_ptr(),
            num_requests,
            requests_B.data_ptr(),
            masked_BW.data_ptr(),
            extremes_BC.data_ptr(),
            self._summary_address,
        )
        firings = (self._no_events_V, self._no_values_V, self._no_event)
        if num_events:
            firings = self._firings(num_events)
        blocks, begins_masks, masks, is_all_seen = map(bool, self._summary[:4].tolist())
        sums_F = self._summary[4:].copy()
        summary = StepSummary(blocks, begins_masks, masks, is_all_seen, sums_F)
        return StepDecisions(
            requests_B,
            masked_BW,
            extremes_BC,
            *firings,
            summarised=Summarised(requests_B, summary),
        )

    def _firings(self, num_events: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        events_V = np.empty((num_events, EventColumn.NUM), dtype=np.int64)
        values_V = np.empty((num_events, self._most_conditions), dtype=np.float64)
        self._functions.moe_guard_take_firings(events_V.ctypes.data, values_V.ctypes.data)
        return (
            torch.from_numpy(events_V),
            torch.from_numpy(values_V[:MAX_EVENTS_PER_STEP]),
            torch.tensor([num_events]),
        )


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """int64, one number behind the other."""
    if tensor.dtype != torch.int64:
        tensor = tensor.to(torch.int64)
    return tensor if tensor.is_contiguous() else tensor.contiguous()
