"""Masked routing and tap of one MoE layer as one operation behind the stock router, `moe_guard::route`.

On a CPU it is C++ (`native/route.cpp`), on a GPU a Triton kernel. Both look at a row's bits first, so
that a row under no mask costs the copy into the tap; what they compute for the others is written in
`guard/device/routing.py`.
"""

from __future__ import annotations

from functools import cache

import torch

from guard.device.kernels.choice import Kernels, has_kernels
from guard.device.mask import ExpertMask
from guard.device.tap import RoutingTap
from guard.program.topology import MoELayer

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
"""By the numbers that the kernels know them by."""

_SCHEMA = (
    "(Tensor router_logits, Tensor(a!) topk_weights, Tensor(b!) topk_ids, Tensor row_bits_TW, "
    "Tensor expert_bits_LEW, Tensor method_bits_MW, Tensor(c!) tap_ids_TLK, "
    "Tensor(d!) tap_weights_TLK, int layer, int top_k, int num_experts, int scoring, "
    "bool renormalize, float scaling, int num_groups, int topk_groups, Tensor? bias) -> ()"
)


class LayerRouting:
    """One layer's. mask: None where nothing is masked"""

    def __init__(
        self, layer: MoELayer, index: int, tap: RoutingTap, mask: ExpertMask | None, scaling: float
    ) -> None:
        """index: row of the topology; scaling: what the stock router multiplies gate weights by"""
        _define()
        device, router = tap.topk_ids_TLK.device, layer.router
        self._tap = tap
        if mask is None:
            no_bits = torch.zeros((0, 1), dtype=torch.int64, device=device)
            self._bits = (no_bits, no_bits, no_bits)
        else:
            self._bits = (mask.row_bits_TW, mask.expert_bits_LEW, mask.method_bits_MW)
        self._facts = (
            index,
            layer.top_k,
            layer.num_experts,
            SCORINGS.index(router.scoring) if mask is not None else 0,
            router.renormalize,
            float(scaling),
            router.num_groups,
            router.topk_groups,
        )

    @staticmethod
    def make(
        layer: MoELayer,
        index: int,
        tap: RoutingTap,
        mask: ExpertMask | None,
        scaling: float,
        kernels: Kernels | None = None,
    ) -> LayerRouting | None:
        """None where torch has to do it: no kernels here, or a router that they do not know."""
        covered = mask is None or _covers(layer)
        if not covered or not has_kernels(tap.topk_ids_TLK.device, kernels):
            return None
        return LayerRouting(layer, index, tap, mask, scaling)

    def apply(
        self,
        router_logits: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Replace what the stock router chose in the rows that a mask of the layer applies to, and
        keep what was chosen in all rows in the tap. Traced into compiled graphs.

        router_logits: [T, num_experts or more], any float
        topk_weights: float32 [T, top_k or more], scaled; topk_ids: int32 or int64
        bias: [E] or [T, E], as for `route_masked`
        """
        torch.ops.moe_guard.route(
            router_logits,
            topk_weights,
            topk_ids,
            *self._bits,
            self._tap.topk_ids_TLK,
            self._tap.topk_weights_TLK,
            *self._facts,
            bias,
        )


def _covers(layer: MoELayer) -> bool:
    router = layer.router
    return router.kind == "topk" and router.scoring in SCORINGS and not router.num_zero_experts


@cache
def _define() -> None:
    torch.library.define("moe_guard::route", _SCHEMA)
    torch.library.register_fake("moe_guard::route", _nothing)
    if torch.cuda.is_available():
        from guard.device.kernels.triton_route.launch import route

        torch.library.impl("moe_guard::route", "CUDA", route)


def _nothing(*_: object) -> None:
    """What tracing is told: it returns nothing, whatever it writes."""
