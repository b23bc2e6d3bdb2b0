"""The proof finds routers that are blind, that disobey, and that mask whom they must not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from guard_vllm.proof import PROBE_ROWS, Turn, prove, require

from guard.device.mask import MaskedExperts
from guard.device.routing import route_masked
from guard.errors import NotLiveError
from tests.unit.device.driving import MASK, Engine, policy_text, rule_text

MASKING = policy_text(rule_text("{always: {}}", MASK))
Change = Callable[[int, MaskedExperts], MaskedExperts]


def model(
    engine: Engine, change: Change, blind: tuple[int, ...] = (), seeds: Iterator[int] | None = None
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
                asked = change(index, guard.mask.wanted(index, num_rows))
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
