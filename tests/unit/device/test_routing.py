"""Routing under masks, for every family of routers, against a plain reading of what masks mean."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guard.device.mask import MaskedExperts
from guard.device.routing import route_masked
from guard.program.topology import MoELayer, Router
from tests.support.routing_oracle import Asked, choice_scores, chosen, gate_weights, groups_tie

GROUPED = {"num_groups": 8, "topk_groups": 4}


class Family(NamedTuple):
    name: str
    layer: MoELayer
    bias: tuple[float, float] | None = None  # offset, spread: as measured in published checkpoints


def family(
    name: str, experts: int, top_k: int, bias: tuple[float, float] | None = None, **router: object
) -> Family:
    facts = Router(has_bias=bias is not None, **router)  # type: ignore[arg-type]
    return Family(name, MoELayer(0, experts, top_k, facts), bias)


FAMILIES = [
    family("Qwen3-MoE", 128, 8),
    family("Mixtral", 8, 2),
    family("OLMoE", 64, 8, renormalize=False),
    family("DeepSeek-V2", 160, 6, renormalize=False, num_groups=8, topk_groups=3),
    family("DeepSeek-V3", 256, 8, (7.0, 0.12), scoring="sigmoid", **GROUPED),
    family("Kimi-K2", 384, 8, (34.5, 0.14), scoring="sigmoid"),
    family("MiniMax-M2", 256, 8, (7.0, 0.12), scoring="sigmoid"),
    family("ERNIE-4.5", 64, 6, (0.1, 0.05), scoring="softmax"),
    family("grouped softmax with bias", 64, 6, (10.2, 0.04), **GROUPED),
    family("Cohere2", 32, 4, scoring="sigmoid"),
    family("Llama 4", 16, 1, scoring="sigmoid", renormalize=False),
    family("Phi-3.5-MoE", 16, 2, renormalize=False, kind="sparsemixer"),
    family("DeepSeek-V4", 256, 6, (3.0, 0.2), scoring="sqrtsoftplus"),
    family("LongCat", 32, 4, (0.0, 0.01), renormalize=False, num_zero_experts=16),
]
BY_NAME = {member.name: member for member in FAMILIES}
every_family = pytest.mark.parametrize("member", FAMILIES, ids=lambda member: member.name)


def bias_of(member: Family, generator: np.random.Generator) -> torch.Tensor | None:
    if member.bias is None:
        return None
    offset, spread = member.bias
    columns = member.layer.num_experts + member.layer.router.num_zero_experts
    return torch.from_numpy(generator.uniform(-spread, spread, columns) + offset).float()


def random_ask(layer: MoELayer, generator: np.random.Generator) -> Asked:
    """Up to the most that may be rerouted, the other methods on some of the rest."""
    order = generator.permutation(layer.num_experts).tolist()
    most = layer.num_experts - layer.top_k
    rerouted = int(generator.integers(0, most + 1)) if generator.random() < 0.8 else most
    rest = order[rerouted:]
    cut = sorted(generator.integers(0, len(rest) + 1, 2).tolist())
    forced = int(generator.integers(0, layer.top_k + 1))
    renormed, dropped = rest[: cut[0]], rest[cut[0] : cut[1]]
    return Asked(
        frozenset(order[:rerouted]),
        frozenset(renormed),
        frozenset(dropped),
        frozenset(rest[cut[1] :][:forced]),
    )


def tensors(layer: MoELayer, asks: list[Asked]) -> MaskedExperts:
    def of(name: str) -> torch.Tensor:
        flags = torch.zeros((len(asks), layer.num_experts), dtype=torch.bool)
        for row, asked in enumerate(asks):
            flags[row, sorted(getattr(asked, name))] = True
        return flags

    return MaskedExperts(of("rerouted"), of("drop_renormed"), of("dropped"), of("forced"))


def check(layer: MoELayer, logits: torch.Tensor, asks: list[Asked], bias: torch.Tensor | None) -> None:
    check_routing(layer, logits, asks, bias, *route_masked(layer, logits, tensors(layer, asks), bias))


def check_routing(
    layer: MoELayer,
    logits: torch.Tensor,
    asks: list[Asked],
    bias: torch.Tensor | None,
    weights: torch.Tensor,
    ids: torch.Tensor,
) -> None:
    assert weights.isfinite().all()
    for row, asked in enumerate(asks):
        mine, gates = ids[row].tolist(), weights[row]
        choice = choice_scores(layer, logits[row], bias)
        expected = chosen(layer, choice, asked, bias)
        assert len(set(mine)) == len(mine)
        assert asked.rerouted.isdisjoint(mine)
        assert asked.forced <= set(mine)
        if not groups_tie(layer, choice, asked, bias):
            assert sorted(choice[e] for e in mine) == sorted(choice[e] for e in expected), "up to ties"
        for place, expert in enumerate(mine):
            if expert in asked.dropped | asked.drop_renormed:
                assert gates[place] == 0
        own = gate_weights(layer, logits[row], mine, asked)
        torch.testing.assert_close(gates.double(), torch.tensor(own).double(), rtol=2e-5, atol=1e-7)


@every_family
@settings(max_examples=25)
@example(seed=3418, mean=0.0, spread=20.0)  # two groups of equal score
@given(
    seed=st.integers(0, 2**32 - 1),
    mean=st.sampled_from([0.0, -2.0, -6.0, -60.0]),
    spread=st.sampled_from([0.05, 1.0, 20.0]),
)
def test_any_mix_of_methods_routes_as_the_language_says(
    member: Family, seed: int, mean: float, spread: float
) -> None:
    generator = np.random.default_rng(seed)
    layer = member.layer
    columns = layer.num_experts + layer.router.num_zero_experts
    logits = torch.from_numpy(generator.normal(mean, spread, (6, columns))).float()
    asks = [random_ask(layer, generator) for _ in range(5)] + [Asked()]
    check(layer, logits, asks, bias_of(member, generator))
