"""A router of each family as vLLM builds it. Where it routes with a CUDA kernel, its own code in torch
stands in for the kernel; where it has none, a few lines that do the same."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from vllm.model_executor.layers.fused_moe.router import (
    cpu_router,
    fused_topk_bias_router,
    fused_topk_router,
    grouped_topk_router,
    zero_expert_router,
)
from vllm.model_executor.layers.fused_moe.router.aiter_shared_routed_fused_moe_router import (
    AiterSharedRoutedFusedMoERouter,
)
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
from vllm.model_executor.models.cohere2_moe import token_choice_with_bias
from vllm.model_executor.models.gemma4 import Gemma4Router, gemma4_routing_function_torch
from vllm.model_executor.models.llama4 import Llama4MoE
from vllm.model_executor.models.phimoe import phimoe_routing_function

EXPERTS, TOP_K = 32, 4
ZERO_EXPERTS = 8


def bias(offset: float, spread: float, columns: int = EXPERTS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return offset + (torch.rand(columns, generator=generator) * 2 - 1) * spread


class Built(NamedTuple):
    """families: model families that route so, by their names in `tests.support.families`"""

    name: str
    build: Callable[[], Any]
    columns: int = EXPERTS  # of the router logits
    experts: int = EXPERTS
    # Weights of the stock router over `g`, the gate weight before any scaling
    scaling: float | torch.Tensor = 1.0
    families: tuple[str, ...] = ()


def _gemma4() -> tuple[Callable[..., Any], torch.Tensor]:
    owner = SimpleNamespace(per_expert_scale=torch.linspace(0.0, 1.5, EXPERTS))
    return Gemma4Router.routing_function.__get__(owner), owner.per_expert_scale


class InternS1ProBlock:
    """Its module needs torchvision; this is what the block has of routing."""

    def __init__(self, n_groups: int = -1) -> None:
        self.n_groups = n_groups

    def route(
        self, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        best, chosen = gating_output.float().softmax(-1).topk(topk)
        return best / best.sum(-1, keepdim=True) if renormalize else best, chosen

    route.__module__ = "vllm.model_executor.models.interns1_pro"
    route.__qualname__ = "InternS1ProMoeSparseMoeBlock._custom_routing_function"


def _cpu(**options: Any) -> Callable[[], Any]:
    return lambda: CPURouter(top_k=TOP_K, global_num_experts=EXPERTS, **options)


def _of(kind: type, top_k: int = TOP_K, **options: Any) -> Callable[[], Any]:
    return lambda: kind(top_k=top_k, global_num_experts=EXPERTS, **options)


GROUPS = {"num_expert_group": 4, "topk_group": 2}
CPU_GROUPS = {"use_grouped_topk": True, **GROUPS}
ONE_GROUP = {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1}
_COHERE = token_choice_with_bias._torchdynamo_orig_callable  # compiling it takes seconds
V3_BIAS, GLM_BIAS = bias(7.0, 0.12), bias(34.5, 0.14)

ON_CPU = [
    Built("Qwen3-MoE", _cpu(), families=("Qwen3-MoE", "Mixtral", "Qwen3.5-MoE")),
    Built("OLMoE", _cpu(renormalize=False), families=("OLMoE", "Jamba")),
    Built("DeepSeek-V2", _cpu(**CPU_GROUPS, renormalize=False)),
    Built(
        "DeepSeek-V3",
        _cpu(
            **CPU_GROUPS,
            scoring_func="sigmoid",
            routed_scaling_factor=2.5,
            e_score_correction_bias=V3_BIAS,
        ),
        scaling=2.5,
        families=("DeepSeek-V3",),
    ),
    Built(
        "GLM-4.5",
        _cpu(**ONE_GROUP, scoring_func="sigmoid", e_score_correction_bias=GLM_BIAS),
        families=("GLM-4.5",),
    ),
    Built("softmax with bias", _cpu(**ONE_GROUP, e_score_correction_bias=bias(0.1, 0.05))),
    Built(
        "DeepSeek-V4",
        lambda: CPURouter(
            top_k=6,
            global_num_experts=256,  # vLLM's kernel knows some numbers only
            scoring_func="sqrtsoftplus",
            routed_scaling_factor=1.5,
            e_score_correction_bias=bias(3.0, 0.2, 256),
        ),
        columns=256,
        experts=256,
        scaling=1.5,
        families=("DeepSeek-V4",),
    ),
    Built("Cohere2", _cpu(custom_routing_function=_COHERE), families=("Cohere2-MoE",)),
    Built(
        "Llama 4",
        _of(
            CPURouter,
            1,
            renormalize=False,
            custom_routing_function=Llama4MoE.custom_routing_function,
        ),
        families=("Llama 4",),
    ),
    Built(
        "Phi-3.5-MoE",
        _of(CPURouter, 2, renormalize=False, custom_routing_function=phimoe_routing_function),
        families=("Phi-3.5-MoE",),
    ),
    Built(
        "Gemma 4",
        _cpu(custom_routing_function=_gemma4()[0]),
        scaling=_gemma4()[1],
        families=("Gemma 4",),
    ),
    Built(
        "Intern-S1-Pro",
        _cpu(custom_routing_function=InternS1ProBlock().route),
        families=("Intern-S1-Pro",),
    ),
]
ON_CUDA = [
    Built("fused softmax", _of(FusedTopKRouter)),
    Built("fused softmax, no renorm", _of(FusedTopKRouter, renormalize=False)),
    Built("fused sigmoid", _of(FusedTopKRouter, scoring_func="sigmoid")),
    Built(
        "MiniMax-M2",
        _of(FusedTopKBiasRouter, e_score_correction_bias=V3_BIAS, routed_scaling_factor=2.0),
        scaling=2.0,
        families=("MiniMax-M2", "Laguna", "Step-3.5"),
    ),
    Built(
        "ERNIE-4.5",
        _of(FusedTopKBiasRouter, scoring_func="softmax", e_score_correction_bias=bias(0.1, 0.05)),
        families=("ERNIE-4.5-MoE",),
    ),
    Built(
        "fused shared expert",
        _of(FusedTopKBiasRouter, e_score_correction_bias=V3_BIAS, num_fused_shared_experts=1),
    ),
    Built(
        "fused shared expert and gate",
        _of(AiterSharedRoutedFusedMoERouter, num_fused_shared_experts=1),
        EXPERTS + 1,
    ),
    Built(
        "grouped sigmoid with bias",
        _of(
            GroupedTopKRouter,
            **GROUPS,
            scoring_func="sigmoid",
            e_score_correction_bias=GLM_BIAS,
            routed_scaling_factor=2.5,
        ),
        scaling=2.5,
        families=("DeepSeek-V3", "Nemotron-H"),
    ),
    Built("grouped softmax", _of(GroupedTopKRouter, **GROUPS, renormalize=False)),
    Built(
        "groups that do not divide",
        _of(GroupedTopKRouter, num_expert_group=5, topk_group=2, routed_scaling_factor=2.5),
    ),
    Built(
        "groups that do not divide, with bias",
        _of(
            GroupedTopKRouter,
            num_expert_group=5,
            topk_group=2,
            scoring_func="sigmoid",
            e_score_correction_bias=V3_BIAS,
            routed_scaling_factor=2.5,
        ),
        scaling=2.5,
    ),
    Built("custom", _of(CustomRoutingRouter, custom_routing_function=_COHERE)),
    Built(
        "LongCat",
        _of(
            ZeroExpertRouter,
            e_score_correction_bias=bias(0.0, 0.01, EXPERTS + ZERO_EXPERTS),
            num_logical_experts=EXPERTS,
            zero_expert_type="identity",
            routed_scaling_factor=6.0,
        ),
        EXPERTS + ZERO_EXPERTS,
        scaling=6.0,
        families=("LongCat-Flash",),
    ),
]


def stand_in_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let routers that end in a CUDA kernel run here, or in one that needs a CPU with AVX-512."""

    def topk(scoring: str) -> Callable[..., Any]:
        def run(weights: Any, ids: Any, _: Any, logits: torch.Tensor, renormalize: bool = False) -> Any:
            scores = logits.float().softmax(-1) if scoring == "softmax" else logits.float().sigmoid()
            best, chosen = scores.topk(weights.shape[1])
            weights.copy_(best / best.sum(-1, keepdim=True) if renormalize else best)
            ids.copy_(chosen)
            return weights, ids

        return run

    def no_kernel(use_rocm_aiter: bool = False) -> Any:
        return topk("softmax")

    # What it falls back to is vLLM's own routing in torch.
    ops = SimpleNamespace(is_fused_moe_enabled=lambda: True)
    monkeypatch.setattr(fused_topk_bias_router, "rocm_aiter_ops", ops)
    monkeypatch.setattr(fused_topk_bias_router, "_aiter_can_use_biased_grouped_topk", lambda *_: False)
    monkeypatch.setattr(fused_topk_router, "dispatch_topk_softmax_func", no_kernel)
    monkeypatch.setattr(
        fused_topk_router, "dispatch_topk_sigmoid_func", lambda use_rocm_aiter: topk("sigmoid")
    )
    eager = grouped_topk_router.grouped_topk._torchdynamo_orig_callable
    monkeypatch.setattr(grouped_topk_router, "grouped_topk", eager)
    monkeypatch.setattr(zero_expert_router, "zero_experts_compute_triton", _identity_experts)
    monkeypatch.setattr(
        "vllm.model_executor.models.gemma4.gemma4_fused_routing_kernel_triton",
        gemma4_routing_function_torch,
    )
    monkeypatch.setattr(AiterSharedRoutedFusedMoERouter, "_compute_routing", _shared_behind(topk))
    for name, stand_in in CPU_KERNELS.items():
        if not has_cpu_kernel(name):
            monkeypatch.setattr(cpu_router, name, stand_in)


def has_cpu_kernel(name: str) -> bool:
    return hasattr(torch.ops._C, name)


def _sqrtsoftplus(logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softplus(logits.float()).sqrt()


def _biased_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor,
    topk: int,
    renormalize: bool,
    scoring_func: str,
    num_fused_shared_experts: int,
    routed_scaling_factor: float,
    apply_routed_scaling_factor_on_output: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert renormalize
    assert apply_routed_scaling_factor_on_output
    assert (scoring_func, num_fused_shared_experts) == ("sqrtsoftplus", 0)
    scores = _sqrtsoftplus(gating_output)
    ids = (scores + correction_bias.float()).topk(topk).indices
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True) * routed_scaling_factor, ids.int()


def _hash_topk(
    gating_output: torch.Tensor,
    tid2eid: torch.Tensor,
    topk: int,
    scoring_func: str,
    num_fused_shared_experts: int,
    num_experts: int,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert (scoring_func, num_fused_shared_experts) == ("sqrtsoftplus", 0)
    weights = _sqrtsoftplus(gating_output).gather(1, tid2eid.long())
    return weights / weights.sum(-1, keepdim=True) * routed_scaling_factor, tid2eid.int()


CPU_KERNELS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "biased_topk_cpu": _biased_topk,
    "hash_topk_cpu": _hash_topk,
}
"""vLLM's, of AVX-512, and the same in torch."""


def _identity_experts(
    expert_indices: torch.Tensor,
    expert_scales: torch.Tensor,
    num_experts: int,
    zero_expert_type: str,
    hidden_states: torch.Tensor,
) -> torch.Tensor:
    share = expert_scales.masked_fill(expert_indices < num_experts, 0).sum(-1, keepdim=True)
    return hidden_states * share


def _shared_behind(topk: Callable[[str], Callable[..., Any]]) -> Callable[..., Any]:
    """ROCm's kernel: the routed experts, and behind them the shared one with a weight of its own."""

    def compute_routing(
        self: Any, hidden_states: Any, logits: torch.Tensor, indices_type: Any, *, input_ids: Any = None
    ) -> Any:
        routed, shared = logits[:, :-1], logits[:, -1:]
        rows = len(logits)
        weights, ids = topk("softmax")(
            torch.empty(rows, self.top_k),
            torch.empty(rows, self.top_k, dtype=torch.int32),
            None,
            routed,
            self.renormalize,
        )
        behind = torch.full((rows, 1), self.global_num_experts, dtype=ids.dtype)
        return torch.cat([weights, shared.sigmoid()], 1), torch.cat([ids, behind], 1)

    return compute_routing
