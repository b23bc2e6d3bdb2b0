"""Faults in a model's routing that a test turns on and off while the engine runs: for tests only.

vLLM mixes `RoutingFaults` into its worker class (`worker_extension_cls`), and a test reaches it with
`LLM.collective_rpc`. Importing this module makes every guard of the process attachable to faults; they
are tensors that the forward reads, so that a compiled forward shows them without being compiled anew.
A fault behind the one operation that masks and taps a layer overwrites what it left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import guard_vllm.routers
import guard_vllm.worker
import torch

from guard.device.mask import MaskedExperts

KINDS = (
    "silent",
    "out_of_range",
    "not_finite",
    "reports_not_finite",  # and routes as it should: what follows in the forward is sound
    "duplicate",
    "ignores_masks",
)
SILENT, OUT_OF_RANGE, NOT_FINITE, REPORTS_NOT_FINITE, DUPLICATE, IGNORES_MASKS = range(len(KINDS))
_is_on = torch.zeros((len(KINDS), 64), dtype=torch.bool)  # [kind, layer]; layers are numbered from 0


class RoutingFaults:
    """Methods of the worker, where `rank` is the worker's own."""

    rank: int

    def set_routing_fault(self, kind: str, layers: list[int], rank: int | None = None) -> None:
        """Only this fault, in these layers, and only on the rank that is given."""
        _is_on.zero_()
        if rank in (None, self.rank):
            _is_on[KINDS.index(kind), layers] = True

    def clear_routing_faults(self) -> None:
        _is_on.zero_()


_worker: Any = guard_vllm.worker
_routers: Any = guard_vllm.routers
_stock_attach, _stock_route_masked = _worker.attach, _routers.route_masked
_stock_make_layer_routing = _routers.make_layer_routing


def _attach(guard: Any, layers: list[Any]) -> None:
    """Between the stock router and the guard, and between the guard and its tap."""
    for index, layer in enumerate(layers):
        layer.router._compute_routing = _faulty_router(index, layer.router._compute_routing)
    guard.tap.record = _faulty_record(guard.tap.record)
    _stock_attach(guard, layers)


def _faulty_router(index: int, stock: Callable[..., Any]) -> Callable[..., Any]:
    def compute_routing(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = stock(*args, **kwargs)
        weights = torch.where(_is_on[NOT_FINITE, index], float("nan"), weights)
        ids = torch.where(_is_on[DUPLICATE, index], ids[:, :1].expand_as(ids), ids)
        return weights, ids

    return compute_routing


def _faulty_record(stock: Callable[..., None]) -> Callable[..., None]:
    def record(layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
        ids = torch.where(_is_on[SILENT, layer], -1, topk_ids.to(torch.int32))  # as the step began
        ids = torch.where(_is_on[OUT_OF_RANGE, layer], ids + 1000, ids)
        stock(layer, ids, topk_weights.where(~_is_on[REPORTS_NOT_FINITE, layer], float("nan")))

    return record


def _route_masked(layer: Any, router_logits: torch.Tensor, masked: MaskedExperts, *args: Any) -> Any:
    obeys = ~_is_on[IGNORES_MASKS, layer.number]
    return _stock_route_masked(
        layer, router_logits, MaskedExperts(*(wanted & obeys for wanted in masked)), *args
    )


class _FaultyLayerRouting:
    """Of a router that does not scale its gate weights, as those of the tests."""

    def __init__(self, stock: Any, layer: Any, index: int, tap: Any) -> None:
        self._stock, self._layer, self._index, self._tap = stock, layer, index, tap

    def apply(
        self,
        router_logits: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        unmasked_weights, unmasked_ids = topk_weights.clone(), topk_ids.clone()
        self._stock.apply(router_logits, topk_weights, topk_ids, bias)
        ignores = _is_on[IGNORES_MASKS, self._layer.number]
        topk_weights.copy_(torch.where(ignores, unmasked_weights, topk_weights))
        topk_ids.copy_(torch.where(ignores, unmasked_ids, topk_ids))
        top_k = self._layer.top_k
        self._tap.record(self._index, topk_ids[:, :top_k], topk_weights[:, :top_k])


def _make_layer_routing(layer: Any, index: int, tap: Any, mask: Any, scaling: float) -> Any:
    stock = _stock_make_layer_routing(layer, index, tap, mask, scaling)
    if stock is None:
        return None
    assert scaling == 1.0, "gate weights are taken from what the router returns"
    return _FaultyLayerRouting(stock, layer, index, tap)


_worker.attach = _attach
_routers.route_masked = _route_masked
_routers.make_layer_routing = _make_layer_routing
