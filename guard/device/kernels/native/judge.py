"""The judge on a CPU: two or three calls of machine code a step, behind the interface of
`StepEvaluator`."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from guard.device.distributions import baseline_terms
from guard.device.kept_evidence import KeepRows, KeptColumns
from guard.device.kernels.native.interface import (
    DECISION_ARRAYS,
    DISTRIBUTION_ARRAYS,
    SIGNAL_ARRAYS,
    DecisionAddresses,
    DistributionAddresses,
    KeptAddresses,
    SignalAddresses,
    SlotAddresses,
    functions,
)
from guard.device.kernels.program_tables import decision_tables, signal_tables
from guard.device.layout import MAX_EVENTS_PER_STEP
from guard.device.readback import StepDecisions, Summarised
from guard.device.rows import StepBatch
from guard.device.state import SlotState
from guard.device.tap import RoutingTap
from guard.program.program import WORD_BITS, Program
from guard.program.step_report import EventColumn, ReportForm, RequestColumn, StepSummary

_ADDEND = np.dtype(
    [("unit", np.int32), ("mass", np.int32), ("unit_value", np.int64), ("mass_value", np.float64)]
)
"""`Addend` in `judge.h`."""


class NativeJudge:
    """Decides on the same state as its twin, so that each step can be either's. It knows no drafts."""

    def __init__(self, program: Program) -> None:
        self._functions = functions()
        topology, masks = program.topology, program.masks
        signals, decisions = _signal_arrays(program), decision_tables(program)
        self._keep_alive = (signals, decisions)
        self.signal_tables = SignalAddresses(
            *(signals[name].ctypes.data for name in SIGNAL_ARRAYS),
            *map(int, signals["sizes"]),
            program.signals.num_evidence,
            len(topology.layers),
            topology.max_top_k,
            program.signals.num_linear,
            program.distributions.expert_type.itemsize if program.signals.routing_words else 0,
        )
        self._distributions = _Distributions(program) if program.distributions.num_conditions else None
        self._num_evidence = program.signals.num_evidence
        self.form = ReportForm(
            RequestColumn.NUM + len(program.sets),
            max(1, -(-masks.num_actions // WORD_BITS)),
            program.conditions.num_conditions,
        )
        self._most_conditions = program.rule_table.conditions.shape[1]
        self.decision_tables = DecisionAddresses(
            *(getattr(decisions, name).ctypes.data for name in DECISION_ARRAYS),
            self._num_evidence,
            program.signals.num_signals,
            len(decisions.readings),
            self.form.num_conditions,
            program.rule_table.num_rules,
            self._most_conditions,
            len(decisions.nodes),
            decisions.nodes.shape[1],
            masks.num_actions,
            len(program.sets),
            self.form.num_words,
            None if self._distributions is None else self._distributions.address,
        )
        self._summary = np.zeros(4 + self.form.num_columns, dtype=np.int64)
        self._summary_address = self._summary.ctypes.data
        self._slots = SlotAddresses()
        self._kept: tuple[KeptColumns, KeptAddresses] | None = None
        self._all_trusted = torch.ones(1, dtype=torch.bool)
        self._no_events_V = torch.zeros((0, EventColumn.NUM), dtype=torch.int64)
        self._no_values_V = torch.zeros((0, self._most_conditions), dtype=torch.float64)
        self._no_event = torch.zeros(1, dtype=torch.int64)

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
            ctypes.byref(self.signal_tables),
            tap.topk_ids_TLK.data_ptr(),
            tap.topk_weights_TLK.data_ptr(),
            num_rows,
            trusted_T1.data_ptr(),
            trusted_T1.numel() == 1,
            evidence_TX.data_ptr(),
        )
        if keep is not None:
            query_start_B1, kv_slot_T = whole(keep.batch.query_start_B1), whole(keep.kv_slot_T)
            rejected_B = None if keep.rejected_B is None else whole(keep.rejected_B)
            self._functions.moe_guard_keep(
                evidence_TX.data_ptr(),
                self._num_evidence,
                query_start_B1.data_ptr(),
                None if rejected_B is None else rejected_B.data_ptr(),
                len(query_start_B1) - 1,
                kv_slot_T.data_ptr(),
                ctypes.byref(self._addresses(keep)),
            )
        return evidence_TX

    def _addresses(self, keep: KeepRows) -> KeptAddresses:
        columns = keep.kept.columns
        if self._kept is None or self._kept[0] is not columns:  # a reload may move them
            self._kept = (columns, KeptAddresses.of(keep.kept))
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
        evidence_TX, slots_B = whole(evidence_TX), whole(batch.slots_B)
        query_start_B1, position_T = whole(batch.query_start_B1), whole(batch.position_T)
        rejected_B = None if rejected_B is None else whole(rejected_B)
        computed_B = None if computed_B is None else whole(computed_B)
        requests_B = torch.empty((num_requests, self.form.num_columns), dtype=torch.int64)
        masked_BW = torch.empty((num_requests, self.form.num_words), dtype=torch.int64)
        extremes_BC = torch.empty((num_requests, self.form.num_conditions), dtype=torch.float32)
        num_events = self._functions.moe_guard_decide(
            ctypes.byref(self.decision_tables),
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
        firings = self.firings(num_events)
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

    def firings(self, num_events: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`events_V`, `values_V` and `num_events` of the last step that this thread decided."""
        if not num_events:
            return self._no_events_V, self._no_values_V, self._no_event
        events_V = np.empty((num_events, EventColumn.NUM), dtype=np.int64)
        values_V = np.empty((num_events, self._most_conditions), dtype=np.float64)
        self._functions.moe_guard_take_firings(events_V.ctypes.data, values_V.ctypes.data)
        return (
            torch.from_numpy(events_V),
            torch.from_numpy(values_V[:MAX_EVENTS_PER_STEP]),
            torch.tensor([num_events]),
        )


def _signal_arrays(program: Program) -> dict[str, np.ndarray]:
    """`SignalTables` by the names that `judge.h` has, units and masses in pairs."""
    tables = signal_tables(program)
    num_units, num_masses = len(program.signals.unit), len(program.signals.mass)
    nobodys_mass = num_masses + len(program.signals.layer_mass)
    units_P, masses_P = np.diff(tables.unit_start_P1), np.diff(tables.mass_start_P1)
    start_P1 = np.concatenate([[0], np.cumsum(np.maximum(units_P, masses_P))])
    addends = np.zeros(start_P1[-1], dtype=_ADDEND)
    addends["unit"], addends["mass"] = num_units, nobodys_mass
    at_unit = np.arange(len(tables.unit_signal)) + np.repeat(
        start_P1[:-1] - tables.unit_start_P1[:-1], units_P
    )
    at_mass = np.arange(len(tables.mass_signal)) + np.repeat(
        start_P1[:-1] - tables.mass_start_P1[:-1], masses_P
    )
    addends["unit"][at_unit], addends["unit_value"][at_unit] = tables.unit_signal, tables.unit_value
    addends["mass"][at_mass], addends["mass_value"][at_mass] = tables.mass_signal, tables.mass_value
    return {
        **tables._asdict(),
        "addend_start_P1": start_P1.astype(np.int32),
        "addends": addends,
    }


class _Distributions:
    """`DistributionTables` in `judge.h`, and the arrays that it points to."""

    def __init__(self, program: Program) -> None:
        table, topology, signals = program.distributions, program.topology, program.signals
        terms = baseline_terms(table.shares)
        arrays = {
            "window_V": table.window,
            "tokens_V": table.tokens,
            "in_output_V": table.in_output,
            "histogram_V": table.histogram,
            "token_signal_V": table.token_signal,
            "epoch_V": np.array(table.epochs),
            "window_D": table.condition_window,
            "statistic_D": table.statistic,
            "takes_max_D": table.takes_max,
            "baseline_D": table.baseline,
            "unchosen_ZLE": terms.unchosen_ZLE,
            "half_entropy_ZL": terms.half_entropy_ZL,
            "is_measured_ZL": terms.is_measured_ZL,
            "num_experts_L": np.array([layer.num_experts for layer in topology.layers]),
            "top_k_L": np.array([layer.top_k for layer in topology.layers]),
            "token_epoch_N": np.array(signals.token_epochs),
        }
        self._arrays = {
            name: np.ascontiguousarray(array, dtype=np.int64) for name, array in arrays.items()
        }
        self._arrays["shares_ZLE"] = np.ascontiguousarray(table.shares, dtype=np.float64)
        self._structure = DistributionAddresses(
            *(self._arrays[name].ctypes.data for name in DISTRIBUTION_ARRAYS),
            len(table.window),
            table.num_histograms,
            len(topology.layers),
            topology.max_experts,
            topology.max_top_k,
            table.expert_type.itemsize,
            table.recent_positions,
            len(signals.token_epochs),
            signals.num_linear,
        )
        self.address = ctypes.addressof(self._structure)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """int64, one number behind the other."""
    if tensor.dtype != torch.int64:
        tensor = tensor.to(torch.int64)
    return tensor if tensor.is_contiguous() else tensor.contiguous()
