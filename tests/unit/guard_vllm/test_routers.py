"""Finding the routers of a model; the tap and the mask in vLLM's own plain ones on a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from guard_vllm.routers import RoutedLayer, attach, routed_layers, topology_of
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import (
    RoutingSimulatorRouter,
)
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from guard.errors import UnsupportedHostError
from guard.program.topology import MoELayer
from tests.unit.device.driving import MASK, TOPOLOGY, Engine, policy_text, rule_text

MASKING = policy_text(rule_text("{always: {}}", MASK))
GENERATOR = torch.Generator().manual_seed(1)
LOGITS = torch.randn((6, 8), generator=GENERATOR)
LOGITS[:, 3] = 9.0  # expert 3, which the policy masks, is everyone's first choice
HIDDEN = torch.zeros((6, 4))


def layers(**options: Any) -> list[RoutedLayer]:
    return [
        RoutedLayer(n, f"layer.{n}", CPURouter(top_k=2, global_num_experts=8, **options))
        for n in range(2)
    ]


def route(router: Any, logits: torch.Tensor = LOGITS) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = router._compute_routing(HIDDEN, logits, torch.int64)
    return weights, ids


@pytest.mark.parametrize("renormalize", [True, False])
def test_masked_rows_reroute_and_the_others_are_bit_identical(renormalize: bool) -> None:
    engine, routed = Engine(MASKING), layers(renormalize=renormalize)
    stock_weights, stock_ids = route(routed[0].router)
    attach(engine.guard, routed)
    assert engine.guard.mask is not None
    engine.guard.mask.set_rows(torch.tensor([[True], [False]] * 3))

    weights, ids = route(routed[0].router)

    assert (ids[0::2] != 3).all()
    assert torch.equal(ids[1::2], stock_ids[1::2])
    assert torch.equal(weights[1::2], stock_weights[1::2])
    full = LOGITS.softmax(-1).gather(1, ids.long())
    expected = full / full.sum(-1, keepdim=True) if renormalize else full
    torch.testing.assert_close(weights, expected)
    assert torch.equal(engine.guard.tap.topk_ids_TLK[:6, 0], ids.to(torch.int32))
    assert torch.equal(engine.guard.tap.topk_weights_TLK[:6, 0], weights)
    assert (engine.guard.tap.topk_ids_TLK[:, 1] == -1).all(), "the other layer did not run"


def test_rows_for_which_the_router_chooses_nobody_stay_as_they_are() -> None:
    engine, routed = Engine(MASKING), layers(renormalize=False)
    stock = routed[0].router._compute_routing

    def choosing_nobody_in_the_last_row(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = stock(*arguments)
        weights[-1], ids[-1] = 0.0, -1  # what vLLM's CUDA routers do for padding
        return weights, ids

    routed[0].router._compute_routing = choosing_nobody_in_the_last_row
    attach(engine.guard, routed)
    assert engine.guard.mask is not None
    engine.guard.mask.set_rows(torch.ones((6, 1), dtype=torch.bool))

    weights, ids = route(routed[0].router)

    assert (ids[-1] == -1).all()
    assert (weights[-1] == 0).all()
    assert (ids[:-1] != 3).all()


def test_a_mask_of_one_layer_leaves_the_others_alone() -> None:
    engine, routed = Engine(MASKING), layers()
    stock = route(routed[1].router)
    attach(engine.guard, routed)
    assert engine.guard.mask is not None
    engine.guard.mask.set_rows(torch.ones((6, 1), dtype=torch.bool))

    assert all(torch.equal(a, b) for a, b in zip(route(routed[1].router), stock, strict=True))


def test_the_topology_is_that_of_the_loaded_routers() -> None:
    assert topology_of("TestMoeForCausalLM", layers()) == TOPOLOGY
    assert topology_of("X", layers()).layers == (MoELayer(0, 8, 2), MoELayer(1, 8, 2))


def test_a_model_without_moe_layers_is_refused() -> None:
    with pytest.raises(UnsupportedHostError, match="Linear has no MoE layers"):
        routed_layers(torch.nn.Linear(1, 1))


def runner(name: str, router: Any, *, num_experts: int = 8, monolithic: bool = False) -> MoERunner:
    """As vLLM builds one, with as much of it as the guard reads."""
    made: Any = MoERunner.__new__(MoERunner)
    torch.nn.Module.__init__(made)
    made.layer_name, made.router = name, router
    made.moe_config = SimpleNamespace(num_logical_experts=num_experts)
    made.routed_experts = MoEExperts()
    made.routed_experts.quant_method = SimpleNamespace(is_monolithic=monolithic)
    return cast(MoERunner, made)


class MoEExperts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8, 4, 4))


class DeepseekV4MegaMoEExperts(torch.nn.Module):
    """Its weights are in buffers of its own making."""


class ShortConvolution(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8, 1, 4))


def cpu_router(num_experts: int = 8) -> CPURouter:
    return CPURouter(top_k=2, global_num_experts=num_experts)


def test_layers_come_by_number_and_copies_of_experts_are_not_counted() -> None:
    model = torch.nn.ModuleList(
        [
            runner("model.layers.7.mlp.experts", cpu_router(10)),
            ShortConvolution(),
            runner("model.layers.3.mlp.experts", cpu_router()),
        ]
    )

    found = routed_layers(model)

    assert topology_of("X", found).sizes == ((3, 8, 2), (7, 8, 2))


@pytest.mark.parametrize("outside", [MoEExperts, DeepseekV4MegaMoEExperts])
def test_experts_that_no_runner_of_vllm_runs_are_refused(outside: type[torch.nn.Module]) -> None:
    model = torch.nn.ModuleList([runner("model.layers.0.mlp.experts", cpu_router()), outside()])

    with pytest.raises(
        UnsupportedHostError, match=f"the experts in {outside.__name__} are run outside"
    ):
        routed_layers(model)


def test_routing_by_chance_is_refused() -> None:
    router = RoutingSimulatorRouter(top_k=2, global_num_experts=8)

    with pytest.raises(UnsupportedHostError, match="unset VLLM_MOE_ROUTING_SIMULATION_STRATEGY"):
        routed_layers(runner("model.layers.0.mlp.experts", router))
