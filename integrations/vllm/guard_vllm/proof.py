"""The start-up proof: every MoE layer reports, and masks of every method are obeyed.

Dummy rows run through the very code that will serve: compiled where the server compiles, captured
where it captures. Rows take turns: one under each method, and a free one. In every layer and turn
other experts are named, so a mask that is not obeyed, or that reaches another row, shows whatever
the dummy rows hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from guard.device.mask import ExpertMask
from guard.device.tap import RoutingTap
from guard.errors import NotLiveError
from guard.program.program import MaskMethodCode, MaskRelease, MaskTable
from guard.program.topology import MoELayer, Topology
from guard.runtime import Guard


class Turn(IntEnum):
    """What a row is for. `_named` says which k experts it is about; `_masked` is exact."""

    REROUTE = 0  # only the k named are live
    DROP_RENORM = 1  # the same, and the first of them is dropped
    DROP = 2  # the same
    FORCE = 3  # the k named are forced
    FREE = 4


METHOD_TURNS = (Turn.REROUTE, Turn.DROP_RENORM, Turn.DROP, Turn.FORCE)

PROBE_ROWS = 4 * len(Turn)

_ACTIONS: tuple[tuple[Turn, MaskMethodCode], ...] = (
    (Turn.REROUTE, MaskMethodCode.REROUTE),
    (Turn.DROP_RENORM, MaskMethodCode.REROUTE),
    (Turn.DROP_RENORM, MaskMethodCode.DROP_RENORM),
    (Turn.DROP, MaskMethodCode.REROUTE),
    (Turn.DROP, MaskMethodCode.DROP),
    (Turn.FORCE, MaskMethodCode.FORCE),
)
"""The probe's mask actions: on whose rows each is in force, and its method."""

LEAK_ROUNDS = 6
"""A free row may choose by chance what others are told to: only what it chooses in every round, which
each names other experts, is a leak."""

_RESTORED_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Proof:
    """What one rank showed of its own layers.

    blind_layers: model layer numbers that did not report
    """

    num_layers: int
    blind_layers: tuple[int, ...]
    masked_layers: int
    faults: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.blind_layers and not self.faults

    @property
    def found(self) -> list[str]:
        """What speaks against it, in words."""
        if not self.blind_layers:
            return list(self.faults)
        numbers = ", ".join(map(str, self.blind_layers))
        silent = f"MoE layers {numbers} of {self.num_layers} do not report their routing"
        return [*self.faults, silent]


@dataclass(frozen=True, slots=True)
class _Routing:
    """What one layer's tap held: ids [T, k] and gate weights [T, k], on the host."""

    ids_TK: np.ndarray
    weights_TK: np.ndarray

    def __len__(self) -> int:
        return len(self.ids_TK)

    def of_rows(self, rows: np.ndarray) -> _Routing:
        return _Routing(self.ids_TK[rows], self.weights_TK[rows])


def prove(
    guard: Guard, run_rows: Callable[[int], None], num_rows: int = PROBE_ROWS, *, shift: int = 0
) -> Proof:
    """Run the proof; leaves the guard's buffers as they were before.

    Whatever it finds, it runs rows equally often: other engines may have to run theirs beside.

    run_rows: runs that many dummy rows through the model, as a step of serving would; where they are
        fewer than the turns, it runs several times
    shift: gives the rows other turns, so that engines whose rows are routed together differ
    """
    own = _own_layers(guard)
    layers = [layer for _, layer in own]
    guard.tap.clear()
    guard.idle()
    run_rows(num_rows)
    unmasked = [_read(guard.tap, index, layer, num_rows) for index, layer in own]
    blind = tuple(
        layer.number
        for layer, routing in zip(layers, unmasked, strict=True)
        if not _reports(routing.ids_TK, layer.num_experts)
    )
    guard.tap.clear()
    if guard.mask is None:
        return Proof(len(layers), blind, 0, ())
    faults = _prove_masks(guard, guard.mask, run_rows, num_rows, shift)
    guard.tap.clear()
    if blind:
        return Proof(len(layers), blind, 0, ())
    num_masked = sum(layer.router.kind != "hash" for layer in layers)
    return Proof(len(layers), (), num_masked, tuple(faults))


def _own_layers(guard: Guard) -> list[tuple[int, MoELayer]]:
    """(row of the topology, layer) of what this rank routes."""
    layers = guard.program.topology.layers
    return [(index, layers[index]) for index in guard.layers]


def require(proof: Proof) -> None:
    """Raises NotLiveError with what the proof found, unless it holds."""
    if proof.holds:
        return
    raise NotLiveError(
        f"MoE Guard is not live: {'; '.join(proof.found)}. Serving would be unguarded, so it does not "
        "start; --no-strict serves all the same and reports the guard as blind"
    )


def _read(tap: RoutingTap, index: int, layer: MoELayer, num_rows: int) -> _Routing:
    """Start-up may wait for the device."""
    return _Routing(
        tap.topk_ids_TLK[:num_rows, index, : layer.top_k].cpu().numpy().copy(),
        tap.topk_weights_TLK[:num_rows, index, : layer.top_k].cpu().numpy().copy(),
    )


def _reports(ids_TK: np.ndarray, num_experts: int) -> bool:
    return bool(((ids_TK >= 0) & (ids_TK < num_experts)).all())


def _prove_masks(
    guard: Guard, mask: ExpertMask, run_rows: Callable[[int], None], num_rows: int, shift: int
) -> list[str]:
    layers = guard.program.topology.layers
    try:
        faults, leaking = _probe(guard, mask, run_rows, num_rows, 0, shift)
        for round_ in range(1, LEAK_ROUNDS):
            leaking &= _probe(guard, mask, run_rows, num_rows, round_, shift)[1]
    finally:
        mask.clear_rows()
        mask.install(guard.program.masks, guard.program.generation)
    return faults + [
        f"layer {layers[index].number} masks rows that no mask is for"
        for index in sorted({index for index, _ in leaking})
    ]


def _probe(
    guard: Guard,
    mask: ExpertMask,
    run_rows: Callable[[int], None],
    num_rows: int,
    round_: int,
    shift: int,
) -> tuple[list[str], set[tuple[int, Turn]]]:
    """Faults, and (row of the topology, turn) where the free rows chose what a turn's rows should."""
    topology = guard.program.topology
    faults: dict[str, None] = {}
    leaking: set[tuple[int, Turn]] = set()
    mask.install(_probe_masks(topology, round_), guard.program.generation)
    for first_turn in range(0, len(Turn), num_rows):
        turn_T = (np.arange(num_rows) + first_turn + shift) % len(Turn)
        in_force_TA = turn_T[:, None] == np.array([turn for turn, _ in _ACTIONS])
        guard.tap.clear()
        mask.set_rows(torch.from_numpy(in_force_TA).to(guard.device))
        run_rows(num_rows)
        for index, layer in _own_layers(guard):
            if layer.router.kind == "hash":
                continue
            routing = _read(guard.tap, index, layer, num_rows)
            free = routing.of_rows(turn_T == Turn.FREE)
            for turn in _turns(layer):
                named = _named(index, layer, turn, round_)
                found = _fault(layer, turn, named, routing.of_rows(turn_T == turn))
                if found is not None:
                    faults[found] = None
                if layer.top_k < layer.num_experts and len(free) and _all_choose(free, named):
                    leaking.add((index, turn))
    return list(faults), leaking


def _turns(layer: MoELayer) -> Sequence[Turn]:
    """Those whose methods the layer can honour; others are refused where policies are compiled."""
    return (Turn.REROUTE,) if layer.router.is_in_kernel else METHOD_TURNS


def _fault(layer: MoELayer, turn: Turn, named: Sequence[int], routing: _Routing) -> str | None:
    method = MaskMethodCode[turn.name].name.lower()
    # Dummy rows may hold NaN from the start (on CPUs attention leaves their output as it finds it),
    # which stock routers pass on and `route_masked` does not. `kernel_proof` has a token of its own.
    if not layer.router.is_in_kernel and not np.isfinite(routing.weights_TK).all():
        return f"layer {layer.number} gives weights that are no numbers under a mask ({method})"
    if _obeys(layer, turn, named, routing):
        return None
    verb = "does not use forced" if turn is Turn.FORCE else "uses masked"
    return f"layer {layer.number} {verb} experts ({method})"


def _obeys(layer: MoELayer, turn: Turn, named: Sequence[int], routing: _Routing) -> bool:
    ids_TK, weights_TK = routing.ids_TK, routing.weights_TK
    if layer.router.num_zero_experts and turn is not Turn.FORCE:
        # Zero experts, which no mask can name, may take any place; they show as no weight.
        live = named if turn is Turn.REROUTE else []
        return bool((np.isin(ids_TK, live) | (weights_TK == 0)).all())
    if not _all_choose(routing, named):
        return False
    if turn not in (Turn.DROP, Turn.DROP_RENORM):
        return True
    if (weights_TK[ids_TK == named[0]] != 0).any():
        return False
    if turn is Turn.DROP or not layer.router.renormalize:
        return True
    sum_T = weights_TK.sum(axis=1)
    return bool(((sum_T == 0) | (np.abs(sum_T - 1) < _RESTORED_SUM_TOLERANCE)).all())


def _named(index: int, layer: MoELayer, turn: Turn, round_: int) -> list[int]:
    """The k experts that a turn is about: others in each layer, turn and round."""
    first = index + turn * layer.top_k + round_
    return [(first + i) % layer.num_experts for i in range(layer.top_k)]


def _all_choose(routing: _Routing, experts: Sequence[int]) -> bool:
    return all(sorted(row) == sorted(experts) for row in routing.ids_TK.tolist())


def _masked(layer: MoELayer, turn: Turn, method: MaskMethodCode, named: Sequence[int]) -> Sequence[int]:
    """The experts that a probe's action masks. Beside zero experts none is sure to be chosen, unless it
    is forced: so all are dropped there."""
    drops = turn in (Turn.DROP, Turn.DROP_RENORM)
    if layer.router.num_zero_experts and drops:
        return [] if method is MaskMethodCode.REROUTE else range(layer.num_experts)
    if method is MaskMethodCode.REROUTE:
        return [expert for expert in range(layer.num_experts) if expert not in named]
    return named if method is MaskMethodCode.FORCE else named[:1]


def _probe_masks(topology: Topology, round_: int) -> MaskTable:
    bits = np.zeros((len(topology.layers), topology.max_experts, 1), dtype=np.int64)
    for index, layer in enumerate(topology.layers):
        for action, (turn, method) in enumerate(_ACTIONS):
            masked = _masked(layer, turn, method, _named(index, layer, turn, round_))
            bits[index, list(masked)] |= 1 << action
    num_actions = len(_ACTIONS)
    return MaskTable(
        rule=np.zeros(num_actions, dtype=np.int64),
        method=np.array([method for _, method in _ACTIONS], dtype=np.int64),
        release=np.full(num_actions, MaskRelease.REQUEST_END, dtype=np.int64),
        tokens=np.zeros(num_actions, dtype=np.int64),
        static=np.ones(num_actions, dtype=np.bool_),
        expert_bits=bits,
    )
