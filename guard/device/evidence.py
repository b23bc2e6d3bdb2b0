"""From a step's routing to a whole number per row and signal."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding_bag

from guard.device.tap import RoutingTap
from guard.program.program import SignalTable
from guard.program.topology import Topology


class SignalReducer:
    """Σ over layers and chosen experts of a signal's weight, or of weight times gate weight.

    Each row's sum is taken on its own, in one order, in float64 over whole numbers below 2^53: the
    same bits whatever else is in the batch and however the prompt was chunked.
    """

    def __init__(self, signals: SignalTable, topology: Topology, device: torch.device) -> None:
        num_layers, num_experts = len(topology.layers), topology.max_experts
        self._nobody = num_layers * num_experts  # the row of the tables that is all zeros
        self._num_experts_L1 = torch.tensor(
            [[layer.num_experts] for layer in topology.layers], dtype=torch.int32, device=device
        )
        self._layer_offset_L1 = (
            torch.arange(num_layers, dtype=torch.int64, device=device)[:, None] * num_experts
        )

        def lookup(weights: torch.Tensor) -> torch.Tensor:
            """[signals, L, E] -> [L·E + 1, signals]."""
            table = torch.zeros((self._nobody + 1, len(weights)), dtype=torch.float64)
            table[: self._nobody] = weights.reshape(len(weights), self._nobody).T
            return table.to(device)

        self._unit_table = lookup(torch.from_numpy(signals.unit_weights))
        self._mass_table = lookup(torch.from_numpy(signals.mass_weights))

    def reduce(self, tap: RoutingTap, num_rows: int) -> torch.Tensor:
        """int64 [T, X] of the tap's first `num_rows` rows, whoever they belong to."""
        ids_TLK = tap.topk_ids_TLK[:num_rows]
        weights_TLK = tap.topk_weights_TLK[:num_rows]
        # An id that is no expert would read beyond the tables, which ends the engine on CUDA.
        is_expert_TLK = (ids_TLK >= 0) & (ids_TLK < self._num_experts_L1)
        chosen_TLK = is_expert_TLK & (weights_TLK != 0)
        index_TLK = torch.where(chosen_TLK, ids_TLK + self._layer_offset_L1, self._nobody)
        index_TI = index_TLK.reshape(num_rows, -1)
        seen_T1 = torch.ones((num_rows, 1), dtype=torch.int64, device=ids_TLK.device)
        parts = [seen_T1]  # `TOKEN_SIGNAL`
        if self._unit_table.shape[1]:
            parts.append(embedding_bag(index_TI, self._unit_table, mode="sum").to(torch.int64))
        if self._mass_table.shape[1]:
            gate_TI = weights_TLK.reshape(num_rows, -1).to(torch.float64)
            gate_TI = gate_TI.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            masses = embedding_bag(index_TI, self._mass_table, mode="sum", per_sample_weights=gate_TI)
            parts.append(masses.round().to(torch.int64))
        return torch.cat(parts, dim=1)
