"""How often each expert was chosen, on a CPU: one call of machine code in a sampled step."""

from __future__ import annotations

import torch

from guard.device.kernels.native.interface import functions
from guard.device.rows import StepBatch
from guard.device.tap import RoutingTap
from guard.program.topology import Topology


class NativeLoad:
    """counts: see `ExpertLoad`; added to in place"""

    def __init__(self, topology: Topology, counts: torch.Tensor) -> None:
        assert counts.is_contiguous(), "counts lie one behind another"
        self._count = functions().moe_guard_count_load
        self._counts = counts
        self._experts_L = torch.tensor([layer.num_experts for layer in topology.layers])
        self._sizes = (len(topology.layers), topology.max_experts, topology.max_top_k)

    def add(
        self,
        tap: RoutingTap,
        batch: StepBatch,
        next_position_S: torch.Tensor,
        rejected_B: torch.Tensor | None,
        trusted_T1: torch.Tensor,
    ) -> None:
        slots_B, position_T = batch.slots_B.contiguous(), batch.position_T.contiguous()
        query_start_B1, trusted_T1 = batch.query_start_B1.contiguous(), trusted_T1.contiguous()
        if rejected_B is not None:
            rejected_B = rejected_B.to(torch.int64).contiguous()
        self._count(
            tap.topk_ids_TLK.data_ptr(),
            tap.topk_weights_TLK.data_ptr(),
            slots_B.data_ptr(),
            query_start_B1.data_ptr(),
            position_T.data_ptr(),
            None if rejected_B is None else rejected_B.data_ptr(),
            next_position_S.data_ptr(),
            trusted_T1.data_ptr(),
            trusted_T1.numel() == 1,
            len(slots_B),
            self._experts_L.data_ptr(),
            *self._sizes,
            self._counts.data_ptr(),
        )
