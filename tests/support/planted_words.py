"""Routing made up of tokens: each has experts of its own, and some are planted beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from guard.program.topology import MoELayer, Topology
from guard.program.verdict import Routing
from guard.trace.format import TracedRequest


@dataclass(frozen=True)
class PlantedWords:
    """Each prompt has two tokens and an output, of a vocabulary whose halves the labels prefer.

    tilt: the share of a prompt's tokens that are of its label's half; the others are of any
    effect: by how much a target prompt's logits of the planted experts are raised, whatever the token
    """

    tilt: float = 0.0
    effect: float = 0.0
    layers: int = 4
    experts: int = 16
    top_k: int = 2
    pairs: int = 60
    tokens: int = 40
    vocabulary: int = 8
    seed: int = 0

    @property
    def topology(self) -> Topology:
        layers = (MoELayer(number, self.experts, self.top_k) for number in range(self.layers))
        return Topology("PlantedForCausalLM", tuple(layers))

    @property
    def planted_experts(self) -> list[tuple[int, int]]:
        """(layer, expert): one of each layer."""
        return [(layer, (3 * layer + 1) % self.experts) for layer in range(self.layers)]

    def requests(self) -> Iterator[TracedRequest]:
        generator = np.random.default_rng(self.seed)
        of_token_VLE = generator.normal(0, 2, (self.vocabulary, self.layers, self.experts))
        for pair in range(self.pairs):
            for label in ("target", "benign"):
                token_ids = self._token_ids(label == "target", generator)
                logits_TLE = of_token_VLE[token_ids].copy()
                if label == "target":
                    for layer, expert in self.planted_experts:
                        logits_TLE[:, layer, expert] += self.effect
                scores_TLE = logits_TLE + generator.gumbel(size=logits_TLE.shape)
                ids_TLK = np.argpartition(-scores_TLE, self.top_k - 1, axis=-1)[..., : self.top_k]
                weights_TLK = np.full(ids_TLK.shape, 1 / self.top_k, np.float32)
                routing = Routing(ids_TLK.astype(np.int32), weights_TLK, 2)
                labels = {"label": label, "pair_id": f"{pair}"}
                yield TracedRequest(routing, labels=labels, token_ids=1000 * token_ids.astype(np.int32))

    def _token_ids(self, is_target: bool, generator: np.random.Generator) -> np.ndarray:
        half, positions = self.vocabulary // 2, self.tokens + 2
        own = generator.integers(half, size=positions) + (0 if is_target else half)
        is_own = generator.random(positions) < self.tilt
        return np.where(is_own, own, generator.integers(self.vocabulary, size=positions))
