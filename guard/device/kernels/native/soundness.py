"""The running check's quick answer on a CPU: that there is nothing to find, as in almost every step."""

from __future__ import annotations

import torch

from guard.device.kernels.native.interface import functions
from guard.device.tap import RoutingTap


class Soundness:
    """
    used_L, num_experts_L: int64, places of each layer that must name an expert, and its experts
    excluding_LEW: int64, the mask actions that exclude each expert; None where there are none
    """

    def __init__(
        self,
        used_L: torch.Tensor,
        num_experts_L: torch.Tensor,
        excluding_LEW: torch.Tensor | None,
    ) -> None:
        self._holds = functions().moe_guard_is_sound
        self.used_L = used_L
        self._num_experts_L = num_experts_L.contiguous()
        self.excluding_LEW = None if excluding_LEW is None else excluding_LEW.contiguous()

    def holds(self, tap: RoutingTap, num_rows: int, words_TW: torch.Tensor | None) -> bool:
        """words_TW: int64, the mask actions in force for each row; None where none are"""
        _, num_layers, top_k = tap.topk_ids_TLK.shape
        excluding_LEW = None if words_TW is None else self.excluding_LEW
        assert (
            excluding_LEW is None or words_TW is None or (excluding_LEW.shape[2] == words_TW.shape[1])
        ), "words of one program"
        holds: bool = self._holds(
            tap.topk_ids_TLK.data_ptr(),
            tap.topk_weights_TLK.data_ptr(),
            num_rows,
            num_layers,
            top_k,
            self.used_L.data_ptr(),
            self._num_experts_L.data_ptr(),
            None if excluding_LEW is None else excluding_LEW.data_ptr(),
            0 if excluding_LEW is None else excluding_LEW.shape[1],
            None if words_TW is None else words_TW.data_ptr(),
            0 if words_TW is None else words_TW.shape[1],
        )
        return holds
