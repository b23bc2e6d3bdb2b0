"""The proof finds routers that are blind, that disobey, and that mask whom they must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from guard_vllm.proof import PROBE_ROWS, prove, require

from guard.device.mask import reroute_logits
from guard.errors import NotLiveError
from tests.unit.device.driving import MASK, TOPOLOGY, Engine, policy_text, rule_text

MASKING = policy_text(rule_text("{always: {}}", MASK))
Change = Callable[[int, torch.Tensor], torch.Tensor]


def model(engine: Engine, excluded: Change, blind: tuple[int, ...] = ()) -> Callable[[int], None]:
    """Runs dummy rows, each the same token: what a warm-up gives. excluded: (layer, as asked)."""
    guard = engine.guard
    generator = torch.Generator().manual_seed(5)
    logits_LE = torch.randn((len(TOPOLOGY.layers), 8), generator=generator)

    def run_rows(num_rows: int) -> None:
        for layer in range(len(TOPOLOGY.layers)):
            logits = logits_LE[layer].expand(num_rows, -1)
            if guard.mask is not None:
                logits = reroute_logits(logits, excluded(layer, guard.mask.excluded(layer, num_rows)))
            weights, ids = logits.softmax(-1).topk(2)
            if layer not in blind:
                guard.tap.record(layer, ids, weights)

    return run_rows


def obey(_: int, excluded_TE: torch.Tensor) -> torch.Tensor:
    return excluded_TE


def ignore(layer: int, excluded_TE: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(excluded_TE) if layer == 1 else excluded_TE


def first_for_all(_: int, excluded_TE: torch.Tensor) -> torch.Tensor:
    return excluded_TE[:1].expand_as(excluded_TE)


def leak(_: int, excluded_TE: torch.Tensor) -> torch.Tensor:
    """Rows that no mask is for get the mask of the row before them."""
    leaked = excluded_TE.clone()
    leaked[2::3] = excluded_TE[1::3]
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
        (ignore, "layer 1 uses masked experts"),
        (first_for_all, "layer 0 uses masked experts"),
        (leak, "layer 0 masks rows that no mask is for"),
    ],
)
def test_a_router_that_masks_wrongly_is_caught(change: Change, fault: str) -> None:
    engine = Engine(MASKING)

    proof = prove(engine.guard, model(engine, change))

    assert fault in proof.faults
    with pytest.raises(NotLiveError, match=fault):
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
