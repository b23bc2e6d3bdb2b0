"""Finds the MoE layers of a loaded model, and puts the tap and the mask into their routers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from guard.device.mask import reroute_logits
from guard.errors import UnsupportedHostError
from guard.program.topology import MoELayer, Topology
from guard.runtime import Guard
from guard_vllm.compat import seam

_OBSERVE_ONLY = "start with --observe-only to watch this model without masks"


class RoutedLayer(NamedTuple):
    """A MoE layer of the served model (never of a draft model) and its router."""

    number: int
    name: str
    router: BaseRouter


def routed_layers(model: torch.nn.Module) -> list[RoutedLayer]:
    """By layer number. Raises UnsupportedHostError for a layer that the guard could not watch."""
    layers = []
    for module in model.modules():
        if not isinstance(module, MoERunner):
            continue
        if module.is_monolithic:
            raise UnsupportedHostError(
                f"layer {module.layer_name} routes inside its kernel, where the guard cannot see it; "
                "choose a modular kernel with --moe-backend (triton or marlin)"
            )
        router = module.router
        if not isinstance(router, BaseRouter):
            raise UnsupportedHostError(
                f"layer {module.layer_name} has the router {type(router).__name__}, "
                "which is not supported yet"
            )
        layers.append(RoutedLayer(int(module.layer_id), module.layer_name, router))
    if not layers:
        raise UnsupportedHostError(
            f"{type(model).__name__} has no MoE layers that vLLM routes, so there is nothing to "
            "guard; serve a Mixture-of-Experts model, or start vLLM without MoE Guard's policies"
        )
    layers.sort(key=lambda layer: layer.number)
    numbers = [layer.number for layer in layers]
    if len(set(numbers)) != len(numbers):
        raise UnsupportedHostError(f"several MoE layers share a layer number: {numbers}")
    return layers


def topology_of(architecture: str, layers: list[RoutedLayer]) -> Topology:
    """The loaded model's own topology. Redundant experts of EPLB are not logical ones."""
    return Topology(
        architecture,
        tuple(
            MoELayer(layer.number, int(layer.router.global_num_experts), int(layer.router.top_k))
            for layer in layers
        ),
    )


def attach(guard: Guard, layers: list[RoutedLayer]) -> None:
    """Let every router report to the guard's tap and obey its mask.

    What is replaced is `_compute_routing` of each instance: there ids are logical, before expert
    load balancing, and vLLM's own record sees the masked choice.

    Raises UnsupportedHostError where masking is provisioned and a router cannot honour it.
    """
    for index, layer in enumerate(layers):
        stock = seam(layer.router, "_compute_routing")
        route = stock if guard.mask is None else _rerouted(guard, index, layer, stock)
        layer.router._compute_routing = _tapped(guard, index, route)


def _tapped(guard: Guard, index: int, route: Callable[..., Any]) -> Callable[..., Any]:
    tap = guard.tap

    def compute_routing(
        hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        topk_weights, topk_ids = route(hidden_states, router_logits, *args, **kwargs)
        tap.record(index, topk_ids, topk_weights)
        return topk_weights, topk_ids

    return compute_routing


def _rerouted(
    guard: Guard, index: int, layer: RoutedLayer, stock: Callable[..., Any]
) -> Callable[..., Any]:
    _refuse_unless_plain_softmax(layer)
    mask = guard.mask
    assert mask is not None
    keeps_unmasked_softmax = not layer.router.renormalize

    def compute_routing(
        hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        excluded_TE = mask.excluded(index, router_logits.shape[0])
        masked_logits = reroute_logits(router_logits, excluded_TE)
        topk_weights, topk_ids = stock(hidden_states, masked_logits, *args, **kwargs)
        if keeps_unmasked_softmax:
            # Without renormalisation the weights of the survivors must not grow.
            scores = torch.softmax(router_logits.float(), dim=-1)
            # On CUDA a padding row chooses nobody, which the stock router says with -1.
            own_weights = scores.gather(1, topk_ids.long().clamp(min=0)).to(topk_weights.dtype)
            is_masked_TK = excluded_TE.any(dim=-1, keepdim=True) & (topk_ids >= 0)
            topk_weights = torch.where(is_masked_TK, own_weights, topk_weights)
        return topk_weights, topk_ids

    return compute_routing


def _refuse_unless_plain_softmax(layer: RoutedLayer) -> None:
    """Only where the logit alone decides the choice does excluding it unselect the expert."""
    router = layer.router
    plain = isinstance(router, FusedTopKRouter) or (
        isinstance(router, CPURouter)
        and not router.use_grouped_topk
        and router.custom_routing_function is None
        and router.e_score_correction_bias is None
    )
    if plain and router.scoring_func == "softmax":
        return
    raise UnsupportedHostError(
        f"layer {layer.name} routes with {type(router).__name__} "
        f"(scoring {getattr(router, 'scoring_func', 'unknown')!r}); masks on anything but a plain "
        f"softmax top-k are not supported yet; {_OBSERVE_ONLY}"
    )
