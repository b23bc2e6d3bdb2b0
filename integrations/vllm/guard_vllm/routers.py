"""Finds the MoE layers of a loaded model, and puts the tap and the mask into their routers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import (
    RoutingSimulatorRouter,
)
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from guard.device.kernels.layer_routing import make_layer_routing
from guard.device.mask import ExpertMask, MaskedExperts
from guard.device.routing import route_masked
from guard.errors import UnsupportedHostError
from guard.program.topology import PLAIN_SOFTMAX, MoELayer, Topology
from guard.runtime import Guard
from guard_vllm.compat import seam
from guard_vllm.data_parallel import routed_rows
from guard_vllm.families import Family, family_of
from guard_vllm.logit_masks import inside_kernel, route_through_logits

_OTHER_KERNEL = "choose another --moe-backend (triton or marlin)"
_OBSERVE_ONLY = "start with --observe-only to watch this model without masks"
_NAMED_LIKE_EXPERTS = re.compile(r"moe|expert", re.IGNORECASE)


class RoutedLayer(NamedTuple):
    """A MoE layer of the served model (never of a draft model) and its router.

    num_logical_experts: None where the router knows of no others
    runner: what calls the router and holds the experts; it knows whose rows it routes
    kernel: the class of the layer's kernel, if it routes inside itself
    """

    number: int
    name: str
    router: BaseRouter
    num_logical_experts: int | None = None
    runner: MoERunner | None = None
    kernel: type | None = None

    @property
    def num_experts(self) -> int:
        """Without the copies of expert load balancing, and without zero experts."""
        return int(self.num_logical_experts or self.router.global_num_experts)

    @property
    def family(self) -> Family:
        family = family_of(self.router, self.num_experts)
        if self.kernel is None:
            return family
        return replace(family, router=replace(family.router, is_in_kernel=True))

    @property
    def facts(self) -> MoELayer:
        return MoELayer(self.number, self.num_experts, int(self.router.top_k), self.family.router)


def routed_layers(
    model: torch.nn.Module, *, some: bool = True, taken: Mapping[str, type] | None = None
) -> list[RoutedLayer]:
    """By layer number. Raises UnsupportedHostError for a layer that the guard could not watch.

    some: there must be some; a rank of a pipeline may have none
    taken: kernels that route inside themselves and were taken by `guardable_kernels`, by layer name
    """
    layers = []
    for module in _without_runners_insides(model):
        if not isinstance(module, MoERunner):
            _refuse_experts_outside_a_runner(module)
            continue
        name, router = module.layer_name, module.router
        if isinstance(router, RoutingSimulatorRouter):
            raise UnsupportedHostError(
                f"layer {name} routes at random: unset VLLM_MOE_ROUTING_SIMULATION_STRATEGY"
            )
        if not isinstance(router, BaseRouter):
            raise UnsupportedHostError(
                f"layer {name} has the router {type(router).__name__}, which is not supported yet"
            )
        kernel = inside_kernel(module)
        num_experts = int(seam(module.moe_config, "num_logical_experts"))
        layer = RoutedLayer(int(module.layer_id), name, router, num_experts, module, kernel)
        if kernel is not None:
            _check_kernel(layer, kernel, (taken or {}).get(name))
        layers.append(layer)
    if some and not layers:
        raise UnsupportedHostError(
            f"{type(model).__name__} has no MoE layers that vLLM routes, so there is nothing to "
            "guard; serve a Mixture-of-Experts model, or start vLLM without MoE Guard's policies"
        )
    layers.sort(key=lambda layer: layer.number)
    numbers = [layer.number for layer in layers]
    if len(set(numbers)) != len(numbers):
        raise UnsupportedHostError(f"several MoE layers share a layer number: {numbers}")
    return layers


def _check_kernel(layer: RoutedLayer, kernel: type, taken: type | None) -> None:
    """vLLM may make or change a kernel behind its own choice, as it processes weights."""
    where = (
        f"layer {layer.name} routes inside its kernel {kernel.__name__}, where the guard cannot see it"
    )
    if kernel is not taken:
        chosen = "a kernel that does not" if taken is None else taken.__name__
        raise UnsupportedHostError(
            f"{where}, although vLLM's choice for it was {chosen}; {_OTHER_KERNEL}"
        )
    plain = replace(PLAIN_SOFTMAX, is_in_kernel=True)
    if layer.family.router != plain or layer.family.unmaskable is not None:
        raise UnsupportedHostError(
            f"{where}, and its router {type(layer.router).__name__} is no plain softmax over the "
            f"chosen experts, so it cannot be masked through its logits; {_OTHER_KERNEL}"
        )


def _without_runners_insides(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Each module once: Gemma 4 holds its layers a second time, in the module that runs them."""
    seen: set[torch.nn.Module] = set()
    ahead = [model]
    while ahead:
        module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        yield module
        if not isinstance(module, MoERunner):
            ahead += module.children()


def _refuse_experts_outside_a_runner(module: torch.nn.Module) -> None:
    """Models that call an expert kernel on their own, such as DeepSeek-V4's mega-MoE, route where the
    guard does not look. Their experts are known by the name and by weights of [experts, ., .]."""
    name = type(module).__name__
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    holds_experts = _NAMED_LIKE_EXPERTS.search(name) and any(
        tensor.dim() == 3 and len(tensor) > 1 for tensor in own
    )
    if holds_experts or "MegaMoE" in name:
        raise UnsupportedHostError(
            f"the experts in {name} are run outside vLLM's MoE runner, where the guard cannot see the "
            "routing; choose another kernel with --moe-backend (triton or marlin), if the model has one"
        )


def topology_of(architecture: str, layers: list[RoutedLayer]) -> Topology:
    """The loaded model's own topology, with what its routers say of themselves."""
    return Topology(architecture, tuple(layer.facts for layer in layers))


def attach(guard: Guard, layers: list[RoutedLayer]) -> None:
    """Let every router report to the guard's tap and obey its mask.

    What is replaced is `_compute_routing` of each instance: there ids are logical, before expert
    load balancing, and vLLM's own record sees the masked choice. Where the kernel routes, it is what
    the kernel is called by (`logit_masks`).

    Raises UnsupportedHostError where masking is provisioned and a router cannot honour it. Hash
    layers are watched all the same: that a policy masks one is refused when it is compiled.
    """
    index_of_layer = guard.program.topology.index_of_layer
    for layer in layers:
        index = index_of_layer[layer.number]
        family, mask = layer.family, guard.mask
        if mask is not None and family.unmaskable is not None:
            if family.router.kind != "hash":
                raise UnsupportedHostError(
                    f"masks cannot be honoured in layer {layer.name}: {family.unmaskable}; "
                    f"{_OBSERVE_ONLY}"
                )
            mask = None
        if layer.kernel is not None:
            experts = seam(layer.runner, "routed_experts")
            experts.forward_monolithic = route_through_logits(
                experts, layer.router, guard.tap, mask, index, layer.facts.top_k
            )
            continue
        stock = seam(layer.router, "_compute_routing")
        layer.router._compute_routing = _guarded(guard, index, layer, mask, stock)


def _guarded(
    guard: Guard,
    index: int,
    layer: RoutedLayer,
    mask: ExpertMask | None,
    stock: Callable[..., Any],
) -> Callable[..., Any]:
    """The stock router, then the masked routing in the rows that masks apply to.

    The stock router may return more columns than k: shared experts, fused behind the routed ones.
    """
    tap, facts, family, router = guard.tap, layer.facts, layer.family, layer.router
    top_k = facts.top_k
    rows = routed_rows(layer.runner, mask)
    kernel = None
    if rows.are_all_own and family.expert_scale is None:
        kernel = make_layer_routing(facts, index, tap, mask, family.scaling)

    def compute_routing(
        hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        topk_weights, topk_ids = stock(hidden_states, router_logits, *args, **kwargs)
        if kernel is not None and topk_weights.dtype == torch.float32:
            reads_bias = family.bias if mask is not None else None
            bias = None if reads_bias is None else reads_bias(kwargs.get("input_ids"))
            kernel.apply(router_logits, topk_weights, topk_ids, bias)
            return topk_weights, topk_ids
        gate_weights = _gate_weights(family, router_logits, topk_weights, topk_ids, top_k)
        if mask is not None:
            masked = rows.wanted(index, router_logits.shape[0])
            bias = None if family.bias is None else family.bias(kwargs.get("input_ids"))
            own_gates, own_ids = route_masked(facts, router_logits, masked, bias)
            own_weights = own_gates * family.scaling
            if family.expert_scale is not None:
                own_weights = own_weights * family.expert_scale()[own_ids]
            if facts.router.num_zero_experts:
                own_gates, own_weights, own_ids = _zero_experts_apart(
                    router, facts, masked, hidden_states, own_gates, own_weights, own_ids
                )
            # On CUDA a padding row chooses nobody, which the stock router says with -1.
            is_masked_TK = masked.applies_T1 & (topk_ids[:, :top_k] >= 0)
            gate_weights = torch.where(is_masked_TK, own_gates, gate_weights)
            topk_weights = _replaced(topk_weights, is_masked_TK, own_weights)
            topk_ids = _replaced(topk_ids, is_masked_TK, own_ids)
        tap.record(index, topk_ids[rows.own, :top_k], gate_weights[rows.own])
        return topk_weights, topk_ids

    return compute_routing


def _replaced(stock: torch.Tensor, is_masked_TK: torch.Tensor, own_TK: torch.Tensor) -> torch.Tensor:
    top_k = is_masked_TK.shape[1]
    routed_TK = torch.where(is_masked_TK, own_TK.to(stock.dtype), stock[:, :top_k])
    if stock.shape[1] == top_k:
        return routed_TK
    return torch.cat([routed_TK, stock[:, top_k:]], dim=1)


def _gate_weights(
    family: Family,
    router_logits: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """[T, k] `g` of the policy language: what the stock router chose by, before any scaling."""
    weights_TK, ids_TK = topk_weights[:, :top_k], topk_ids[:, :top_k]
    if family.expert_scale is not None:  # it may be 0, so it cannot be divided out
        chosen_TK = router_logits.float().gather(1, ids_TK.long().clamp(min=0))
        return chosen_TK.softmax(dim=-1).masked_fill(ids_TK < 0, 0.0)
    return weights_TK if family.scaling == 1.0 else weights_TK / family.scaling


def _zero_experts_apart(
    router: Any,
    facts: MoELayer,
    masked: MaskedExperts,
    hidden_states: torch.Tensor,
    gates_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Identity experts add their weight times the input, which vLLM's router keeps aside; among the
    routed ones they become expert 0 with no weight."""
    is_zero_TK = ids_TK >= facts.num_experts
    share_T1 = weights_TK.masked_fill(~is_zero_TK, 0.0).sum(dim=-1, keepdim=True)
    output = (hidden_states * share_T1).to(hidden_states.dtype)
    router._zero_expert_output = torch.where(masked.applies_T1, output, router._zero_expert_output)
    return (
        gates_TK.masked_fill(is_zero_TK, 0.0),
        weights_TK.masked_fill(is_zero_TK, 0.0),
        ids_TK.masked_fill(is_zero_TK, 0),
    )
