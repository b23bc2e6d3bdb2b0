"""Masks for kernels that route inside themselves, through the one thing that they are given: logits.

An expert of the lowest logit that there is is not among the k that a kernel chooses as long as there
are k others, which the compiler proves of every layer. Where scores are a softmax and the weights
of those chosen are renormalised, that is all there is to `reroute`: the weights are a softmax over the
k chosen, so nothing of a masked expert is left in them. Everywhere else it is not. A correction bias is
added behind the scores, groups are scored by experts that are out, weights that are not renormalised
give the survivors what the masked ones had, and no logit can drop or force an expert.

Which experts the kernel chose it does not say, so the stock router of the layer chooses again, from the
very logits that the kernel is given: what the tap holds is what these logits mean. It is the kernel's
own choice with one exception, experts of the same logit at the k-th place, of which the tap may name
another than the kernel takes, with the same gate weight. On CPUs kernel and router share the code that
decides; elsewhere both seem to take the lower id, which none of them promises. No tie brings a masked
expert back: only a model that overflows has another logit as low. Only a kernel that takes the softmax
first, and in it loses all but fewer than k experts to underflow, may fill a place with a masked one,
whose weight then is 0 as well.

That logit is finite: a softmax that goes block by block takes a block's maximum from each of its
logits, and minus infinity from itself is no number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType

from guard.device.mask import ExpertMask
from guard.device.tap import RoutingTap
from guard_vllm.compat import seam

_SOFTMAX_OF_CHOSEN = (RoutingMethodType.Renormalize, RoutingMethodType.RenormalizeNaive)
"""What kernels call it when weights are a softmax over the chosen: before or behind the choice."""


def inside_kernel(runner: Any) -> type | None:
    """The kernel of a MoE layer that routes inside itself; None where the layer's router routes."""
    if not runner.is_monolithic:
        return None
    method = runner.routed_experts.quant_method
    kernel = getattr(method, "moe_kernel", None)
    if kernel is not None:
        return type(kernel.fused_experts)
    chosen: type = getattr(method, "experts_cls", type(method))
    return chosen


def why_not_enough(experts: Any) -> str | None:
    """Why logits cannot mask what a `RoutedExperts` computes, or None where they can.

    From what the layer was built with, which is what its kernel is given or has been set up for.
    """
    config = experts.moe_config
    method = config.routing_method
    reasons = [
        (experts.custom_routing_function is not None, "the model has a routing function of its own"),
        (experts.scoring_func != "softmax", f"experts are scored by {experts.scoring_func}"),
        (not experts.renormalize, "the weights of the chosen experts are not renormalised"),
        (
            experts.e_score_correction_bias is not None,
            "a correction bias is added to the scores, which can choose an expert whatever its logit",
        ),
        (
            bool(experts.use_grouped_topk or experts.num_expert_group),
            "groups of experts are chosen first",
        ),
        (bool(experts.apply_router_weight_on_input), "weights are applied to the experts' input"),
        (bool(config.has_hash_routing), "a table from token ids to experts routes"),
        (
            config.num_experts != config.num_logical_experts,
            "there are copies of experts, or shared ones among the routed",
        ),
        (
            bool(config.moe_parallel_config.enable_eplb),
            "experts are moved about by load balancing, by a map that is the router's",
        ),
        (
            config.moe_parallel_config.dp_size > 1 or config.moe_parallel_config.is_sequence_parallel,
            "rows of other ranks pass through the kernel",
        ),
        (
            bool(config.moe_parallel_config.use_ep),
            "its experts lie on several ranks",
        ),
        (
            method not in _SOFTMAX_OF_CHOSEN,
            f"the kernel is set up for the routing method {method.name}",
        ),
    ]
    return "; ".join(reason for applies, reason in reasons if applies) or None


def route_through_logits(
    experts: Any, router: Any, tap: RoutingTap, mask: ExpertMask | None, index: int, top_k: int
) -> Callable[..., Any]:
    """What takes the place of a `RoutedExperts`' `forward_monolithic`.

    In rows and experts that no mask is for, the kernel is given the bits that it was given before.

    index: row of the topology
    """
    stock = seam(experts, "forward_monolithic")
    compute_routing = seam(router, "_compute_routing")

    def forward_monolithic(
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
    ) -> Any:
        if mask is not None:
            masked = mask.wanted(index, mask.row_bits_TW[: len(router_logits)])
            router_logits = without(router_logits, masked.rerouted_TE)
        topk_weights, topk_ids = compute_routing(x, router_logits, None, input_ids=input_ids)
        tap.record(index, topk_ids[:, :top_k], topk_weights[:, :top_k])
        return stock(x=x, router_logits=router_logits, input_ids=input_ids)

    return forward_monolithic


def without(router_logits: torch.Tensor, masked_TE: torch.Tensor) -> torch.Tensor:
    """[T, E] logits in which masked experts cannot be chosen; all others keep their bits."""
    return router_logits.masked_fill(masked_TE, torch.finfo(router_logits.dtype).min)
