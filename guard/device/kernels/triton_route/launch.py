"""`moe_guard::route_on_gpu`: one launch."""

from __future__ import annotations

import torch
import triton

from guard.device.kernels.triton_route.kernel import route_kernel

_WARPS = 2


def route(
    router_logits: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    row_bits_TW: torch.Tensor,
    expert_bits_LEW: torch.Tensor,
    method_bits_MW: torch.Tensor,
    tap_ids_TLK: torch.Tensor,
    tap_weights_TLK: torch.Tensor,
    layer: int,
    top_k: int,
    num_experts: int,
    scoring: int,
    renormalize: bool,
    num_groups: int,
    topk_groups: int,
    scaling: float,
    bias: torch.Tensor | None,
) -> None:
    """As `LayerRouting.apply`, given the whole of tap and mask. Waits for nothing, so that CUDA graphs
    can capture it."""
    num_rows, is_masking = len(topk_ids), len(row_bits_TW) > 0
    if not num_rows:
        return
    assert topk_weights.stride(1) == topk_ids.stride(1) == 1, "rows must be contiguous"
    if router_logits.stride(1) != 1:
        router_logits = router_logits.contiguous()
    biases = topk_weights if bias is None else bias.float().contiguous()
    route_kernel[(num_rows,)](
        router_logits,
        topk_weights,
        topk_ids,
        row_bits_TW,
        expert_bits_LEW[layer] if is_masking else expert_bits_LEW,
        method_bits_MW,
        tap_ids_TLK[:, layer],
        tap_weights_TLK[:, layer],
        biases,
        router_logits.stride(0),
        topk_weights.stride(0),
        topk_ids.stride(0),
        tap_ids_TLK.stride(0),
        biases.stride(0) if bias is not None and bias.dim() == 2 else 0,
        row_bits_TW.shape[1],
        scaling,
        TOP_K=top_k,
        NUM_EXPERTS=num_experts,
        SCORING=scoring,
        RENORMALIZE=renormalize,
        NUM_GROUPS=num_groups,
        TOPK_GROUPS=topk_groups,
        HAS_BIAS=bias is not None,
        IS_MASKING=is_masking,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_K=triton.next_power_of_2(top_k),
        BLOCK_G=triton.next_power_of_2(num_groups),
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
