"""The start-up proof: every MoE layer reports, and a masked expert is really not used.

Dummy rows run through the very code that will serve: compiled where the server compiles, captured
where it captures. Every second row is masked; its neighbours show that the masked experts would
have been chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from guard.device.tap import RoutingTap
from guard.errors import NotLiveError
from guard.program.program import MaskRelease, MaskTable
from guard.program.topology import Topology
from guard.runtime import Guard

PROBE_ROWS = 16


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


def prove(guard: Guard, run_rows: Callable[[int], None]) -> Proof:
    """Run the proof; leaves the guard's buffers as they were before.

    run_rows: runs that many dummy rows through the model, as a step of serving would
    """
    topology = guard.program.topology
    guard.tap.clear()
    guard.idle()
    run_rows(PROBE_ROWS)
    free_ids_TLK = _ids(guard.tap)
    blind = tuple(
        layer.number
        for index, layer in enumerate(topology.layers)
        if not _reports(free_ids_TLK[:, index, : layer.top_k], layer.num_experts)
    )
    if blind or guard.mask is None:
        guard.tap.clear()
        return Proof(len(topology.layers), blind, 0, ())
    faults = _prove_masks(guard, run_rows, free_ids_TLK)
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


def _ids(tap: RoutingTap) -> np.ndarray:
    """[PROBE_ROWS, L, K] on the host; start-up may wait for the device."""
    return tap.topk_ids_TLK[:PROBE_ROWS].cpu().numpy()


def _reports(ids_TK: np.ndarray, num_experts: int) -> bool:
    return bool(((ids_TK >= 0) & (ids_TK < num_experts)).all())


def _prove_masks(
    guard: Guard, run_rows: Callable[[int], None], free_ids_TLK: np.ndarray
) -> list[str]:
    """Mask, in every second row, the experts that the rows chose most."""
    topology = guard.program.topology
    targets = [
        _most_chosen(free_ids_TLK[:, index], layer.num_experts, layer.num_experts - layer.top_k)
        for index, layer in enumerate(topology.layers)
    ]
    assert guard.mask is not None
    guard.mask.install(_probe_masks(topology, targets))
    try:
        masked_T1 = (torch.arange(PROBE_ROWS, device=guard.device) % 2 == 0)[:, None]
        guard.mask.set_rows(masked_T1)
        run_rows(PROBE_ROWS)
        ids_TLK = _ids(guard.tap)
    finally:
        guard.mask.clear_rows()
        guard.mask.install(guard.program.masks)
    faults = []
    for index, layer in enumerate(topology.layers):
        if not targets[index]:
            continue  # as many experts chosen as there are: nothing can be masked here
        used = np.isin(ids_TLK[::2, index, : layer.top_k], targets[index])
        unmasked = np.isin(ids_TLK[1::2, index, : layer.top_k], targets[index])
        if used.any():
            faults.append(f"layer {layer.number} still uses masked experts")
        elif not unmasked.any():
            faults.append(f"layer {layer.number} leaves experts unused in rows that are not masked")
    return faults


def _most_chosen(ids_TK: np.ndarray, num_experts: int, at_most: int) -> list[int]:
    counts = np.bincount(ids_TK[ids_TK >= 0], minlength=num_experts)
    order = np.argsort(-counts, kind="stable")[: min(at_most, 2)]
    return [int(expert) for expert in order if counts[expert]]


def _probe_masks(topology: Topology, targets: list[list[int]]) -> MaskTable:
    bits = np.zeros((len(topology.layers), topology.max_experts, 1), dtype=np.int64)
    for index, experts in enumerate(targets):
        bits[index, experts] = 1
    return MaskTable(
        rule=np.zeros(1, dtype=np.int64),
        release=np.array([MaskRelease.REQUEST_END], dtype=np.int64),
        tokens=np.zeros(1, dtype=np.int64),
        static=np.ones(1, dtype=np.bool_),
        expert_bits=bits,
    )
