"""What a router must choose under masks, one row at a time, in plain Python: slow and plain.

Choice scores are float32, as routers have them, so that ties are the routers' own; weights float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from guard.program.topology import MoELayer


@dataclass(frozen=True)
class Asked:
    rerouted: frozenset[int] = frozenset()
    drop_renormed: frozenset[int] = frozenset()
    dropped: frozenset[int] = frozenset()
    forced: frozenset[int] = frozenset()


def choice_scores(layer: MoELayer, logits_E: torch.Tensor, bias_E: torch.Tensor | None) -> list[float]:
    logits_E = logits_E.float()
    if bias_E is None:
        return [float(z) for z in logits_E]
    match layer.router.scoring:
        case "softmax":
            scores = logits_E.softmax(-1)
        case "sigmoid":
            scores = logits_E.sigmoid()
        case _:
            scores = torch.nn.functional.softplus(logits_E).sqrt()
    return [float(c) for c in scores + bias_E]


def chosen(
    layer: MoELayer, choice: Sequence[float], asked: Asked, bias_E: torch.Tensor | None
) -> list[int]:
    """The k experts, best first, of those that masks leave."""
    live = [e for e in range(len(choice)) if e not in asked.rerouted]
    kept = _in_kept_groups(layer, choice, asked, bias_E)
    ranked = sorted(live, key=lambda e: (e not in asked.forced, e not in kept, -choice[e]))
    return ranked[: layer.top_k]


def _in_kept_groups(
    layer: MoELayer, choice: Sequence[float], asked: Asked, bias_E: torch.Tensor | None
) -> Collection[int]:
    if layer.router.num_groups == 1:
        return range(len(choice))
    scores = _group_scores(layer, choice, asked, bias_E)
    best = sorted(range(len(scores)), key=lambda g: -scores[g])[: layer.router.topk_groups]
    size = len(choice) // layer.router.num_groups
    return {e for g in best for e in range(g * size, (g + 1) * size)}


def groups_tie(
    layer: MoELayer, choice: Sequence[float], asked: Asked, bias_E: torch.Tensor | None
) -> bool:
    """Whether a group that is kept scores as much as one that is not, so that either may be."""
    router = layer.router
    if router.num_groups in (1, router.topk_groups):
        return False
    scores = sorted(_group_scores(layer, choice, asked, bias_E), reverse=True)
    return scores[router.topk_groups - 1] == scores[router.topk_groups]


def _group_scores(
    layer: MoELayer, choice: Sequence[float], asked: Asked, bias_E: torch.Tensor | None
) -> list[float]:
    size = len(choice) // layer.router.num_groups

    def score(first: int) -> float:
        group = range(first, first + size)
        live = sorted((choice[e] for e in group if e not in asked.rerouted), reverse=True)
        if bias_E is None:
            return live[0] if live else -math.inf
        filler = float(bias_E.min() - 1)
        best, second = [*live, filler, filler][:2]
        return float(torch.tensor(best) + torch.tensor(second))

    return [score(g * size) for g in range(layer.router.num_groups)]


def gate_weights(
    layer: MoELayer, logits_E: torch.Tensor, ids: Sequence[int], asked: Asked
) -> list[float]:
    z = [float(v) for v in logits_E.double()]
    router = layer.router
    if router.kind == "sparsemixer":
        own = _sparsemixer(z, ids, asked)
        logs = {e: math.log(own[e]) for e in ids}
    else:
        logs = {e: _log_score(router.scoring, z, e) for e in ids}
    top = max(logs.values())
    shares = {e: math.exp(logs[e] - top) for e in ids}
    weights = {
        e: shares[e] / sum(shares.values()) if router.renormalize else math.exp(logs[e]) for e in ids
    }
    before = sum(w for e, w in weights.items() if e not in asked.dropped)
    left = {e: logs[e] for e in ids if e not in asked.dropped and e not in asked.drop_renormed}
    if any(e in asked.drop_renormed for e in ids):
        top = max(left.values(), default=0.0)
        total = sum(math.exp(v - top) for v in left.values())
        weights = {e: math.exp(v - top) / total * before for e, v in left.items()}
    return [weights.get(e, 0.0) if e in left else 0.0 for e in ids]


def _log_score(scoring: str, z: Sequence[float], e: int) -> float:
    if scoring == "softmax":
        top = max(z)
        return z[e] - top - math.log(sum(math.exp(v - top) for v in z))
    log_softplus = math.log(math.log1p(math.exp(-abs(z[e]))) + max(z[e], 0.0)) if z[e] > -30 else z[e]
    if scoring == "sqrtsoftplus":
        return log_softplus / 2
    return min(z[e], 0.0) - math.log1p(math.exp(-abs(z[e])))


def _sparsemixer(z: Sequence[float], ids: Sequence[int], asked: Asked) -> dict[int, float]:
    pool = {e for e in range(len(z)) if e not in asked.rerouted}
    weights = {}
    for e in sorted(ids, key=lambda e: -z[e]):
        near = [j for j in pool if j == e or (z[e] - z[j]) / max(abs(z[j]), z[e]) <= 0.02]
        weights[e] = 1 / sum(math.exp(z[j] - z[e]) for j in near)
        pool.discard(e)
    return weights
