"""`moe_guard::route` on rows of which each is under masks of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from guard.device.kernels.layer_routing import GpuLayerRouting, LayerRouting, make_layer_routing
from guard.device.layout import Capacity
from guard.device.mask import ExpertMask
from guard.device.tap import RoutingTap
from guard.program.program import MaskMethodCode
from guard.program.topology import MoELayer, Topology
from tests.support.routing_oracle import Asked

SCALING = 2.5
_METHODS = {
    MaskMethodCode.REROUTE: "rerouted",
    MaskMethodCode.DROP_RENORM: "drop_renormed",
    MaskMethodCode.DROP: "dropped",
    MaskMethodCode.FORCE: "forced",
}
CPU = torch.device("cpu")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""The GPU's kernel is run by Triton's interpreter, in the place of the CPU's."""


class Routed(NamedTuple):
    """What the layer returned and what the tap holds, of the first `top_k` columns."""

    weights_TK: torch.Tensor
    ids_TK: torch.Tensor
    tap_weights_TK: torch.Tensor
    tap_ids_TK: torch.Tensor


def stock_choice(layer: MoELayer, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As a stock router might return: a column more than k, for a fused shared expert."""
    ids_TK = torch.arange(layer.top_k + 1).repeat(num_rows, 1).to(torch.int32)
    return SCALING / (1 + ids_TK).float(), ids_TK


def route_layer(
    layer: MoELayer,
    logits: torch.Tensor,
    asks: Sequence[Asked],
    bias: torch.Tensor | None,
    stock: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Routed:
    """It is the second layer of two, so that a wrong stride shows."""
    num_rows = len(asks)
    layers = (MoELayer(0, layer.num_experts + 3, layer.top_k + 1), layer._replace(number=1))
    topology = Topology("Tests", layers)
    num_actions = len(_METHODS) * num_rows
    capacity = Capacity(num_rows + 2, 1, mask_words=-(-num_actions // 64))
    tap, mask = RoutingTap(topology, capacity, CPU), ExpertMask(topology, capacity, CPU)
    put_masks(mask, asks)
    weights, ids = stock or stock_choice(layer, num_rows)
    routing = make_routing(layer, 1, tap, mask)
    apply(routing, logits, weights, ids, bias)
    assert torch.equal(tap.topk_ids_TLK[:, 0], torch.full_like(tap.topk_ids_TLK[:, 0], -1))
    assert (tap.topk_ids_TLK[num_rows:] == -1).all()
    assert (tap.topk_ids_TLK[:, 1, layer.top_k :] == -1).all()
    k = layer.top_k
    return Routed(
        weights[:, :k],
        ids[:, :k].long(),
        tap.topk_weights_TLK[:num_rows, 1, :k],
        tap.topk_ids_TLK[:num_rows, 1, :k].long(),
    )


def make_routing(layer: MoELayer, index: int, tap: RoutingTap, mask: ExpertMask | None) -> LayerRouting:
    if IS_INTERPRETED:
        return GpuLayerRouting(layer, index, tap, mask, SCALING)
    routing = make_layer_routing(layer, index, tap, mask, SCALING)
    assert routing is not None, "no kernel covers it"
    return routing


def apply(
    routing: LayerRouting,
    logits: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    if not isinstance(routing, GpuLayerRouting):
        routing.apply(logits, weights, ids, bias)
        return
    from guard.device.kernels.triton_route.launch import route

    implementation: Any = route
    implementation(logits, weights, ids, *routing._buffers, *routing._facts, bias)


def put_masks(mask: ExpertMask, asks: Sequence[Asked]) -> None:
    """Four actions a row, one for each method, in force in that row alone."""
    bits_TW = np.zeros(mask.row_bits_TW.shape, dtype=np.uint64)
    experts_EW = np.zeros(mask.expert_bits_LEW.shape[1:], dtype=np.uint64)
    methods_MW = np.zeros(mask.method_bits_MW.shape, dtype=np.uint64)
    for row, asked in enumerate(asks):
        for method, name in _METHODS.items():
            word, bit = divmod(4 * row + int(method), 64)
            methods_MW[method, word] |= np.uint64(1 << bit)
            bits_TW[row, word] |= np.uint64(1 << bit)
            for expert in getattr(asked, name):
                experts_EW[expert, word] |= np.uint64(1 << bit)
    mask.row_bits_TW.copy_(torch.from_numpy(bits_TW.view(np.int64)))
    mask.expert_bits_LEW[1].copy_(torch.from_numpy(experts_EW.view(np.int64)))
    mask.method_bits_MW.copy_(torch.from_numpy(methods_MW.view(np.int64)))
