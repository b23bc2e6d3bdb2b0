"""The machine code's functions, and its structures as Python fills them with addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_bool, c_int64, c_void_p
from functools import cache
from typing import Any

import torch

from guard.device.kept_evidence import KeptEvidence
from guard.device.kernels.native.build import extension, library
from guard.device.state import SlotState

SIGNAL_ARRAYS = (
    "num_experts_L",
    "addend_start_P1",
    "addends",
    "spread_start_P1",
    "spread_signal",
    "layer_start_L1",
    "layer_signal",
    "layer_value",
)
DECISION_ARRAYS = (
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
    "histogram_SHLE",
    "recent_chosen_SQC",
    "recent_position_SQ",
    "recent_epoch_SQ",
)
DISTRIBUTION_ARRAYS = (
    "window_V",
    "tokens_V",
    "in_output_V",
    "histogram_V",
    "token_signal_V",
    "epoch_V",
    "window_D",
    "statistic_D",
    "takes_max_D",
    "baseline_D",
    "shares_ZLE",
    "unchosen_ZLE",
    "half_entropy_ZL",
    "is_measured_ZL",
    "num_experts_L",
    "top_k_L",
    "token_epoch_N",
)


def _fields(addresses: tuple[str, ...], sizes: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [*((name, c_void_p) for name in addresses), *((name, c_int64) for name in sizes)]


class SignalAddresses(ctypes.Structure):
    """`SignalTables` in `judge.h`."""

    _fields_ = _fields(
        SIGNAL_ARRAYS,
        (
            "num_tokens",
            "first_spread",
            "first_mass",
            "max_experts",
            "num_columns",
            "num_layers",
            "top_k",
            "num_linear",
            "expert_bytes",
        ),
    )


class DecisionAddresses(ctypes.Structure):
    """`DecisionTables` in `judge.h`."""

    _fields_ = _fields(
        DECISION_ARRAYS,
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
    _fields_.append(("distributions", c_void_p))


class DistributionAddresses(ctypes.Structure):
    """`DistributionTables` in `judge.h`."""

    _fields_ = _fields(
        DISTRIBUTION_ARRAYS,
        (
            "num_windows",
            "num_histograms",
            "num_layers",
            "max_experts",
            "top_k",
            "expert_bytes",
            "num_kept",
            "num_epochs",
            "first_word",
        ),
    )


class _Slots(ctypes.Structure):
    """`Slots` in `judge.h`."""

    _fields_ = _fields(_SLOT_ARRAYS, ("kept_sums", "kept_hits", "num_intervals"))


class StepAddresses(ctypes.Structure):
    """`WholeStep` in `judge.h`."""

    _fields_ = (
        ("signals", c_void_p),
        ("decisions", c_void_p),
        ("slots", c_void_p),
        ("kept", c_void_p),
        ("trusted", c_void_p),
        ("ids_TLK", c_void_p),
        ("weights_TLK", c_void_p),
        ("row_bits_TW", c_void_p),
        ("num_words", c_int64),
        ("slots_B", c_void_p),
        ("query_start_B1", c_void_p),
        ("query_start_bytes", c_int64),
        ("starts_B1", c_void_p),
        ("position_T", c_void_p),
        ("decided", c_void_p),
        ("used_L", c_void_p),
        ("excluding_LEW", c_void_p),
        ("counts_LE", c_void_p),
    )


_ARGUMENTS: dict[str, tuple[list[Any], Any]] = {
    "moe_guard_sizes": ([c_int64], c_int64),
    "moe_guard_begin": (
        [c_void_p] * 4 + [c_int64] * 3 + [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p],
        c_bool,
    ),
    "moe_guard_reduce": (
        [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_bool, c_void_p],
        None,
    ),
    "moe_guard_keep": ([c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_void_p], None),
    "moe_guard_decide": ([c_void_p] * 8 + [c_int64] + [c_void_p] * 4, c_int64),
    "moe_guard_take_firings": ([c_void_p, c_void_p], None),
    "moe_guard_begin_step": ([c_void_p, c_int64, c_int64, c_int64], c_bool),
    "moe_guard_step_is_sound": ([c_void_p, c_int64, c_int64], c_bool),
    "moe_guard_end_step": ([c_void_p, c_int64, c_int64, c_void_p, c_bool], c_int64),
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
    structures = (
        SignalAddresses,
        DecisionAddresses,
        _Slots,
        KeptAddresses,
        StepAddresses,
        DistributionAddresses,
    )
    for which, structure in enumerate(structures):
        assert found.moe_guard_sizes(which) == ctypes.sizeof(structure), structure.__name__
    return found


def step_functions() -> tuple[Callable[..., bool], Callable[..., int]]:
    """`moe_guard_begin_step` and `moe_guard_end_step`, by the shortest way there is."""
    compiled = extension()
    if compiled is None:
        return functions().moe_guard_begin_step, functions().moe_guard_end_step
    return compiled.begin_step, compiled.end_step


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


class KeptAddresses(ctypes.Structure):
    """`Kept` in `judge.h`: of `KeptEvidence` under one `KeptColumns`."""

    _fields_ = (
        ("narrow_source", c_void_p),
        ("num_narrow", c_int64),
        ("wide_source", c_void_p),
        ("num_wide", c_int64),
        ("tag", c_int64),
        ("written_K", c_void_p),
        ("narrow_KX", c_void_p),
        ("narrow_bytes", c_int64),
        ("wide_KX", c_void_p),
    )

    @staticmethod
    def of(kept: KeptEvidence) -> KeptAddresses:
        columns = kept.columns
        return KeptAddresses(
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
