"""The slow, exact router: what one row must be routed to under its masks, and nothing clever.

It is the oracle for masked routing on the device and shares no code with it: plain loops over experts,
in decimals of 60 digits, so that nothing underflows. What masks mean is the policy language's text; how
a family chooses and weighs is its paper's or its model code's:

- softmax, top-k, renormalised or not: Mixtral (arXiv 2401.04088), OLMoE (arXiv 2409.02060); top-k then
  softmax (gpt-oss's model code) is the renormalised one, for exp(z) / sum of the chosen is both
- group-limited choice by the best expert of a group: DeepSeek-V2 (arXiv 2405.04434, section 2.2.2)
- sigmoid with a bias for the choice alone, groups by the sum of their two best: DeepSeek-V3 (arXiv
  2412.19437, section 2.1.2, and its model code)
- softmax with such a bias: ERNIE 4.5's model code; with zero experts behind the routed ones:
  LongCat-Flash (arXiv 2509.01322)
- square root of softplus: DeepSeek-V4's model code
- sigmoid of the best logit: Llama 4's model code
- sparsemixer at inference: Phi-3.5-MoE's model code, after arXiv 2310.00811
- a factor for each expert behind renormalisation: Gemma 4's model code
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from decimal import Decimal, localcontext
from typing import Final

from guard.program.topology import Router

DIGITS: Final = 60
SPARSEMIXER_THRESHOLD: Final = Decimal("0.02")
"""Twice the jitter of 0.01 in Phi-3.5-MoE's configuration: who is further behind takes no part."""

_LINEAR_BELOW: Final = Decimal("1e-40")


def route(
    logits: Sequence[float],
    router: Router,
    top_k: int,
    *,
    bias: Sequence[float] | None = None,
    expert_scale: Sequence[float] | None = None,
    rerouted: Collection[int] = (),
    drop_renormed: Collection[int] = (),
    dropped: Collection[int] = (),
    forced: Collection[int] = (),
) -> list[tuple[int, float]]:
    """The k experts of one row with their gate weights, in the order in which they are taken.

    logits: of the routed experts, and behind them of the zero experts
    bias: for the choice alone, one for each logit
    expert_scale: what an expert's weight is multiplied by in the end
    An expert of several lists is treated by the first that has it. One that is dropped is in the
    result with weight 0.

    Raises:
        ValueError: where masks leave fewer than k experts to choose from, or force more; the compiler
            refuses such masks.
    """
    out = set(rerouted)
    renormed = set(drop_renormed) - out
    gone = set(dropped) - out - renormed
    kept_in = set(forced) - out - renormed - gone
    with localcontext() as context:
        context.prec = DIGITS
        z = [Decimal(logit) for logit in logits]
        scores = _scores(router.scoring, z)
        # Without a bias the order of the scores is that of the logits.
        choice = z if bias is None else [s + Decimal(b) for s, b in zip(scores, bias, strict=True)]
        chosen = _choose(choice, router, top_k, bias, out, kept_in)

        if router.kind == "sparsemixer":
            chosen, weights = _sparsemixer(z, chosen, out)
        else:
            weights = {expert: scores[expert] for expert in chosen}
        if router.renormalize:
            total = sum(weights.values())
            weights = {expert: weight / total for expert, weight in weights.items()}
        weights = _drop(weights, renormed, gone)
        scale = [Decimal(s) for s in expert_scale] if expert_scale else [Decimal(1)] * len(z)
        return [(expert, float(weights[expert] * scale[expert])) for expert in chosen]


def _scores(scoring: str, z: list[Decimal]) -> list[Decimal]:
    match scoring:
        case "softmax":
            exponentials = [logit.exp() for logit in z]
            return [e / sum(exponentials) for e in exponentials]
        case "sigmoid":
            return [1 / (1 + (-logit).exp()) for logit in z]
        case "sqrtsoftplus":
            return [_softplus(logit).sqrt() for logit in z]
    raise ValueError(f"no family scores by {scoring!r}; use softmax, sigmoid or sqrtsoftplus")


def _softplus(logit: Decimal) -> Decimal:
    exponential = logit.exp()
    return exponential if exponential < _LINEAR_BELOW else (1 + exponential).ln()


def _choose(
    choice: list[Decimal],
    router: Router,
    top_k: int,
    bias: Sequence[float] | None,
    rerouted: set[int],
    forced: set[int],
) -> list[int]:
    """Forced experts, then the best of those that are left; the lower id of equals."""
    if len(forced) > top_k:
        raise ValueError(f"{len(forced)} experts are forced, but {top_k} are chosen")
    in_kept_groups = _in_kept_groups(choice, router, bias, rerouted)
    candidates = [
        expert
        for expert in range(len(choice))
        if expert in forced or (expert not in rerouted and expert in in_kept_groups)
    ]
    if len(candidates) < top_k:
        raise ValueError(f"{len(candidates)} experts are left, but {top_k} are chosen")
    candidates.sort(key=lambda expert: (expert not in forced, -choice[expert], expert))
    return candidates[:top_k]


def _in_kept_groups(
    choice: list[Decimal],
    router: Router,
    bias: Sequence[float] | None,
    rerouted: set[int],
) -> set[int]:
    """A group without a live expert is kept after all others; in a sum of two best, a rerouted expert
    stands for the least bias less 1, which is below every live one, and lets a group of one be kept."""
    size = len(choice) // router.num_groups
    scored = []
    for number in range(router.num_groups):
        group = range(number * size, (number + 1) * size)
        live = sorted((choice[expert] for expert in group if expert not in rerouted), reverse=True)
        if router.num_groups == 1:
            score = Decimal(0)
        elif bias is None:
            score = live[0] if live else Decimal("-Infinity")
        else:
            lowest = Decimal(min(bias)) - 1
            score = sum([*live, lowest, lowest][:2], start=Decimal(0))
        scored.append((not live, -score, number, group))
    scored.sort()
    if router.num_groups == 1:
        return set(range(len(choice)))
    return {expert for _, _, _, group in scored[: router.topk_groups] for expert in group}


def _sparsemixer(
    z: list[Decimal], chosen: list[int], rerouted: set[int]
) -> tuple[list[int], dict[int, Decimal]]:
    """A pass for each expert, the best first: a softmax over the live experts that are near to it, of
    which the next pass has one less."""
    in_order = sorted(chosen, key=lambda expert: (-z[expert], expert))
    pool = {expert for expert in range(len(z)) if expert not in rerouted}
    weights = {}
    for expert in in_order:
        near = [other for other in pool if _is_near(z[expert], z[other])]
        weights[expert] = z[expert].exp() / sum(z[other].exp() for other in near)
        pool.remove(expert)
    return in_order, weights


def _is_near(pivot: Decimal, other: Decimal) -> bool:
    behind = pivot - other
    return behind <= 0 or behind / max(abs(other), pivot) <= SPARSEMIXER_THRESHOLD


def _drop(weights: dict[int, Decimal], renormed: set[int], gone: set[int]) -> dict[int, Decimal]:
    """`drop` loses its experts' weight; `drop_renorm` shares its experts' out among those left, in
    proportion, or loses it too where nothing is left."""
    left = {e: w for e, w in weights.items() if e not in renormed and e not in gone}
    to_share = sum(w for e, w in weights.items() if e in renormed)
    total = sum(left.values())
    if total:
        left = {expert: weight + to_share * weight / total for expert, weight in left.items()}
    return {expert: left.get(expert, Decimal(0)) for expert in weights}
