"""Golden prompts: does a model still route them as it did?

Swapped weights, damage by quantisation and a planted backdoor show in routing, layer by layer (as
SafeMoE's drift does, arXiv 2509.22745).
Only prompts' own tokens are compared, since answers that differ are other tokens. What comes behind a
layer that drifts drifts as well, if less: look at the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.discover.errors import DiscoverError
from guard.program.topology import Topology
from guard.program.verdict import Routing
from guard.trace.reader import TraceReader

Floats = NDArray[np.float64]

DEFAULT_LIMIT: Final = 0.01
"""Nats. Between runs of the same weights in other batches or another precision some tokens choose
another last expert; between topics it is some .3 (RASET, arXiv 2605.29708)."""


class LayerDrift(NamedTuple):
    """layer: the model's own number
    divergence: Jensen-Shannon, in nats, of how often each expert is chosen
    agreement: the share of choices that are the same, token by token
    """

    layer: int
    divergence: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Drift:
    layers: Sequence[LayerDrift]
    prompts: int
    tokens: int

    def beyond(self, limit: float) -> list[LayerDrift]:
        return [layer for layer in self.layers if layer.divergence > limit]


def jensen_shannon(one_E: Floats, other_E: Floats) -> float:
    """In nats, 0 to ln 2, of two histograms that need not be normalised (Lin 1991)."""
    p_E, q_E = one_E / one_E.sum(), other_E / other_E.sum()
    middle_E = (p_E + q_E) / 2

    def divergence(of_E: Floats) -> float:
        is_there_E = of_E > 0
        return float((of_E[is_there_E] * np.log(of_E[is_there_E] / middle_E[is_there_E])).sum())

    return max(0.0, (divergence(p_E) + divergence(q_E)) / 2)


def compare(golden: Path, now: Path) -> Drift:
    """Two traces of the same prompts, by their ids.

    Raises DiscoverError where they are not of the same prompts and shape; TraceError.
    """
    before, after = TraceReader(golden), TraceReader(now)
    topology = before.header.topology
    if after.header.topology.sizes != topology.sizes:
        raise DiscoverError(
            f"{now}: its model has other MoE layers than that of {golden}: it is another model"
        )
    routing_of = {request.request_id: request.routing for request in after}
    histograms = _Histograms(topology)
    num_prompts = 0
    for request in before:
        if request.request_id not in routing_of:
            raise DiscoverError(f"{now}: has no prompt {request.request_id} of {golden}")
        histograms.add(request.request_id, request.routing, routing_of[request.request_id], now)
        num_prompts += 1
    if not histograms.num_tokens:
        raise DiscoverError(f"{golden}: holds no prompt whose routing was seen")
    return Drift(histograms.layers(), num_prompts, histograms.num_tokens)


class _Histograms:
    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        shape = (len(topology.layers), topology.max_experts)
        self._counts = [np.zeros(shape), np.zeros(shape)]
        self._same_L = np.zeros(len(topology.layers))
        self._chosen_L = np.zeros(len(topology.layers))
        self.num_tokens = 0

    def add(self, name: str, golden: Routing, now: Routing, file: Path) -> None:
        num_tokens = golden.num_prompt_tokens
        if now.num_prompt_tokens != num_tokens:
            raise DiscoverError(
                f"{file}: prompt {name} has {now.num_prompt_tokens} tokens and had {num_tokens}: it is "
                "another prompt, or the tokenizer is another one"
            )
        positions = [p for p in range(num_tokens) if golden.is_seen(p) and now.is_seen(p)]
        self.num_tokens += len(positions)
        ids = [routing.topk_ids[positions] for routing in (golden, now)]
        for layer in range(len(self._topology.layers)):
            golden_TK, now_TK = (part[:, layer] for part in ids)
            for counts_LE, ids_TK in zip(self._counts, (golden_TK, now_TK), strict=True):
                self._add_counts(counts_LE[layer], ids_TK)
            is_same_TK = (golden_TK[:, :, None] == now_TK[:, None, :]).any(axis=2) & (golden_TK >= 0)
            self._same_L[layer] += is_same_TK.sum()
            self._chosen_L[layer] += (golden_TK >= 0).sum()

    @staticmethod
    def _add_counts(counts_E: Floats, ids_TK: NDArray[np.int32]) -> None:
        counts_E += np.bincount(ids_TK[ids_TK >= 0], minlength=len(counts_E))

    def layers(self) -> list[LayerDrift]:
        golden_LE, now_LE = self._counts
        return [
            LayerDrift(
                layer.number,
                jensen_shannon(golden_LE[row], now_LE[row]),
                float(self._same_L[row] / self._chosen_L[row]),
            )
            for row, layer in enumerate(self._topology.layers)
        ]
