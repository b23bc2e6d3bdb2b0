"""The proof finds routers that are blind, that disobey, and that mask whom they must not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import count
from typing import Protocol

import pytest
import torch
from guard_vllm.proof import LEAK_ROUNDS, PROBE_ROWS, Turn, prove, require

from guard.device.layout import Capacity
from guard.device.mask import ExpertMask, MaskedExperts
from guard.device.routing import route_masked
from guard.errors import NotLiveError
from guard.policy import parse_policies
from guard.program.compile import compile_policies
from guard.program.topology import MoELayer, Router, Topology
from guard.runtime import Guard
from tests.unit.device.driving import MASK, Engine, policy_text, rule_text
from tests.unit.device.test_routing import FAMILIES, Family

MASKING = policy_text(rule_text("{always: {}}", MASK))


class HasGuard(Protocol):
    guard: Guard


class Bare:
    """A guard of a topology, with one policy that masks nothing."""

    def __init__(self, *layers: MoELayer) -> None:
        program = compile_policies(
            parse_policies(policy_text(rule_text("{always: {}}"))), Topology("T", layers)
        )
        self.guard = Guard(program, Capacity(64, 2, 1), torch.device("cpu"))


Change = Callable[[int, MaskedExperts], MaskedExperts]


def model(
    engine: HasGuard, change: Change, blind: tuple[int, ...] = (), seeds: Iterator[int] | None = None
) -> Callable[[int], None]:
    """Runs dummy rows, each the same token: what a warm-up gives. change: (layer, as asked)."""
    guard = engine.guard
    layers = guard.program.topology.layers

    def run_rows(num_rows: int) -> None:
        generator = torch.Generator().manual_seed(5 if seeds is None else next(seeds))
        for index, layer in enumerate(layers):
            columns = layer.num_experts + layer.router.num_zero_experts
            logits = torch.randn(columns, generator=generator).expand(num_rows, -1)
            asked = _nothing(num_rows, layer.num_experts)
            if guard.mask is not None and layer.router.kind != "hash":
                row_bits_TW = guard.mask.row_bits_TW[:num_rows]
                asked = change(index, guard.mask.wanted(index, row_bits_TW))
            bias = torch.full((columns,), 7.0) if layer.router.has_bias else None
            weights, ids = route_masked(layer, logits, asked, bias)
            is_zero = ids >= layer.num_experts
            if index not in blind:
                guard.tap.record(index, ids.masked_fill(is_zero, 0), weights.masked_fill(is_zero, 0))

    return run_rows


def _nothing(num_rows: int, num_experts: int) -> MaskedExperts:
    nothing = torch.zeros((num_rows, num_experts), dtype=torch.bool)
    return MaskedExperts(nothing, nothing, nothing, nothing)


def obey(_: int, asked: MaskedExperts) -> MaskedExperts:
    return asked


def without(method: str) -> Change:
    """A layer that ignores one method."""

    def change(layer: int, asked: MaskedExperts) -> MaskedExperts:
        field = f"{method}_TE"
        nobody = torch.zeros_like(asked.rerouted_TE)
        return asked._replace(**{field: nobody}) if layer == 1 else asked

    return change


def first_for_all(_: int, asked: MaskedExperts) -> MaskedExperts:
    return MaskedExperts(*(flags_TE[:1].expand_as(flags_TE) for flags_TE in asked))


def leak(_: int, asked: MaskedExperts) -> MaskedExperts:
    """Rows that no mask is for get the mask of the row before them."""
    leaked = MaskedExperts(*(flags_TE.clone() for flags_TE in asked))
    for flags_TE, asked_TE in zip(leaked, asked, strict=True):
        flags_TE[Turn.FREE :: len(Turn)] = asked_TE[Turn.FREE - 1 :: len(Turn)][: len(flags_TE[4::5])]
    return leaked


def test_a_router_that_obeys_is_proved_and_the_buffers_are_as_before() -> None:
    engine = Engine(MASKING)
    assert engine.guard.mask is not None
    installed = engine.guard.mask.expert_bits_LEW.clone()

    proof = prove(engine.guard, model(engine, obey))

    assert proof.holds
    assert (proof.num_layers, proof.masked_layers) == (2, 2)
    require(proof)
    assert torch.equal(engine.guard.mask.expert_bits_LEW, installed)
    assert not engine.guard.mask.row_bits_TW.any()
    assert (engine.guard.tap.topk_ids_TLK == -1).all()


def test_a_layer_that_does_not_report_is_named() -> None:
    engine = Engine(MASKING)

    proof = prove(engine.guard, model(engine, obey, blind=(1,)))

    assert proof.blind_layers == (1,)
    with pytest.raises(NotLiveError, match="MoE layers 1 of 2 do not report"):
        require(proof)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (without("rerouted"), r"layer 1 uses masked experts (reroute)"),
        (without("drop_renormed"), r"layer 1 uses masked experts (drop_renorm)"),
        (without("dropped"), r"layer 1 uses masked experts (drop)"),
        (without("forced"), r"layer 1 does not use forced experts (force)"),
        (first_for_all, r"layer 0 uses masked experts (drop)"),
        (leak, "layer 0 masks rows that no mask is for"),
    ],
)
def test_a_router_that_masks_wrongly_is_caught(change: Change, fault: str) -> None:
    engine = Engine(MASKING)

    proof = prove(engine.guard, model(engine, change))

    assert fault in proof.faults
    with pytest.raises(NotLiveError, match=re.escape(fault)):
        require(proof)


def test_observing_only_proves_the_tap_alone() -> None:
    engine = Engine(MASKING, masking=False)

    proof = prove(engine.guard, model(engine, obey))

    assert (proof.holds, proof.masked_layers) == (True, 0)


def test_a_fault_during_the_proof_leaves_the_programs_masks_installed() -> None:
    engine = Engine(MASKING)
    assert engine.guard.mask is not None
    installed = engine.guard.mask.expert_bits_LEW.clone()
    run = model(engine, obey)
    calls = []

    def fail_second(num_rows: int) -> None:
        calls.append(num_rows)
        if len(calls) == 2:
            raise RuntimeError("injected")
        run(num_rows)

    with pytest.raises(RuntimeError, match="injected"):
        prove(engine.guard, fail_second)

    assert calls == [PROBE_ROWS] * 2
    assert torch.equal(engine.guard.mask.expert_bits_LEW, installed)
    assert not engine.guard.mask.row_bits_TW.any()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_that_obeys_is_proved_and_one_that_ignores_a_method_is_not(
    family: Family,
) -> None:
    layers = (family.layer, family.layer._replace(number=1))

    bare = Bare(*layers)
    assert prove(bare.guard, model(bare, obey)).holds
    for method in ("rerouted", "dropped", "forced"):
        bare = Bare(*layers)
        assert prove(bare.guard, model(bare, without(method))).faults, method


def test_a_layer_that_a_table_routes_is_proved_to_report_and_nothing_more() -> None:
    bare = Bare(MoELayer(0, 8, 2, Router(kind="hash")), MoELayer(1, 8, 2))

    proof = prove(bare.guard, model(bare, obey))

    assert proof.holds
    assert (proof.num_layers, proof.masked_layers) == (2, 1)


@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_with_fewer_rows_than_turns_every_method_is_proved_all_the_same(num_rows: int) -> None:
    bare = Bare(MoELayer(0, 8, 2), MoELayer(1, 8, 2))
    assert prove(bare.guard, model(bare, obey), num_rows).holds

    for method in ("rerouted", "drop_renormed", "dropped", "forced"):
        assert not prove(bare.guard, model(bare, without(method)), num_rows).holds


@pytest.mark.parametrize("seeds", [None, count()], ids=["rows repeat", "rows do not repeat"])
def test_a_free_row_that_chooses_by_chance_what_is_named_is_no_leak(
    seeds: Iterator[int] | None,
) -> None:
    bare = Bare(*(MoELayer(number, 16, 1) for number in range(8)))

    assert prove(bare.guard, model(bare, obey, seeds=seeds)).holds


def test_a_leak_is_told_from_chance_where_one_expert_is_chosen() -> None:
    bare = Bare(*(MoELayer(number, 4, 1) for number in range(2)))
    runs: list[int] = []
    run = model(bare, leak)

    def counted(num_rows: int) -> None:
        runs.append(num_rows)
        run(num_rows)

    assert prove(bare.guard, counted).faults == tuple(
        f"layer {number} masks rows that no mask is for" for number in range(2)
    )
    assert len(runs) == 1 + LEAK_ROUNDS


def test_weights_that_are_no_numbers_under_a_mask_are_a_fault() -> None:
    bare = Bare(MoELayer(0, 8, 2))
    run = model(bare, obey)

    def broken(num_rows: int) -> None:
        run(num_rows)
        bare.guard.tap.topk_weights_TLK[Turn.DROP] = float("nan")

    assert "no numbers under a mask (drop)" in prove(bare.guard, broken).faults[0]


def test_a_layer_that_is_routed_inside_its_kernel_is_proved_to_reroute_and_nothing_else() -> None:
    in_kernel = Router(is_in_kernel=True)

    def through_logits(_: int, asked: MaskedExperts) -> MaskedExperts:
        nobody = torch.zeros_like(asked.rerouted_TE)
        return MaskedExperts(asked.rerouted_TE, nobody, nobody, nobody)

    bare = Bare(MoELayer(0, 8, 2, in_kernel), MoELayer(1, 8, 2, in_kernel))
    proof = prove(bare.guard, model(bare, through_logits))
    assert (proof.holds, proof.num_layers, proof.masked_layers) == (True, 2, 2)

    bare = Bare(MoELayer(0, 8, 2, in_kernel), MoELayer(1, 8, 2, in_kernel))
    assert prove(bare.guard, model(bare, without("rerouted"))).faults == (
        "layer 1 uses masked experts (reroute)",
    )
    assert prove(bare.guard, model(bare, leak)).faults == ()  # of methods that are in no such layer
    assert prove(bare.guard, model(bare, first_for_all)).faults == tuple(
        f"layer {number} masks rows that no mask is for" for number in range(2)
    )
    bare = Bare(MoELayer(0, 8, 2, in_kernel), MoELayer(1, 8, 2))
    assert prove(bare.guard, model(bare, without("dropped"))).faults == (
        "layer 1 uses masked experts (drop)",
    )
    assert prove(bare.guard, model(bare, obey, blind=(0,))).blind_layers == (0,)


@pytest.mark.parametrize(
    ("change", "blind"),
    [(without("rerouted"), ()), (leak, ()), (obey, (0, 1))],
    ids=["no reroute", "leak", "blind"],
)
def test_rows_run_equally_often_whatever_is_found(change: Change, blind: tuple[int, ...]) -> None:
    """Other engines run theirs beside: one that stopped early would leave them waiting."""
    runs = []
    for change_, blind_ in ((obey, ()), (change, blind)):
        engine = Engine(MASKING)
        own: list[int] = []
        run_rows = model(engine, change_, blind=blind_)

        def counted(
            num_rows: int, run_rows: Callable[[int], None] = run_rows, own: list[int] = own
        ) -> None:
            own.append(num_rows)
            run_rows(num_rows)

        prove(engine.guard, counted)
        runs.append(own)
    assert runs[0] == runs[1]
    assert len(runs[0]) > 1


def test_engines_give_their_rows_other_turns() -> None:
    bits = []
    for shift in (0, 1):
        engine = Engine(MASKING)
        mask = engine.guard.mask
        assert mask is not None
        run_rows = model(engine, obey)
        seen: list[torch.Tensor] = []

        def watched(
            num_rows: int,
            run_rows: Callable[[int], None] = run_rows,
            mask: ExpertMask = mask,
            seen: list[torch.Tensor] = seen,
        ) -> None:
            seen.append(mask.row_bits_TW[:num_rows].clone())
            run_rows(num_rows)

        assert prove(engine.guard, watched, 2 * len(Turn), shift=shift).holds
        bits.append(seen[1])
    assert torch.equal(bits[0][1:], bits[1][:-1])
    assert (bits[0] != bits[1]).any(dim=1).all()
