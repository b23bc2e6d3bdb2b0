"""What the routers chose in this step: written inside the forward, read after it."""

from __future__ import annotations

import torch

from guard.device.layout import Capacity
from guard.program.topology import Topology


class RoutingTap:
    """Fixed buffers of a step's routing; rows as in the forward, layers as in the topology.

    topk_ids_TLK: int32, logical expert ids; -1 where a layer chooses fewer than K, or nothing was
        written since `clear`
    topk_weights_TLK: float32, as the router returned them
    """

    def __init__(self, topology: Topology, capacity: Capacity, device: torch.device) -> None:
        shape = (capacity.max_rows, len(topology.layers), topology.max_top_k)
        self.topk_ids_TLK = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.topk_weights_TLK = torch.zeros(shape, dtype=torch.float32, device=device)
        self._facts: torch.Tensor | None = None

    def facts_of_layers(self, width: int) -> torch.Tensor:
        """int64 [L, width]: what kernels know of each layer. One tensor for all: each input of a
        compiled graph is looked up in every step, along the way on which it was found."""
        if self._facts is None:
            self._facts = torch.zeros((self.topk_ids_TLK.shape[1], width), dtype=torch.int64)
        return self._facts

    def record(self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """Keep one layer's choice. Traced into compiled graphs, captured by CUDA graphs.

        layer: row of the topology; topk_ids, topk_weights: [rows, k], padding rows included
        """
        rows, top_k = topk_ids.shape
        self.topk_ids_TLK[:rows, layer, :top_k] = topk_ids
        self.topk_weights_TLK[:rows, layer, :top_k] = topk_weights

    def clear_rows(self, num_rows: int) -> None:
        """Before a forward of that many rows: what a layer does not write again is nobody's choice."""
        self.topk_ids_TLK[:num_rows].fill_(-1)

    def clear(self) -> None:
        """Forget everything, so that a layer that does not report can be told from one that does."""
        self.topk_ids_TLK.fill_(-1)
        self.topk_weights_TLK.zero_()
