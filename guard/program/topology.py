"""Where a model's experts are: which layers are MoE, how many experts each has, how many it chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class MoELayer(NamedTuple):
    number: int  # the model's own layer number, dense layers included in the count
    num_experts: int  # logical routed experts; shared ones are not routed and not counted
    top_k: int


@dataclass(frozen=True, slots=True)
class Topology:
    """The MoE layers of a model, by ascending layer number."""

    architecture: str
    layers: tuple[MoELayer, ...]

    @property
    def max_experts(self) -> int:
        return max((layer.num_experts for layer in self.layers), default=0)

    @property
    def max_top_k(self) -> int:
        return max((layer.top_k for layer in self.layers), default=0)

    @property
    def index_of_layer(self) -> Mapping[int, int]:
        """Model layer number -> row of this layer in every per-layer array."""
        return {layer.number: index for index, layer in enumerate(self.layers)}
