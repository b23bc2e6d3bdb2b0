"""Masks on vLLM's own routers, family by family, and what the tap says of them."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from guard_vllm.families import family_of
from guard_vllm.routers import RoutedLayer, attach, topology_of
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter

from guard.device.layout import Capacity
from guard.errors import UnsupportedHostError
from guard.policy import parse_policies
from guard.program.compile import compile_policies
from guard.program.program import MaskMethodCode, MaskRelease, MaskTable
from guard.runtime import Guard
from tests.support.routing_oracle import Asked, choice_scores, chosen, gate_weights
from tests.support.support_facts import METHODS as WORDS
from tests.support.support_recorder import SupportRecord
from tests.unit.device.driving import policy_text, rule_text
from tests.unit.guard_vllm.family_routers import (
    CPU_KERNELS,
    EXPERTS,
    ON_CPU,
    ON_CUDA,
    TOP_K,
    Built,
    InternS1ProBlock,
    has_cpu_kernel,
    stand_in_for_kernels,
)

ROWS, HIDDEN = 24, 8
METHODS = tuple(MaskMethodCode)


class Routed(NamedTuple):
    weights: torch.Tensor
    ids: torch.Tensor
    gates: torch.Tensor  # as the tap has them
    zero_output: torch.Tensor | None


class Attached:
    """A router with and without the guard. One mask action a method; a row's asks are its own."""

    def __init__(self, built: Built, *, masking: bool = True) -> None:
        self.built = built
        self.layer = RoutedLayer(0, "layer.0", built.build(), built.experts)
        self.facts = self.layer.facts
        program = compile_policies(
            parse_policies(policy_text(rule_text("{always: {}}"))),
            topology_of("TestMoeForCausalLM", [self.layer]),
        )
        self.guard = Guard(program, Capacity(ROWS, 2, 2), torch.device("cpu"), masking=masking)
        attach(self.guard, [self.layer])
        generator = torch.Generator().manual_seed(3)
        self.logits = torch.randn((ROWS, built.columns), generator=generator) * 2 - 1
        self.hidden = torch.randn((ROWS, HIDDEN), generator=generator)

    def stock(self) -> Routed:
        router = self.built.build()
        weights, ids = router._compute_routing(self.hidden, self.logits, torch.int32)
        return Routed(weights, ids, weights, getattr(router, "_zero_expert_output", None))

    def masked(self, asks: list[Asked]) -> Routed:
        """Row r is under the masks that `asks[r]` says, each row through actions of its own."""
        names = ("rerouted", "drop_renormed", "dropped", "forced")
        actions = [(row, method) for row in range(len(asks)) for method in METHODS]
        bits = np.zeros((1, self.built.experts, 2), dtype=np.uint64)
        for action, (row, method) in enumerate(actions):
            for expert in getattr(asks[row], names[method]):
                bits[0, expert, action // 64] |= np.uint64(1 << (action % 64))
        zeros = np.zeros(len(actions), dtype=np.int64)
        assert self.guard.mask is not None
        self.guard.mask.install(
            MaskTable(
                rule=zeros,
                method=np.array([method for _, method in actions], dtype=np.int64),
                release=zeros + MaskRelease.REQUEST_END,
                tokens=zeros,
                static=zeros.astype(np.bool_),
                expert_bits=bits.view(np.int64),
            )
        )
        in_force = torch.tensor([[row == of for of, _ in actions] for row in range(ROWS)])
        self.guard.mask.set_rows(in_force)
        return self.route()

    def route(self) -> Routed:
        router: Any = self.layer.router
        weights, ids = router._compute_routing(self.hidden, self.logits, torch.int32)
        tap = self.guard.tap
        gates = tap.topk_weights_TLK[:ROWS, 0].clone()
        assert torch.equal(tap.topk_ids_TLK[:ROWS, 0], ids[:, : self.facts.top_k].int())
        return Routed(weights, ids, gates, getattr(router, "_zero_expert_output", None))


@pytest.fixture(params=[*ON_CPU, *ON_CUDA], ids=lambda built: built.name)
def attached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Attached:
    stand_in_for_kernels(monkeypatch)
    return Attached(request.param)


def asks_of_some_rows(facts: Any) -> list[Asked]:
    """Random masks up to the most that may be rerouted; every third row has none."""
    random = np.random.default_rng(11)
    spare = facts.num_experts - facts.top_k
    asks = []
    for row in range(ROWS):
        order = random.permutation(facts.num_experts).tolist()
        rerouted = (0, 3, spare - 2, spare)[row % 4]
        rest = order[rerouted:]
        cut = len(rest) // 4
        ask = Asked(
            frozenset(order[:rerouted]),
            frozenset(rest[:cut]),
            frozenset(rest[cut : 2 * cut]),
            frozenset(rest[2 * cut :][: int(random.integers(0, facts.top_k + 1))]),
        )
        asks.append(Asked() if row % 3 == 2 else ask)
    return asks


def test_rows_without_a_mask_keep_their_bits_and_the_others_route_as_asked(
    attached: Attached, support_record: SupportRecord
) -> None:
    for name in attached.built.families:
        support_record(name, *WORDS, runner="router")
    facts, family = attached.facts, attached.layer.family
    asks = asks_of_some_rows(facts)
    stock = attached.stock()

    routed = attached.masked(asks)

    assert routed.weights.dtype == stock.weights.dtype
    assert routed.ids.dtype == stock.ids.dtype
    assert routed.weights.shape == stock.weights.shape
    assert routed.weights.is_contiguous()
    assert routed.ids.is_contiguous()
    assert routed.weights.isfinite().all()
    bias = None if family.bias is None else family.bias(None)
    for row, asked in enumerate(asks):
        if asked == Asked():
            assert torch.equal(routed.ids[row], stock.ids[row])
            assert torch.equal(routed.weights[row], stock.weights[row])
            continue
        columns = facts.num_experts + facts.router.num_zero_experts
        logits = attached.logits[row, :columns]
        expected = chosen(facts, choice_scores(facts, logits, bias), asked, bias)
        gates = dict(zip(expected, gate_weights(facts, logits, expected, asked), strict=True))
        ids = routed.ids[row, : facts.top_k].tolist()
        real = {e: w for e, w in gates.items() if e < facts.num_experts}
        weights = dict.fromkeys(ids, 0.0)
        for place, expert in enumerate(ids):  # a zero expert shows as another expert 0 of no weight
            weights[expert] += float(routed.gates[row, place])
        assert set(real) == {e for e in ids if e in real or weights[e] != 0}
        assert all(weights[e] == pytest.approx(w, rel=2e-5, abs=1e-7) for e, w in real.items())
        assert all(weights[e] == 0 for e in ids if e in asked.rerouted | asked.dropped)
        assert torch.equal(routed.ids[row, facts.top_k :], stock.ids[row, facts.top_k :])
        assert torch.equal(routed.weights[row, facts.top_k :], stock.weights[row, facts.top_k :])
        if facts.router.num_zero_experts == 0:
            assert len(set(ids)) == len(ids)
        elif routed.zero_output is not None:
            share = sum(w for e, w in gates.items() if e >= facts.num_experts) * float(family.scaling)
            torch.testing.assert_close(routed.zero_output[row], attached.hidden[row] * share)


def test_the_tap_has_gate_weights_before_any_scaling(attached: Attached) -> None:
    asks = asks_of_some_rows(attached.facts)
    routed = attached.masked(asks)

    scaling = attached.built.scaling
    factor = scaling[routed.ids.long()] if isinstance(scaling, torch.Tensor) else scaling
    top_k = attached.facts.top_k
    torch.testing.assert_close(routed.weights[:, :top_k], routed.gates * factor)
    if attached.facts.router.renormalize and not attached.facts.router.num_zero_experts:
        free = [row for row, asked in enumerate(asks) if asked == Asked()]
        torch.testing.assert_close(routed.gates[free].sum(-1), torch.ones(len(free)))


@pytest.mark.parametrize("built", ON_CPU, ids=lambda built: built.name)
def test_vllms_compiler_can_trace_a_guarded_router_without_a_break(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_kernels(monkeypatch)
    torch._dynamo.reset()
    attached = Attached(built)
    eager = attached.masked(asks_of_some_rows(attached.facts))

    @torch.compile(backend="eager", fullgraph=True)
    def traced(hidden: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = attached.layer.router._compute_routing(hidden, logits, torch.int32)
        return weights, ids

    weights, ids = traced(attached.hidden, attached.logits)

    assert torch.equal(weights, eager.weights)
    assert torch.equal(ids, eager.ids)


REFUSED = [
    ("unknown function", {"custom_routing_function": lambda *_: None}, "routes with .*lambda"),
    ("groups of their own", {"custom_routing_function": InternS1ProBlock(2).route}, "for itself"),
    ("routed outside", {"custom_routing_function": partial(str, "x")}, "routes with builtins.str"),
]


@pytest.mark.parametrize(
    ("options", "reason"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_routers_that_are_not_understood_can_be_watched_but_not_masked(
    options: dict[str, Any], reason: str
) -> None:
    def build() -> CPURouter:
        return CPURouter(top_k=TOP_K, global_num_experts=EXPERTS, **options)

    with pytest.raises(UnsupportedHostError, match=rf"layer\.0.*{reason}.*--observe-only"):
        Attached(Built("refused", build))
    Attached(Built("watched", build), masking=False)


def test_a_class_of_router_that_is_not_known_is_refused_by_name() -> None:
    router = CPURouter(top_k=2, global_num_experts=8)
    router.__class__ = type("NewRouter", (CPURouter,), {})

    family = family_of(router, 8)

    assert family.unmaskable == "the router NewRouter is not known to this release"


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_what_stands_in_for_a_kernel_routes_as_it_does(name: str) -> None:
    if not has_cpu_kernel(name):
        pytest.skip("this CPU lacks AVX-512, and vLLM's library for it lacks the kernel")
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn((ROWS, 256), generator=generator) * 2
    arguments: tuple[Any, ...]
    if name == "hash_topk_cpu":
        table = torch.stack([torch.randperm(256, generator=generator)[:6] for _ in range(ROWS)]).int()
        arguments = (logits, table, 6, "sqrtsoftplus", 0, 256, 1.5)
    else:
        bias = torch.randn(256, generator=generator) * 0.2 + 3
        arguments = (logits, logits, bias, 6, True, "sqrtsoftplus", 0, 1.5, True)
    weights, ids = getattr(torch.ops._C, name)(*arguments)
    stand_in_weights, stand_in_ids = CPU_KERNELS[name](*arguments)
    assert torch.equal(ids.sort(-1).values, stand_in_ids.sort(-1).values)
    order, stand_in_order = ids.argsort(-1), stand_in_ids.argsort(-1)
    torch.testing.assert_close(weights.gather(1, order), stand_in_weights.gather(1, stand_in_order))


def test_a_layer_that_a_table_routes_is_watched_and_never_masked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in_for_kernels(monkeypatch)
    table = torch.stack([torch.randperm(256)[:6] for _ in range(10)]).to(torch.int32)

    def build() -> CPURouter:
        return CPURouter(6, 256, scoring_func="sqrtsoftplus", hash_indices_table=table)

    attached = Attached(Built("hash", build, columns=256, experts=256))
    assert attached.facts.router.kind == "hash"
    assert attached.guard.mask is not None
    attached.guard.mask.expert_bits_LEW.fill_(-1)
    attached.guard.mask.row_bits_TW.fill_(-1)
    tokens = torch.arange(ROWS) % 10
    router: Any = attached.layer.router

    weights, ids = router._compute_routing(
        attached.hidden, attached.logits, torch.int32, input_ids=tokens
    )

    assert torch.equal(ids, table[tokens])
    assert (attached.guard.tap.topk_weights_TLK[:ROWS, 0] > 0).all()
    torch.testing.assert_close(attached.guard.tap.topk_weights_TLK[:ROWS, 0], weights)


def test_a_bias_that_weight_updates_change_is_read_anew() -> None:
    bias = torch.full((EXPERTS,), 7.0)
    options: dict[str, Any] = {"scoring_func": "sigmoid", "e_score_correction_bias": bias}
    attached = Attached(Built("GLM-4.5", lambda: CPURouter(TOP_K, EXPERTS, True, 1, 1, **options)))
    asks = [Asked(rerouted=frozenset([31]))] * ROWS
    attached.masked(asks)

    bias[10] += 2.0

    assert (attached.masked(asks).ids == 10).any(dim=1).all()


def test_image_tokens_are_routed_by_the_bias_for_images(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_kernels(monkeypatch)
    text, vision = torch.zeros(EXPERTS), torch.zeros(EXPERTS)
    text[5], vision[6] = 100.0, 100.0
    built = Built(
        "DeepSeek-V4 vision",
        lambda: FusedTopKBiasRouter(
            TOP_K, EXPERTS, text, bias_vl=vision, image_sentinel_lo=1000, scoring_func="softmax"
        ),
    )
    attached = Attached(built)
    tokens = torch.tensor([999, 1000, 1004, 1005] * (ROWS // 4))
    router: Any = attached.layer.router
    router._compute_routing = partial(router._compute_routing, input_ids=tokens)

    ids = attached.masked([Asked(rerouted=frozenset([31]))] * ROWS).ids

    expected = [[5] if not 1000 <= token <= 1004 else [6] for token in tokens.tolist()]
    assert [[e for e in row if e in (5, 6)][:1] for row in ids.tolist()] == expected
