"""Mask and tap of a layer as one operation: what it must give is what torch gives, row by row.

With `TRITON_INTERPRET=1` the same holds for the GPU's kernel (`test_triton_route.py`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

from guard.device.kernels.layer_routing import make_layer_routing
from guard.device.layout import Capacity
from guard.device.tap import RoutingTap
from guard.program.topology import MoELayer, Router, Topology
from tests.support.route_layer import (
    CPU,
    IS_INTERPRETED,
    SCALING,
    apply,
    make_routing,
    route_layer,
    stock_choice,
)
from tests.support.routing_oracle import Asked
from tests.unit.device.test_routing import FAMILIES, Family, bias_of, check_routing, random_ask

COVERED = [
    member
    for member in FAMILIES
    if member.layer.router.kind == "topk" and not member.layer.router.num_zero_experts
]
every_covered_family = pytest.mark.parametrize("member", COVERED, ids=lambda member: member.name)
ASKED = Asked(frozenset({0}), frozenset({1}), frozenset({2}), frozenset({3}))


@every_covered_family
@settings(max_examples=4 if IS_INTERPRETED else 25)
@given(
    seed=st.integers(0, 2**32 - 1),
    mean=st.sampled_from([0.0, -2.0, -6.0, -60.0]),
    spread=st.sampled_from([0.05, 1.0, 20.0]),
    num_rows=st.sampled_from([1, 6] if IS_INTERPRETED else [1, 6, 20, 40]),
)
def test_any_mix_of_methods_routes_as_the_language_says(
    member: Family, seed: int, mean: float, spread: float, num_rows: int
) -> None:
    generator = np.random.default_rng(seed)
    layer = member.layer
    logits = torch.from_numpy(generator.normal(mean, spread, (num_rows, layer.num_experts))).float()
    asks = [
        Asked() if generator.random() < 0.3 else random_ask(layer, generator) for _ in range(num_rows)
    ]
    bias = bias_of(member, generator)
    routed = route_layer(layer, logits, asks, bias)
    masked = [row for row, asked in enumerate(asks) if asked != Asked()]
    check_routing(
        layer,
        logits[masked],
        [asks[row] for row in masked],
        bias,
        routed.tap_weights_TK[masked],
        routed.tap_ids_TK[masked],
    )
    torch.testing.assert_close(routed.weights_TK, routed.tap_weights_TK * SCALING)
    assert torch.equal(routed.ids_TK, routed.tap_ids_TK)
    free = [row for row, asked in enumerate(asks) if asked == Asked()]
    weights, ids = stock_choice(layer, num_rows)
    assert torch.equal(routed.weights_TK[free], weights[free, : layer.top_k])
    assert torch.equal(routed.ids_TK[free], ids[free, : layer.top_k].long())


@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("logit_type", [torch.float32, torch.bfloat16, torch.float16])
def test_every_type_that_routers_use(id_type: torch.dtype, logit_type: torch.dtype) -> None:
    layer = MoELayer(0, 16, 4)
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).to(logit_type)
    weights, ids = stock_choice(layer, 3)
    routed = route_layer(layer, logits, [ASKED] * 3, None, (weights, ids.to(id_type)))
    own = logits[:, :16].float()
    check_routing(layer, own, [ASKED] * 3, None, routed.tap_weights_TK, routed.tap_ids_TK)


def test_logits_that_are_no_numbers_lose_and_infinite_ones_win() -> None:
    layer = MoELayer(0, 8, 2)
    logits = torch.tensor([[9.0, float("nan"), 1.0, float("inf"), 2.0, float("-inf"), 0.0, 0.0]])
    routed = route_layer(layer, logits, [Asked(frozenset({0}))], None)
    assert routed.ids_TK.tolist() == [[3, 4]]
    assert routed.tap_weights_TK.tolist() == [[1.0, 0.0]]


def test_rows_for_which_the_router_chooses_nobody_stay_as_they_are() -> None:
    layer = MoELayer(0, 8, 2)
    weights, ids = torch.zeros(2, 2), torch.full((2, 2), -1, dtype=torch.int32)
    routed = route_layer(layer, torch.randn(2, 8), [ASKED, Asked()], None, (weights, ids))
    assert (routed.ids_TK == -1).all()
    assert (routed.tap_ids_TK == -1).all()
    assert (routed.tap_weights_TK == 0).all()


def test_a_bias_of_each_row_is_that_rows_own() -> None:
    layer = MoELayer(0, 4, 1, Router("sigmoid", has_bias=True))
    asks = [Asked(frozenset({0}))] * 2
    bias = torch.tensor([[0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0]])
    routed = route_layer(layer, torch.zeros(2, 4), asks, bias)
    assert routed.ids_TK.tolist() == [[1], [2]]


def test_a_watched_layer_is_taken_down_and_otherwise_left_alone() -> None:
    layer = MoELayer(0, 8, 2)
    tap = RoutingTap(Topology("Tests", (layer,)), Capacity(4, 1), CPU)
    routing = make_routing(layer, 0, tap, None)
    weights, ids = stock_choice(layer, 3)
    apply(routing, torch.randn(3, 8), weights, ids)
    assert torch.equal(weights, stock_choice(layer, 3)[0])
    assert torch.equal(tap.topk_ids_TLK[:3, 0], ids[:, :2])
    torch.testing.assert_close(tap.topk_weights_TLK[:3, 0], weights[:, :2] / SCALING)


def test_torch_routes_what_the_kernel_does_not_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MoELayer(0, 8, 2)
    topology = Topology("Tests", (layer,))
    tap = RoutingTap(topology, Capacity(4, 1), CPU)
    from guard.device.mask import ExpertMask

    mask = ExpertMask(topology, Capacity(4, 1), CPU)
    assert make_layer_routing(layer, 0, tap, mask, 1.0, "torch") is None
    for other in (Router(kind="sparsemixer"), Router(num_zero_experts=2)):
        assert make_layer_routing(layer._replace(router=other), 0, tap, mask, 1.0) is None
        assert make_layer_routing(layer._replace(router=other), 0, tap, None, 1.0) is not None


@pytest.mark.skipif(IS_INTERPRETED, reason="the operation of a CPU")
def test_it_is_traced_into_a_compiled_graph_with_what_it_writes() -> None:
    layer = MoELayer(0, 16, 4)
    topology = Topology("Tests", (layer, replace_number(layer, 1)))
    tap = RoutingTap(topology, Capacity(8, 1), CPU)
    routings = [make_layer_routing(each, n, tap, None, 1.0) for n, each in enumerate(topology.layers)]

    def forward(logits: torch.Tensor) -> torch.Tensor:
        for routing in routings:
            weights, ids = logits.softmax(dim=-1).topk(4, dim=-1)
            ids = ids.to(torch.int32)
            assert routing is not None
            routing.apply(logits, weights, ids)
            logits = logits + weights.sum(dim=-1, keepdim=True)
        return logits

    logits = torch.randn(5, 16)
    expected, expected_TLK = forward(logits), tap.topk_ids_TLK.clone()
    tap.clear()
    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    found, (code,) = run_and_get_code(compiled, logits)
    torch.testing.assert_close(found, expected)
    assert torch.equal(tap.topk_ids_TLK, expected_TLK)
    assert code.count("moe_guard_route(") == 2, "not by way of torch's operations"
    assert "route_on_cpu.default(" not in code


def replace_number(layer: MoELayer, number: int) -> MoELayer:
    return layer._replace(number=number, router=replace(layer.router))
