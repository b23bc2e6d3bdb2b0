"""What `reduce_kernel` reads of a program."""

from __future__ import annotations

import numpy as np
import torch

from guard.device.kept_evidence import KeepRows, KeptColumns
from guard.device.kernels.triton_judge.reduce import reduce_kernel
from guard.device.state import host_to_device
from guard.device.tap import RoutingTap
from guard.program.program import Program

MOST_TABLE_BYTES = 64 << 20
"""Of the table of all experts' weights; a program that needs more is reduced by the twin."""

_BLOCK = 128
_WARPS = 4


class TritonReducer:
    """As `SignalReducer.reduce`, and zero in rows that are not trusted."""

    def __init__(self, program: Program, device: torch.device) -> None:
        signals, topology = program.signals, program.topology
        num_layers, max_experts = len(topology.layers), topology.max_experts
        num_places = num_layers * max_experts
        self._num_layers, self._max_experts = num_layers, max_experts
        self._num_tokens = signals.num_token_signals
        self._num_unit, self._num_spread = len(signals.unit), len(signals.spread)
        self._num_columns = signals.num_linear - self._num_tokens
        self._place_X: torch.Tensor | None = None
        self._laid_out: KeptColumns | None = None
        self.covers = (
            not signals.routing_words
            and 4 * num_places * self._num_columns <= MOST_TABLE_BYTES
            and all(
                np.abs(weights.value).max(initial=0) < 2**31
                for weights in (signals.unit, signals.spread, signals.mass, signals.layer_mass)
            )
        )
        if not self.covers:
            return
        by_layer = signals.layer_mass.by_place(num_layers).repeat(max_experts, axis=0)
        parts = [part.by_place(num_places) for part in (signals.unit, signals.spread, signals.mass)]
        table = np.concatenate([*parts, by_layer], axis=1).astype(np.int32)
        experts_L = np.array([layer.num_experts for layer in topology.layers], dtype=np.int32)
        self._table = host_to_device(table, device)
        self._experts_L = host_to_device(experts_L, device)
        self._all_trusted = torch.ones(1, dtype=torch.bool, device=device)

    def reduce(
        self,
        tap: RoutingTap,
        num_rows: int,
        trusted_T1: torch.Tensor | None = None,
        keep: KeepRows | None = None,
    ) -> torch.Tensor:
        """int64 [T, columns]

        trusted_T1: bool [T, 1], or one for all rows
        keep: where the evidence is kept, too
        """
        trusted = self._all_trusted if trusted_T1 is None else trusted_T1
        ids_TLK = tap.topk_ids_TLK
        width = self._num_tokens + self._num_columns
        evidence_TX = torch.empty((num_rows, width), dtype=torch.int64, device=ids_TLK.device)
        unused = evidence_TX
        rejected_B = None if keep is None else keep.rejected_B
        reduce_kernel[(num_rows, max(1, -(-self._num_columns // _BLOCK)))](
            ids_TLK,
            tap.topk_weights_TLK,
            self._experts_L,
            self._table,
            trusted,
            evidence_TX,
            unused if keep is None else keep.kv_slot_T,
            unused if keep is None else keep.batch.request_T,
            unused if keep is None else keep.batch.query_start_B1,
            unused if rejected_B is None else rejected_B,
            unused if keep is None else keep.kept.written_K,
            unused if keep is None else keep.kept.narrow_KX,
            unused if keep is None else keep.kept.wide_KX,
            unused if keep is None else self._places(keep.kept.columns),
            self._num_layers,
            self._max_experts,
            self._num_tokens,
            self._num_unit,
            self._num_spread,
            self._num_columns,
            0 if trusted.numel() == 1 else 1,
            0 if keep is None else len(keep.kept.written_K) - 1,
            0 if keep is None else keep.kept.narrow_KX.shape[1],
            0 if keep is None else keep.kept.wide_KX.shape[1],
            0 if keep is None else keep.kept.columns.tag,
            TOP_K=ids_TLK.shape[2],
            KEEPS=keep is not None,
            HAS_REJECTED=rejected_B is not None,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
        return evidence_TX

    def _places(self, columns: KeptColumns) -> torch.Tensor:
        """int64: of each column but tokens, the one in which it is kept."""
        if self._place_X is None or self._laid_out is not columns:
            self._laid_out = columns
            self._place_X = torch.cat([columns.narrow_place, columns.wide_place])
        return self._place_X
