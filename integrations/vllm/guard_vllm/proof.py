"""The start-up proof: every MoE layer reports, and a masked expert is really not used.

Dummy rows run through the very code that will serve: compiled where the server compiles, captured
where it captures. Rows take turns: one is left with just k experts of each layer, the next with k
others, the third is free. What the dummy rows hold does not matter: a mask that is not obeyed, or
that reaches another row, shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from guard.device.mask import ExpertMask
from guard.device.tap import RoutingTap
from guard.errors import NotLiveError
from guard.program.program import MaskMethodCode, MaskRelease, MaskTable
from guard.program.topology import MoELayer, Topology
from guard.runtime import Guard

PROBE_ROWS = 18
TURNS = 3
"""Two groups of rows under different masks, and a free one."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was shown. blind_layers: model layer numbers that did not report."""

    num_layers: int
    blind_layers: tuple[int, ...]
    masked_layers: int
    faults: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.blind_layers and not self.faults


def prove(guard: Guard, run_rows: Callable[[int], None], num_rows: int = PROBE_ROWS) -> Proof:
    """Run the proof; leaves the guard's buffers as they were before.

    run_rows: runs that many dummy rows through the model, as a step of serving would
    num_rows: at least one a turn
    """
    topology = guard.program.topology
    guard.tap.clear()
    guard.idle()
    run_rows(num_rows)
    ids_TLK = _ids(guard.tap, num_rows)
    blind = tuple(
        layer.number
        for index, layer in enumerate(topology.layers)
        if not _reports(ids_TLK[:, index, : layer.top_k], layer.num_experts)
    )
    if blind or guard.mask is None:
        guard.tap.clear()
        return Proof(len(topology.layers), blind, 0, ())
    faults = _prove_masks(guard, guard.mask, run_rows, ids_TLK)
    guard.tap.clear()
    return Proof(len(topology.layers), (), len(topology.layers), tuple(faults))


def require(proof: Proof) -> None:
    """Raises NotLiveError with what the proof found, unless it holds."""
    if proof.holds:
        return
    found = list(proof.faults)
    if proof.blind_layers:
        numbers = ", ".join(map(str, proof.blind_layers))
        found.append(f"MoE layers {numbers} of {proof.num_layers} do not report their routing")
    raise NotLiveError(
        f"MoE Guard is not live: {'; '.join(found)}. Serving would be unguarded, so it does not "
        "start; --no-strict serves all the same and reports the guard as blind"
    )


def _ids(tap: RoutingTap, num_rows: int) -> np.ndarray:
    """[num_rows, L, K] on the host; start-up may wait for the device."""
    return tap.topk_ids_TLK[:num_rows].cpu().numpy().copy()


def _reports(ids_TK: np.ndarray, num_experts: int) -> bool:
    return bool(((ids_TK >= 0) & (ids_TK < num_experts)).all())


def _prove_masks(
    guard: Guard, mask: ExpertMask, run_rows: Callable[[int], None], unmasked_ids_TLK: np.ndarray
) -> list[str]:
    topology = guard.program.topology
    num_rows = len(unmasked_ids_TLK)
    guard.tap.clear()
    mask.install(_probe_masks(topology))
    try:
        turn_T1 = torch.arange(num_rows, device=guard.device)[:, None] % TURNS
        mask.set_rows(turn_T1 == torch.arange(TURNS - 1, device=guard.device))
        run_rows(num_rows)
        ids_TLK = _ids(guard.tap, num_rows)
    finally:
        mask.clear_rows()
        mask.install(guard.program.masks)
    faults = []
    for index, layer in enumerate(topology.layers):
        ids_TK = ids_TLK[:, index, : layer.top_k]
        free_TK = ids_TK[TURNS - 1 :: TURNS]
        before_TK = unmasked_ids_TLK[TURNS - 1 :: TURNS, index, : layer.top_k]
        lives = [_live_experts(index, layer, turn) for turn in range(TURNS - 1)]
        if not all(_all_choose(ids_TK[turn::TURNS], live) for turn, live in enumerate(lives)):
            faults.append(f"layer {layer.number} uses masked experts")
        if any(_all_choose(free_TK, live) and not _all_choose(before_TK, live) for live in lives):
            faults.append(f"layer {layer.number} masks rows that no mask is for")
    return faults


def _live_experts(index: int, layer: MoELayer, turn: int) -> list[int]:
    """The k experts that a turn's rows are left with: others in each layer, others in each turn."""
    first = index + turn * layer.top_k
    return sorted((first + i) % layer.num_experts for i in range(layer.top_k))


def _all_choose(ids_TK: np.ndarray, experts: list[int]) -> bool:
    return all(sorted(row) == experts for row in ids_TK.tolist())


def _probe_masks(topology: Topology) -> MaskTable:
    """One action a turn, which masks all but the turn's live experts."""
    bits = np.zeros((len(topology.layers), topology.max_experts, 1), dtype=np.int64)
    for index, layer in enumerate(topology.layers):
        for turn in range(TURNS - 1):
            masked = np.setdiff1d(np.arange(layer.num_experts), _live_experts(index, layer, turn))
            bits[index, masked] |= 1 << turn
    actions = TURNS - 1
    return MaskTable(
        rule=np.zeros(actions, dtype=np.int64),
        method=np.full(actions, MaskMethodCode.REROUTE, dtype=np.int64),
        release=np.full(actions, MaskRelease.REQUEST_END, dtype=np.int64),
        tokens=np.zeros(actions, dtype=np.int64),
        static=np.ones(actions, dtype=np.bool_),
        expert_bits=bits,
    )
