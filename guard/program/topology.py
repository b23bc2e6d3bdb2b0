"""Where a model's experts are, and how each layer's router chooses among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple


@dataclass(frozen=True, slots=True)
class Router:
    """How a MoE layer turns a token's router logits into experts and gate weights.

    kind: what sort of choice it is
        "topk": the k experts of the highest score
        "sparsemixer": two passes, each a masked softmax over what is close to the best (Phi-3.5-MoE)
        "hash": a table from token id to experts; no choice is made, so none can be masked
        "unknown": one that can be watched, but not masked
    scoring: what the logits become: "softmax", "sigmoid", "sqrtsoftplus"
    renormalize: the weights of the k chosen are divided by their sum
    num_groups, topk_groups: experts lie in equal groups in order of id, of which the best are kept
        before experts are chosen; 1 and 1 without groups
    has_bias: a vector of the checkpoint is added to the scores for the choice, not for the weights
    num_zero_experts: identity experts, whose ids follow those of the routed ones
    is_in_kernel: the layer's kernel routes inside itself and is masked through its logits, which can
        reroute and nothing else
    """

    scoring: str = "softmax"
    renormalize: bool = True
    num_groups: int = 1
    topk_groups: int = 1
    has_bias: bool = False
    kind: str = "topk"
    num_zero_experts: int = 0
    is_in_kernel: bool = False


PLAIN_SOFTMAX: Final = Router()


class MoELayer(NamedTuple):
    number: int  # the model's own layer number, dense layers included in the count
    num_experts: int  # logical routed experts; shared and zero experts are not counted
    top_k: int
    router: Router = PLAIN_SOFTMAX


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

    @property
    def sizes(self) -> tuple[tuple[int, int, int], ...]:
        """(number, experts, top-k) of each layer: where a configuration and a loaded model agree."""
        return tuple((layer.number, layer.num_experts, layer.top_k) for layer in self.layers)
