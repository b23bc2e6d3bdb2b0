"""Masked routing and tap of one MoE layer as one operation behind the stock router.

On a CPU it is C++ (`native/route.cpp`), on a GPU a Triton kernel. Both look at a row's bits first, so
that a row under no mask costs the copy into the tap; what they compute for the others is written in
`guard/device/routing.py`.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from functools import cache
from typing import Protocol

import torch

from guard.device.kernels.choice import Kernels, has_kernels
from guard.device.kernels.native.route_call import let_graphs_call_it
from guard.device.mask import ExpertMask
from guard.device.tap import RoutingTap
from guard.program.topology import MoELayer

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
"""By the numbers that the kernels know them by."""


class LayerRouting(Protocol):
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


def make_layer_routing(
    layer: MoELayer,
    index: int,
    tap: RoutingTap,
    mask: ExpertMask | None,
    scaling: float,
    kernels: Kernels | None = None,
) -> LayerRouting | None:
    """None where torch has to do it: no kernels here, or a router that they do not know.

    index: row of the topology; scaling: what the stock router multiplies gate weights by
    mask: None where nothing is masked
    """
    device = tap.topk_ids_TLK.device
    covered = mask is None or _covers(layer)
    if not covered or not has_kernels(device, kernels):
        return None
    made = CpuLayerRouting if device.type == "cpu" else GpuLayerRouting
    return made(layer, index, tap, mask, scaling)


def _covers(layer: MoELayer) -> bool:
    router = layer.router
    return router.kind == "topk" and router.scoring in SCORINGS and not router.num_zero_experts


def _facts_of(
    layer: MoELayer, scaling: float, *, is_masking: bool
) -> tuple[int, int, int, bool, int, int, float]:
    """What both kernels are told, in their order. How a layer scores that is only watched they need not
    know."""
    router = layer.router
    return (
        layer.top_k,
        layer.num_experts,
        SCORINGS.index(router.scoring) if is_masking else 0,
        router.renormalize,
        router.num_groups,
        router.topk_groups,
        float(scaling),
    )


class _CpuFacts(ctypes.Structure):
    """`Layer` in `route.cpp`."""

    _fields_ = (
        ("row_bits_TW", c_void_p),
        ("expert_bits_EW", c_void_p),
        ("methods_MW", c_void_p),
        ("tap_ids_TK", c_void_p),
        ("tap_weights_TK", c_void_p),
        ("num_words", c_int64),
        ("tap_stride", c_int64),
        ("max_rows", c_int64),
        ("top_k", c_int64),
        ("num_experts", c_int64),
        ("scoring", c_int64),
        ("renormalize", c_int64),
        ("num_groups", c_int64),
        ("topk_groups", c_int64),
        ("scaling", c_double),
    )


class CpuLayerRouting:
    """The buffers of tap and mask never move, so the operation is told where they are."""

    def __init__(
        self, layer: MoELayer, index: int, tap: RoutingTap, mask: ExpertMask | None, scaling: float
    ) -> None:
        _define()
        let_graphs_call_it()
        self._keep_alive = (tap, mask)
        bits: tuple[int | None, int | None, int | None] = (None, None, None)
        if mask is not None:
            expert_bits_EW = mask.expert_bits_LEW[index]
            assert expert_bits_EW.is_contiguous()
            bits = (
                mask.row_bits_TW.data_ptr(),
                expert_bits_EW.data_ptr(),
                mask.method_bits_MW.data_ptr(),
            )
        facts = _CpuFacts(
            *bits,
            tap.topk_ids_TLK[:, index].data_ptr(),
            tap.topk_weights_TLK[:, index].data_ptr(),
            0 if mask is None else mask.row_bits_TW.shape[1],
            tap.topk_ids_TLK.stride(0),
            len(tap.topk_ids_TLK),
            *_facts_of(layer, scaling, is_masking=mask is not None),
        )
        self._layer = index
        self._facts = tap.facts_of_layers(ctypes.sizeof(_CpuFacts) // torch.int64.itemsize)
        self._facts[index] = torch.frombuffer(bytearray(facts), dtype=torch.int64)

    def apply(
        self,
        router_logits: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        torch.ops.moe_guard.route_on_cpu(
            router_logits, topk_weights, topk_ids, self._facts, self._layer, bias
        )


class GpuLayerRouting:
    def __init__(
        self, layer: MoELayer, index: int, tap: RoutingTap, mask: ExpertMask | None, scaling: float
    ) -> None:
        _define()
        if mask is None:
            no_bits = torch.zeros((0, 1), dtype=torch.int64, device=tap.topk_ids_TLK.device)
            bits = (no_bits, no_bits, no_bits)
        else:
            bits = (mask.row_bits_TW, mask.expert_bits_LEW, mask.method_bits_MW)
        self._buffers = (*bits, tap.topk_ids_TLK, tap.topk_weights_TLK)
        self._facts = (index, *_facts_of(layer, scaling, is_masking=mask is not None))

    def apply(
        self,
        router_logits: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        torch.ops.moe_guard.route_on_gpu(
            router_logits, topk_weights, topk_ids, *self._buffers, *self._facts, bias
        )


_SCHEMAS = {
    "moe_guard::route_on_cpu": (
        "(Tensor router_logits, Tensor(a!) topk_weights, Tensor(b!) topk_ids, Tensor facts, "
        "int layer, Tensor? bias) -> ()"
    ),
    "moe_guard::route_on_gpu": (
        "(Tensor router_logits, Tensor(a!) topk_weights, Tensor(b!) topk_ids, Tensor row_bits_TW, "
        "Tensor expert_bits_LEW, Tensor method_bits_MW, Tensor(c!) tap_ids_TLK, "
        "Tensor(d!) tap_weights_TLK, int layer, int top_k, int num_experts, int scoring, "
        "bool renormalize, int num_groups, int topk_groups, float scaling, Tensor? bias) -> ()"
    ),
}
"""What the tap gets on a CPU is no argument: nothing in the graph reads it."""


@cache
def _define() -> None:
    for name, schema in _SCHEMAS.items():
        torch.library.define(name, schema)
        torch.library.register_fake(name, _nothing)
    if torch.cuda.is_available():
        from guard.device.kernels.triton_route.launch import route

        torch.library.impl("moe_guard::route_on_gpu", "CUDA", route)


def _nothing(*_: object) -> None:
    """What tracing is told: it returns nothing, whatever it writes."""
