"""From a step's routing to a whole number per row and signal."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from guard.device.distributions import expert_dtype, pack_experts
from guard.device.mask import pack_bits
from guard.device.tap import RoutingTap
from guard.program.distribution_table import DistributionTable
from guard.program.program import WORD_BITS, SignalTable
from guard.program.topology import Topology


class SignalReducer:
    """Σ over layers and chosen experts of a signal's weight, or of weight times gate weight; and over
    layers, of whether an expert of a set is among the chosen.

    Each row's sum is taken on its own, in one order, in float64 over whole numbers below 2^53: the
    same bits whatever else is in the batch and however the prompt was chunked.
    """

    def __init__(
        self,
        signals: SignalTable,
        distributions: DistributionTable,
        topology: Topology,
        device: torch.device,
    ) -> None:
        num_layers, num_experts = len(topology.layers), topology.max_experts
        self._routing_words = signals.routing_words
        self._expert_dtype = expert_dtype(distributions)
        self._nobody = num_layers * num_experts  # the row of the tables that is all zeros
        self._num_experts_L1 = torch.tensor(
            [[layer.num_experts] for layer in topology.layers], dtype=torch.int32, device=device
        )
        self._layer_offset_L1 = (
            torch.arange(num_layers, dtype=torch.int64, device=device)[:, None] * num_experts
        )

        self._num_tokens = signals.num_token_signals
        self._unit_table = torch.from_numpy(signals.unit.by_place(self._nobody + 1)).to(device)
        layer_mass = signals.layer_mass.by_place(num_layers).repeat(num_experts, axis=0)
        mass = np.concatenate([signals.mass.by_place(self._nobody + 1)[:-1], layer_mass], axis=1)
        self._mass_table = torch.from_numpy(np.pad(mass, [(0, 1), (0, 0)])).to(device)
        self._num_linear = signals.num_linear
        self._num_spread = len(signals.spread)
        in_set_IP = torch.from_numpy(signals.spread.by_place(self._nobody + 1) != 0)
        self._spread_bits_IW = pack_bits(in_set_IP).to(device)
        self._indicated_I = torch.from_numpy(signals.indicators.signal).to(device)
        tokens_I = signals.token_signal[signals.num_linear :]
        self._indicator_tokens_I = torch.from_numpy(tokens_I).to(device)
        self._least_I = torch.from_numpy(signals.indicators.least).to(device)

    def reduce(self, tap: RoutingTap, num_rows: int) -> torch.Tensor:
        """int64 [T, columns]: the evidence of the tap's first `num_rows` rows, whoever's they are."""
        ids_TLK = tap.topk_ids_TLK[:num_rows]
        weights_TLK = tap.topk_weights_TLK[:num_rows]
        # An id that is no expert would read beyond the tables, which ends the engine on CUDA.
        is_expert_TLK = (ids_TLK >= 0) & (ids_TLK < self._num_experts_L1)
        chosen_TLK = is_expert_TLK & (weights_TLK != 0)
        index_TLK = torch.where(chosen_TLK, ids_TLK + self._layer_offset_L1, self._nobody)
        index_TI = index_TLK.reshape(num_rows, -1)
        seen = torch.ones((num_rows, self._num_tokens), dtype=torch.int64, device=ids_TLK.device)
        parts = [seen]  # `TOKEN_SIGNAL`, and those of later epochs
        if self._unit_table.shape[1]:
            parts.append(embedding_bag(index_TI, self._unit_table, mode="sum").to(torch.int64))
        if self._num_spread:
            parts.append(self._spread(index_TLK))
        if self._mass_table.shape[1]:
            gate_TI = weights_TLK.reshape(num_rows, -1).to(torch.float64)
            gate_TI = gate_TI.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            masses = embedding_bag(index_TI, self._mass_table, mode="sum", per_sample_weights=gate_TI)
            parts.append(masses.round().to(torch.int64))
        if self._routing_words:
            expert_TLK = torch.where(chosen_TLK, ids_TLK + 1, 0).to(self._expert_dtype)
            parts.append(pack_experts(expert_TLK.flatten(1), self._routing_words))
        return torch.cat(parts, dim=1)

    def _spread(self, index_TLK: torch.Tensor) -> torch.Tensor:
        """int64 [T, spread signals]: the layers in which an expert of a set was chosen."""
        words_TLW = self._spread_bits_IW[index_TLK[:, :, 0]]
        for choice in range(1, index_TLK.shape[2]):
            words_TLW = words_TLW | self._spread_bits_IW[index_TLK[:, :, choice]]
        spread_T = [
            (words_TLW[:, :, number // WORD_BITS] >> (number % WORD_BITS) & 1).sum(dim=1)
            for number in range(self._num_spread)
        ]
        return torch.stack(spread_T, dim=1)

    def signals(self, evidence_TX: torch.Tensor) -> torch.Tensor:
        """int64 [T, X], indicators included, from the evidence of all layers together. A row that a
        signal's epoch did not see, whose evidence is 0, stays so."""
        evidence_TX = evidence_TX[:, : self._num_linear]
        if not len(self._least_I):
            return evidence_TX
        indicator_TI = (evidence_TX[:, self._indicated_I] >= self._least_I).to(torch.int64)
        seen_TI = evidence_TX[:, self._indicator_tokens_I]
        return torch.cat([evidence_TX, indicator_TI * seen_TI], dim=1)
