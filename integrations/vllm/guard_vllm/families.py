"""What kind of router a MoE layer has: the facts that masked routing needs, read from vLLM's router.

Each class of router, and each custom routing function, is recognised by what it is and described by
what its code does, attribute by attribute. What is not known here can be watched, but not masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.router.aiter_shared_routed_fused_moe_router import (
    AiterSharedRoutedFusedMoERouter,
)
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

from guard.program.topology import Router
from guard_vllm.compat import seam

IMAGE_SENTINELS = 5
"""Ids from `image_sentinel_lo` on that stand for image tokens (DeepSeek-V4's vision bias)."""

_MODELS = "vllm.model_executor.models"


@dataclass(frozen=True, slots=True)
class Family:
    """One layer's router, as the guard sees it.

    router: the facts that the compiler and the masked routing go by
    scaling: what the stock router multiplies the weights by, behind renormalisation
    expert_scale: reads a factor for each expert, [E], which the stock router folds into the weights
    bias: reads the bias for the choice, given the token ids: [E], or [T, E] where it depends on them
    unmaskable: why no mask can be honoured here, if so
    """

    router: Router
    scaling: float = 1.0
    expert_scale: Callable[[], torch.Tensor] | None = None
    bias: Callable[[torch.Tensor | None], torch.Tensor] | None = None
    unmaskable: str | None = None


def family_of(router: BaseRouter, num_experts: int) -> Family:
    """num_experts: logical experts of the layer, without zero experts and copies"""
    describe = _DESCRIBERS.get(type(router))
    if describe is None:
        return _unknown(f"the router {type(router).__name__} is not known to this release")
    return describe(router, num_experts)


def _unknown(why: str) -> Family:
    return Family(Router(kind="unknown"), unmaskable=why)


def _cpu(router: Any, num_experts: int) -> Family:
    if router.use_grouped_topk:
        return _grouped_family(router)
    if router.scoring_func == "sqrtsoftplus":
        if router._hash_indices_table is not None:
            return _hashed(router)
        return _biased(router, "sqrtsoftplus", renormalize=True)
    if router.custom_routing_function is not None:
        return _custom(router, num_experts)
    # A correction bias without groups is left out by vLLM's CPU router, so it is left out here.
    return Family(Router("softmax", router.renormalize))


def _fused(router: Any, _: int) -> Family:
    return Family(Router(router.scoring_func, router.renormalize))


def _fused_bias(router: Any, _: int) -> Family:
    if router._hash_indices_table is not None:
        return _hashed(router)
    return _biased(router, router.scoring_func, renormalize=router.renormalize)


def _grouped(router: Any, num_experts: int) -> Family:
    groups = router.num_expert_group
    if num_experts > groups and num_experts % groups == 0:
        return _grouped_family(router)
    # Groups that do not divide the experts: vLLM routes without them, and then scales biased weights
    # only; unbiased ones it always scores by softmax.
    if router.e_score_correction_bias is not None:
        return _biased(router, router.scoring_func, renormalize=router.renormalize)
    return Family(Router("softmax", router.renormalize))


def _grouped_family(router: Any) -> Family:
    groups = int(router.num_expert_group)
    return Family(
        Router(
            router.scoring_func,
            router.renormalize,
            num_groups=groups,
            topk_groups=min(groups, int(router.topk_group)),
            has_bias=router.e_score_correction_bias is not None,
        ),
        scaling=router.routed_scaling_factor,
        bias=_bias_of(router),
    )


def _biased(router: Any, scoring: str, *, renormalize: bool) -> Family:
    bias = _bias_of(router)
    return Family(
        Router(scoring, renormalize, has_bias=bias is not None),
        scaling=router.routed_scaling_factor,
        bias=bias,
    )


def _hashed(router: Any) -> Family:
    return Family(
        Router(router.scoring_func, router.renormalize, kind="hash"),
        scaling=router.routed_scaling_factor,
        unmaskable="a table from token ids to experts routes it",
    )


def _zero_expert(router: Any, num_experts: int) -> Family:
    if router.zero_expert_type != "identity":
        return _unknown(f"zero experts of type {router.zero_expert_type!r} are not known")
    num_zero_experts = len(router.e_score_correction_bias) - num_experts
    return Family(
        Router(
            router.scoring_func,
            router.renormalize,
            has_bias=True,
            num_zero_experts=num_zero_experts,
        ),
        scaling=router.routed_scaling_factor,
        bias=_bias_of(router),
    )


def _bias_of(router: Any) -> Callable[[torch.Tensor | None], torch.Tensor] | None:
    """Reads the bias when it is asked: new weights may come in place, or as another tensor."""
    vision = getattr(router, "bias_vl", None) is not None and router.image_sentinel_lo > 0
    if router.e_score_correction_bias is None and not vision:
        return None

    def bias(input_ids: torch.Tensor | None) -> torch.Tensor:
        text: torch.Tensor | None = router.e_score_correction_bias
        if not vision:
            assert text is not None
            return text.detach().float()
        assert input_ids is not None, "vLLM gives token ids to routers that need them"
        behind = input_ids - router.image_sentinel_lo
        is_image_T1 = ((behind >= 0) & (behind < IMAGE_SENTINELS)).unsqueeze(1)
        text = torch.zeros_like(router.bias_vl) if text is None else text
        return torch.where(is_image_T1, router.bias_vl.detach().float(), text.detach().float())

    return bias


def _custom(router: Any, _: int) -> Family:
    """By module and qualified name; a bound method's object holds what else the function reads."""
    function = router.custom_routing_function
    while isinstance(function, partial):
        function = function.func
    plain = getattr(function, "__func__", function)
    module, name = getattr(plain, "__module__", ""), getattr(plain, "__qualname__", repr(plain))
    describe = _CUSTOM_FUNCTIONS.get(f"{module}.{name}")
    if describe is None:
        return _unknown(f"it routes with {module}.{name}, which is not known to this release")
    return describe(router, getattr(function, "__self__", None))


def _llama4(_: Any, __: Any) -> Family:
    return Family(Router("sigmoid", renormalize=False))


def _cohere(router: Any, _: Any) -> Family:
    return Family(Router("sigmoid", router.renormalize))


def _sparsemixer(_: Any, __: Any) -> Family:
    return Family(Router("softmax", renormalize=False, kind="sparsemixer"))


def _gemma4(_: Any, owner: Any) -> Family:
    seam(owner, "per_expert_scale")
    return Family(
        Router("softmax", renormalize=True),
        expert_scale=lambda: owner.per_expert_scale.detach().float(),
    )


def _interns1(router: Any, owner: Any) -> Family:
    if owner.n_groups > 0:
        return _unknown("each group of experts chooses for itself (router_n_groups)")
    return Family(Router("softmax", router.renormalize))


_DESCRIBERS: dict[type, Callable[[Any, int], Family]] = {
    AiterSharedRoutedFusedMoERouter: _fused,
    CPURouter: _cpu,
    CustomRoutingRouter: _custom,
    FusedTopKBiasRouter: _fused_bias,
    FusedTopKRouter: _fused,
    GroupedTopKRouter: _grouped,
    ZeroExpertRouter: _zero_expert,
}

_CUSTOM_FUNCTIONS: dict[str, Callable[[Any, Any], Family]] = {
    f"{_MODELS}.cohere2_moe.token_choice_with_bias": _cohere,
    f"{_MODELS}.gemma4.Gemma4Router.routing_function": _gemma4,
    f"{_MODELS}.interns1_pro.InternS1ProMoeSparseMoeBlock._custom_routing_function": _interns1,
    f"{_MODELS}.llama4.Llama4MoE.custom_routing_function": _llama4,
    f"{_MODELS}.phimoe.phimoe_routing_function": _sparsemixer,
}
