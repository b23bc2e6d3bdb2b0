"""Ways of masking that fail on real routers, each shown on vLLM's own routing, and that ours does not.

The failures are those of published experience: masks through the logits, or through the bias.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.router.cpu_router import _grouped_topk, _softmax_topk
from vllm.model_executor.models.gemma4 import gemma4_routing_function_torch
from vllm.model_executor.models.llama4 import Llama4MoE
from vllm.model_executor.models.phimoe import sparsemixer

from guard.device.mask import MaskedExperts
from guard.device.routing import Routing, route_masked
from guard.program.topology import MoELayer, Router

Pair = tuple[torch.Tensor, torch.Tensor]
BIASED = Router(scoring="sigmoid", has_bias=True)


def rerouted(
    router: Router,
    top_k: int,
    logits: torch.Tensor,
    masked_TE: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> Routing:
    masked_TE = masked_TE.expand_as(logits)
    nobody = torch.zeros_like(masked_TE)
    layer = MoELayer(0, logits.shape[1], top_k, router)
    return route_masked(layer, logits, MaskedExperts(masked_TE, nobody, nobody, nobody), bias)


def stock(logits: torch.Tensor, top_k: int, bias: torch.Tensor, groups: int = 1, keep: int = 1) -> Pair:
    """vLLM's grouped routing of sigmoid scores: weights, ids."""
    weights, ids = _grouped_topk(logits, top_k, True, groups, keep, "sigmoid", 1.0, bias)
    return weights, ids


def only(*experts: int, of: int) -> torch.Tensor:
    """A mask of all but these."""
    masked = torch.ones(1, of, dtype=torch.bool)
    masked[0, list(experts)] = False
    return masked


def uses(weights: torch.Tensor, ids: torch.Tensor, masked_TE: torch.Tensor) -> torch.Tensor:
    """[T, k] where a masked expert has weight."""
    return masked_TE.expand(len(ids), -1).gather(1, ids.long()) & (weights != 0)


def seeded(*shape: int, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) + mean


def test_with_all_masked_softmax_gives_no_numbers_and_ours_no_weight() -> None:
    logits, masked = seeded(4, 8), torch.ones(1, 8, dtype=torch.bool)
    minus = torch.full_like(logits, -math.inf)
    assert _softmax_topk(minus, 2, True)[0].isnan().all()
    assert gemma4_routing_function_torch(minus, 2, torch.ones(8))[0].isnan().all()

    for renormalize in (True, False):
        routing = rerouted(Router(renormalize=renormalize), 2, logits, masked)
        assert (routing.gate_weights_TK == 0).all()
        assert (routing.topk_ids_TK.diff(dim=1) != 0).all(), "no expert twice"


def test_with_fewer_live_than_k_the_masked_fillers_carry_no_weight() -> None:
    logits, masked = seeded(4, 8), only(5, of=8)

    weights, ids = rerouted(Router(), 2, logits, masked)

    assert (ids[:, 0] == 5).all()
    assert weights.tolist() == [[1.0, 0.0]] * 4


def test_sparsemixer_with_one_live_expert_gives_no_number_and_ours_no_weight() -> None:
    logits, masked = seeded(4, 8), only(5, of=8)
    assert sparsemixer(logits.masked_fill(masked, -math.inf))[0].isnan().any()

    router = Router(kind="sparsemixer", renormalize=False)
    weights, ids = rerouted(router, 2, logits, masked)

    assert (ids[:, 0] == 5).all()
    assert weights.tolist() == [[1.0, 0.0]] * 4


def test_llama4_with_all_masked_chooses_without_weight() -> None:
    logits, masked = seeded(4, 8), torch.ones(1, 8, dtype=torch.bool)
    minus = torch.full_like(logits, -math.inf)
    weights, _ = Llama4MoE.custom_routing_function(logits, minus, 1, False)
    assert (weights == 0).all()

    routing = rerouted(Router(scoring="sigmoid", renormalize=False), 1, logits, masked)

    assert (routing.gate_weights_TK == 0).all()


def test_a_logit_of_minus_infinity_does_not_unselect_an_expert_under_a_bias() -> None:
    logits, bias = seeded(16, 8), torch.zeros(8)
    bias[3] = 0.9
    masked = ~only(3, of=8)
    _, ids = stock(logits.masked_fill(masked, -math.inf), 2, bias)
    assert (ids == 3).any()

    _, ids = rerouted(BIASED, 2, logits, masked, bias)

    assert (ids != 3).all()


@pytest.mark.parametrize("mean", [0.0, -2.0, -4.0, -6.0, -30.0])
@pytest.mark.parametrize(("offset", "spread"), [(7.0, 0.12), (34.5, 0.14)])
def test_under_real_biases_the_masked_are_those_that_win_by_it(
    mean: float, offset: float, spread: float
) -> None:
    bias = offset + (torch.rand(256, generator=torch.Generator().manual_seed(2)) * 2 - 1) * spread
    logits = seeded(200, 256, mean=mean)
    masked = torch.zeros(1, 256, dtype=torch.bool).scatter(1, bias.topk(12).indices[None], True)
    if mean <= -6:
        _, ids = stock(logits.masked_fill(masked, -1e4), 8, bias)
        share = masked.expand(200, -1).gather(1, ids.long()).float().mean()
        assert share > 0.5, "most places go to masked experts"

    weights, ids = rerouted(BIASED, 8, logits, masked, bias)

    assert not masked.expand(200, -1).gather(1, ids).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(200))


def test_a_bias_of_minus_infinity_makes_the_one_live_expert_of_a_group_unreachable() -> None:
    logits = torch.tensor([[9.0, 0.0, 1.0, 1.0, 0.5, 0.5, 0.2, 0.2]])
    masked, bias = ~only(1, of=8), torch.zeros(8)
    router = Router(scoring="sigmoid", has_bias=True, num_groups=4, topk_groups=3)
    _, ids = stock(logits, 3, bias.masked_fill(masked[0], -math.inf), 4, 3)
    assert 0 not in ids.tolist()[0], "the best live expert of all"

    # Its group has one live expert, and stands against groups of two weak ones.
    strong = torch.tensor([[30.0, 0.0, -9.0, -9.0, -9.0, -9.0, -9.0, -9.0]])
    _, ids = rerouted(router, 3, strong, masked, torch.tensor([1.5] + [0.0] * 7))

    assert 0 in ids.tolist()[0]
    assert 1 not in ids.tolist()[0]


@pytest.mark.parametrize("low", [-math.inf, -1e4])
def test_where_every_group_has_one_live_expert_a_low_bias_runs_a_masked_one(low: float) -> None:
    logits = seeded(32, 8)
    masked = torch.tensor([[False, True] * 4])
    bias = torch.full((8,), 7.0)
    weights, ids = stock(logits, 3, bias.masked_fill(masked[0], low), 4, 2)
    assert uses(weights, ids, masked).any()

    router = Router(scoring="sigmoid", has_bias=True, num_groups=4, topk_groups=2)
    weights, ids = rerouted(router, 3, logits, masked, bias)

    assert not masked.expand(32, -1).gather(1, ids).any(), "the next best group gives the third"
    best = logits.masked_fill(masked, -math.inf).argmax(dim=1, keepdim=True)
    assert (ids == best).any(dim=1).all()


def test_one_live_expert_in_all_is_all_that_works() -> None:
    logits, masked, bias = seeded(8, 8), only(2, of=8), torch.zeros(8)
    weights, ids = stock(logits, 3, bias.masked_fill(masked[0], -math.inf))
    assert uses(weights, ids, masked).any()

    weights, ids = rerouted(BIASED, 3, logits, masked, bias)

    assert not uses(weights, ids, masked).any()
    assert (weights[ids == 2] == 1).all()


def test_nothing_live_gives_no_weight_under_a_bias() -> None:
    routing = rerouted(BIASED, 3, seeded(8, 8), only(of=8), torch.zeros(8))

    assert (routing.gate_weights_TK == 0).all()


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.93])
def test_deepseek_routes_around_any_share_of_its_experts(share: float) -> None:
    generator = torch.Generator().manual_seed(3)
    masked = torch.rand((300, 256), generator=generator).argsort(1) < int(share * 256)
    bias = 7 + (torch.rand(256, generator=generator) * 2 - 1) * 0.12
    logits = seeded(300, 256, mean=-6.0)
    if share == 0.9:
        _, ids = stock(logits.masked_fill(masked, -1e4), 8, bias, 8, 4)
        assert masked.gather(1, ids.long()).any(), "masked through the logits alone"

    router = Router(scoring="sigmoid", has_bias=True, num_groups=8, topk_groups=4)
    weights, ids = rerouted(router, 8, logits, masked, bias)

    assert not masked.gather(1, ids).any()
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all(), "no expert twice"
    torch.testing.assert_close(weights.sum(-1), torch.ones(300))


def test_a_whole_group_may_be_masked() -> None:
    masked = torch.tensor([[True, True] + [False] * 6])
    router = Router(scoring="sigmoid", has_bias=True, num_groups=4, topk_groups=2)

    weights, ids = rerouted(router, 3, seeded(32, 8), masked, torch.full((8,), 34.5))

    assert (ids >= 2).all()
    assert (ids // 2).sort(dim=1).values.diff(dim=1).ne(0).sum(dim=1).eq(1).all(), "two groups"
    torch.testing.assert_close(weights.sum(-1), torch.ones(32))


def test_negative_choice_scores_do_not_lose_to_what_is_masked() -> None:
    """Masked with 0 behind the sigmoid, an expert beats every live one of negative score."""
    bias, masked = torch.full((8,), -3.0), ~only(3, of=8)

    _, ids = rerouted(BIASED, 2, seeded(16, 8), masked, bias)

    assert (ids != 3).all()


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"num_groups": 2}, {"scoring": "sigmoid"}, {"renormalize": False}], ids=str
)
@pytest.mark.parametrize("everywhere", [False, True])
def test_logits_that_are_no_numbers_never_bring_a_masked_expert_back(
    broken: float, options: dict[str, Any], everywhere: bool
) -> None:
    """vLLM's kernels then take the first k experts, so these are the ones masked here."""
    logits, masked = seeded(4, 8), torch.tensor([[True, True] + [False] * 6])
    logits[:, slice(None) if everywhere else slice(4)] = broken

    weights, ids = rerouted(Router(**options), 2, logits, masked)

    assert (ids >= 2).all()
    assert (ids[:, 0] != ids[:, 1]).all()
    assert weights.isfinite().all()
    if not everywhere and broken != math.inf:
        assert (ids >= 4).all(), "those that have a number are chosen"
        assert (weights > 0).all()


@pytest.mark.parametrize("router", [Router(), BIASED, Router(scoring="sigmoid")], ids=str)
def test_masking_all_the_strong_experts_leaves_weights_that_add_up(router: Router) -> None:
    """Their scores underflow to 0 beside the strong ones, but not what they are to each other."""
    logits = torch.full((4, 8), -200.0) + seeded(4, 8)
    logits[:, :2] = 200.0
    bias = torch.full((8,), 7.0) if router.has_bias else None

    weights, ids = rerouted(router, 3, logits, torch.tensor([[True, True] + [False] * 6]), bias)

    expected = logits.gather(1, ids).softmax(-1)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


def test_a_family_without_renormalisation_does_not_inflate_the_survivors() -> None:
    logits, masked = seeded(16, 8), ~only(0, of=8)
    inflated, _ = _softmax_topk(logits.masked_fill(masked, -math.inf), 3, False)

    weights, ids = rerouted(Router(renormalize=False), 3, logits, masked)

    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, ids))
    assert (inflated.sum(-1) > weights.sum(-1)).all()


def test_in_half_precision_the_masked_are_told_apart_all_the_same() -> None:
    logits = seeded(64, 256).to(torch.bfloat16)
    masked = torch.zeros((64, 256), dtype=torch.bool).scatter(1, logits.topk(248).indices, True)

    _, ids = rerouted(Router(), 8, logits, masked)

    assert not masked.gather(1, ids).any()
