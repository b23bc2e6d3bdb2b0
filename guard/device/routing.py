"""What a router chooses under masks: computed from its logits, for every row, without a branch.

A row's experts fall into four tiers, and the k are taken from the highest ones: forced experts, then
live experts of the groups that the router keeps, then other live experts, last those that are
rerouted. So a rerouted expert is chosen only where fewer than k others exist, which the compiler
refuses, and has no weight even then. Inside a tier the family's own selection score decides, in
float32 as the routers compute it.

Weights are kept as logarithms until the end. A renormalised weight is then a softmax over the chosen
ones, which equals score over sum, and holds where the scores themselves underflow because a mask
took all the strong experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid, pad, softplus

from guard.device.mask import MaskedExperts
from guard.program.topology import MoELayer, Router

SPARSEMIXER_JITTER = 0.01
"""Experts further than twice this share behind the best do not enter sparsemixer's softmax; fixed in
the code of Phi-3.5-MoE, and in vLLM's."""

SOFTPLUS_IS_EXP_BELOW = -20.0
"""Here softplus(z) is exp(z) in float32, and its logarithm is z."""

_FLOAT_MAX = torch.finfo(torch.float32).max
_NEVER = float("-inf")
_TIER = 1 << 33  # more than any two float32, read as ordered whole numbers, lie apart


class Routing(NamedTuple):
    """gate_weights_TK: float32, renormalised where the family does, before any routed scaling; 0 for
        what is dropped
    topk_ids_TK: int64, forced and best ones first; ids from `num_experts` on are zero experts
    """

    gate_weights_TK: torch.Tensor
    topk_ids_TK: torch.Tensor


def route_masked(
    layer: MoELayer,
    router_logits: torch.Tensor,
    masked: MaskedExperts,
    bias: torch.Tensor | None = None,
) -> Routing:
    """Route every row under its masks. Dynamo traces it; nothing waits for the device.

    router_logits: [T, num_experts + num_zero_experts], any float; further columns are not routed
    masked: this layer's, [T, num_experts]
    bias: [E] or [T, E], the correction that is added to the scores for the choice alone; given where
        and only where `layer.router.has_bias`
    """
    router = layer.router
    assert (bias is not None) == router.has_bias, "the correction bias is part of the family"
    if router.num_zero_experts:
        masked = MaskedExperts(*(pad(m_TE, (0, router.num_zero_experts)) for m_TE in masked))
    own_logits = router_logits[:, : layer.num_experts + router.num_zero_experts]
    logits_TE = own_logits.float().nan_to_num(_NEVER, _FLOAT_MAX, _NEVER)
    choice_TE = logits_TE if bias is None else _scores(router, logits_TE) + bias.float()
    topk_ids = _choose(layer, choice_TE, masked, bias)
    if router.kind == "sparsemixer":
        log_weights_TK, topk_ids = _sparsemixer(own_logits, logits_TE, masked, topk_ids)
    else:
        log_weights_TK = _log_scores(router, logits_TE).gather(1, topk_ids)
    gate_weights_TK = _gate_weights(router, log_weights_TK, masked, topk_ids)
    return Routing(gate_weights_TK, topk_ids)


def _scores(router: Router, logits_TE: torch.Tensor) -> torch.Tensor:
    match router.scoring:
        case "softmax":
            return logits_TE.softmax(dim=-1).nan_to_num(0.0)
        case "sigmoid":
            return logits_TE.sigmoid()
        case "sqrtsoftplus":
            return softplus(logits_TE).sqrt()
    raise AssertionError(f"no such scoring function: {router.scoring}")


def _log_scores(router: Router, logits_TE: torch.Tensor) -> torch.Tensor:
    match router.scoring:
        case "softmax":  # renormalised, its denominator falls out
            return logits_TE if router.renormalize else logits_TE.log_softmax(dim=-1)
        case "sigmoid":
            return logsigmoid(logits_TE)
        case "sqrtsoftplus":
            is_exp_TE = logits_TE < SOFTPLUS_IS_EXP_BELOW
            return 0.5 * torch.where(is_exp_TE, logits_TE, softplus(logits_TE).log())
    raise AssertionError(f"no such scoring function: {router.scoring}")


def _choose(
    layer: MoELayer,
    choice_TE: torch.Tensor,
    masked: MaskedExperts,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """int64 [T, k]: the best of the highest tiers. Scores compare as whole numbers, so that neither
    an infinite score nor the size of the offset between tiers can blur the order."""
    key_TE = _ordered(choice_TE)
    tier_TE = (~masked.rerouted_TE).to(torch.int64) + 2 * masked.forced_TE.to(torch.int64)
    if layer.router.num_groups > 1:
        tier_TE = 2 * tier_TE
        in_kept_TE = _in_kept_groups(layer.router, choice_TE, masked.rerouted_TE, bias)
        tier_TE = tier_TE + (in_kept_TE & ~masked.rerouted_TE).to(torch.int64)
    return (key_TE + tier_TE * _TIER).topk(layer.top_k, dim=-1).indices


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """int64 in the order of the floats: the bits of a negative one count backwards."""
    bits = values.contiguous().view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)


def _in_kept_groups(
    router: Router,
    choice_TE: torch.Tensor,
    rerouted_TE: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """bool [T, E]: in one of the `topk_groups` groups with the highest score, which is the best live
    expert's, or under a bias the sum of the two best.

    In a sum a rerouted expert stands below every live one, but finitely so, that a group with one
    live expert can still be reached: at the least bias, less 1.
    """
    num_rows, num_experts = choice_TE.shape
    by_group = (num_rows, router.num_groups, num_experts // router.num_groups)
    if bias is None:
        live_TE = choice_TE.masked_fill(rerouted_TE, _NEVER)
        group_score_TG = live_TE.view(by_group).amax(dim=-1)
    else:
        lowest = bias.float().amin(dim=-1, keepdim=True) - 1.0
        live_TE = torch.where(rerouted_TE, lowest, choice_TE)
        group_score_TG = live_TE.view(by_group).topk(2, dim=-1).values.sum(dim=-1)
    kept = group_score_TG.topk(router.topk_groups, dim=-1).indices
    is_kept_TG = torch.zeros_like(group_score_TG, dtype=torch.bool).scatter(1, kept, True)
    return is_kept_TG.unsqueeze(-1).expand(by_group).reshape(num_rows, num_experts)


def _sparsemixer(
    own_logits: torch.Tensor,
    logits_TE: torch.Tensor,
    masked: MaskedExperts,
    topk_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-weights [T, 2] of the chosen two, and their ids by descending logit.

    Each is weighed by a softmax over the live experts near to it, the second one without the first.
    Nearness is measured in the logits' own precision, as the model's code does.
    """
    pool_TE = logits_TE.masked_fill(masked.rerouted_TE, _NEVER)
    pair_T2, order_T2 = pool_TE.gather(1, topk_ids).sort(dim=-1, descending=True)
    topk_ids = topk_ids.gather(1, order_T2)
    log_weights = []
    for nth in range(2):
        pivot_T1 = own_logits.gather(1, topk_ids[:, nth : nth + 1])
        reach_TE = torch.maximum(own_logits.abs(), pivot_T1)
        is_far_TE = (pivot_T1 - own_logits) / reach_TE > 2 * SPARSEMIXER_JITTER
        near_TE = pool_TE.masked_fill(is_far_TE, _NEVER)
        log_weights.append(pair_T2[:, nth] - near_TE.logsumexp(dim=-1))
        pool_TE = pool_TE.scatter(1, topk_ids[:, nth : nth + 1], _NEVER)
    return torch.stack(log_weights, dim=1), topk_ids


def _gate_weights(
    router: Router, log_weights_TK: torch.Tensor, masked: MaskedExperts, topk_ids: torch.Tensor
) -> torch.Tensor:
    """Weights of the chosen, without those that are rerouted all the same or dropped.

    Both ways of dropping on one row: `drop` takes its experts' weights away, and `drop_renorm` hands
    what its experts had to those that are left.
    """
    log_weights_TK = log_weights_TK.masked_fill(masked.rerouted_TE.gather(1, topk_ids), _NEVER)
    weights_TK = log_weights_TK.softmax(dim=-1) if router.renormalize else log_weights_TK.exp()
    dropped_TK = masked.dropped_TE.gather(1, topk_ids)
    renormed_TK = masked.drop_renormed_TE.gather(1, topk_ids)
    weights_TK = weights_TK.masked_fill(dropped_TK, 0.0)
    left_TK = log_weights_TK.masked_fill(dropped_TK | renormed_TK, _NEVER).softmax(dim=-1)
    restored_TK = left_TK * weights_TK.sum(dim=-1, keepdim=True)
    is_restored_T1 = renormed_TK.any(dim=-1, keepdim=True)
    return torch.where(is_restored_T1, restored_TK, weights_TK).nan_to_num(0.0)
