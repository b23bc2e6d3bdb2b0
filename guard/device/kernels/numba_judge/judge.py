"""The judge on a CPU: two calls of machine code a step, behind the interface of `StepEvaluator`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from guard.device.kept_evidence import KeepRows
from guard.device.kernels.numba_judge.compiled import compiled
from guard.device.kernels.numba_judge.decide import decide
from guard.device.kernels.numba_judge.keep import keep
from guard.device.kernels.numba_judge.reduce import reduce
from guard.device.kernels.program_tables import decision_tables, signal_tables
from guard.device.layout import MAX_EVENTS_PER_STEP, NULL_SLOT, Capacity
from guard.device.readback import StepDecisions
from guard.device.rows import StepBatch
from guard.device.state import SlotState
from guard.device.tap import RoutingTap
from guard.program.program import WORD_BITS, Program
from guard.program.step_report import RequestColumn

_STATE = (
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
"""Of `SlotState`, in the order in which `decide` takes them."""

_NOTHING_B = np.zeros(0, dtype=np.int64)
_ALL_TRUSTED = np.ones(1, dtype=np.bool_)


class NumbaJudge:
    """Decides on the same state as its twin, so that each step can be either's.

    It covers every program without conditions on distributions, where nothing is speculated.
    """

    def __init__(self, program: Program) -> None:
        assert self.covers(program, max_draft_tokens=0)
        self._signal_tables = signal_tables(program)
        self._tables = decision_tables(program)
        self._num_evidence = program.signals.num_evidence
        self._num_columns = RequestColumn.NUM + len(program.sets)
        self._num_words = max(1, -(-program.masks.num_actions // WORD_BITS))
        self._num_conditions = program.conditions.num_conditions
        self._state_arrays: tuple[Any, ...] = ()
        self._arrays_of: torch.Tensor | None = None
        self._compile(program)

    @staticmethod
    def covers(program: Program, max_draft_tokens: int) -> bool:
        return (
            not program.distributions.num_conditions
            and not program.signals.routing_words
            and not max_draft_tokens
        )

    def _compile(self, program: Program) -> None:
        """The types are the same in all programs, so this compiles once in a process."""
        device, one = torch.device("cpu"), Capacity(max_rows=1, max_slots=1)
        state, tap = SlotState(program, one, device), RoutingTap(program.topology, one, device)
        evidence_TX = np.zeros((1, self._num_evidence), dtype=np.int64)
        self._reduce = compiled(reduce, self._reduce_arguments(tap, evidence_TX, _ALL_TRUSTED))
        self._keep = {
            dtype: compiled(
                keep,
                (
                    evidence_TX,
                    *(np.zeros(1, dtype=np.int64) for _ in range(5)),
                    1,
                    np.zeros(1, dtype=np.int32),
                    np.zeros((1, 1), dtype=dtype),
                    np.zeros((1, 1), dtype=np.int64),
                ),
            )
            for dtype in (np.dtype(np.int16), np.dtype(np.int32), np.dtype(np.int64))
        }
        nobody_B = np.full(1, NULL_SLOT)
        arguments = self._decide_arguments(
            evidence_TX, (nobody_B, np.arange(2), nobody_B, _NOTHING_B, _NOTHING_B), state, 1
        )
        self._decide = compiled(decide, arguments)
        self._arrays_of = None

    def signals(self, tap: RoutingTap, num_rows: int) -> torch.Tensor:
        """int64 [T, columns]: the evidence of the tap's first `num_rows` rows."""
        return torch.from_numpy(self._evidence(tap, num_rows, _ALL_TRUSTED))

    def kept_signals(
        self, tap: RoutingTap, num_rows: int, trusted_T1: torch.Tensor, keep: KeepRows | None
    ) -> torch.Tensor:
        """As `KeepsSignals.kept_signals`."""
        evidence_TX = self._evidence(tap, num_rows, trusted_T1.reshape(-1).numpy())
        if keep is not None:
            kept, columns = keep.kept, keep.kept.columns
            narrow_KX = kept.narrow_KX.numpy()
            self._keep[narrow_KX.dtype](
                evidence_TX,
                _array(keep.batch.query_start_B1),
                _NOTHING_B if keep.rejected_B is None else _array(keep.rejected_B),
                _array(keep.kv_slot_T),
                columns.narrow_source.numpy(),
                columns.wide_source.numpy(),
                columns.tag,
                kept.written_K.numpy(),
                narrow_KX,
                kept.wide_KX.numpy(),
            )
        return torch.from_numpy(evidence_TX)

    def _evidence(self, tap: RoutingTap, num_rows: int, trusted_T: np.ndarray) -> np.ndarray:
        evidence_TX = np.empty((num_rows, self._num_evidence), dtype=np.int64)
        self._reduce(*self._reduce_arguments(tap, evidence_TX, trusted_T))
        return evidence_TX

    def _reduce_arguments(
        self, tap: RoutingTap, evidence_TX: np.ndarray, trusted_T: np.ndarray
    ) -> tuple[Any, ...]:
        return (
            tap.topk_ids_TLK.numpy(),
            tap.topk_weights_TLK.numpy(),
            *self._signal_tables,
            trusted_T,
            evidence_TX,
        )

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
        rows = (
            _array(batch.slots_B),
            _array(batch.query_start_B1),
            _array(batch.position_T),
            _NOTHING_B if rejected_B is None else _array(rejected_B),
            _NOTHING_B if computed_B is None else _array(computed_B),
        )
        arguments = self._decide_arguments(_array(evidence_TX), rows, state, len(batch.slots_B))
        events_V, values_V = self._decide(*arguments)
        requests_B, masked_BW, extremes_BC = map(torch.from_numpy, arguments[-3:])
        return StepDecisions(
            requests_B,
            masked_BW,
            extremes_BC,
            torch.from_numpy(events_V),
            torch.from_numpy(values_V[:MAX_EVENTS_PER_STEP]),
            torch.tensor([len(events_V)]),
        )

    def _decide_arguments(
        self, evidence_TX: np.ndarray, rows: tuple[Any, ...], state: SlotState, num_requests: int
    ) -> tuple[Any, ...]:
        if self._arrays_of is not state.sum_SX:  # another program's, or slots were added
            self._arrays_of = state.sum_SX
            self._state_arrays = tuple(getattr(state, name).numpy() for name in _STATE)
        return (
            evidence_TX,
            *rows,
            *self._tables,
            *self._state_arrays,
            np.empty((num_requests, self._num_columns), dtype=np.int64),
            np.empty((num_requests, self._num_words), dtype=np.int64),
            np.empty((num_requests, self._num_conditions), dtype=np.float32),
        )


def _array(tensor: torch.Tensor) -> np.ndarray:
    """int64, one number behind the other."""
    if tensor.dtype != torch.int64:
        tensor = tensor.to(torch.int64)
    return tensor.numpy() if tensor.is_contiguous() else tensor.contiguous().numpy()
