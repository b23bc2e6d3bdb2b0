"""Routing made up for finders of experts: some are planted, and prompts differ by topic as well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from guard.program.topology import MoELayer, Topology
from guard.program.verdict import Routing
from guard.trace.format import TracedRequest


@dataclass(frozen=True)
class Planted:
    """Each pair has a topic, which decides as much as anything which experts its prompts choose; each
    prompt has ways of its own; and a target prompt has the planted experts raised.

    effect, topic, own: of logits, where a token's own noise is Gumbel's
    """

    layers: int = 12
    experts: int = 32
    top_k: int = 4
    pairs: int = 120
    tokens: int = 60
    planted: int = 6
    effect: float = 1.5
    topic: float = 1.0
    own: float = 0.5
    categories: int = 4
    seed: int = 0

    @property
    def topology(self) -> Topology:
        layers = (MoELayer(number, self.experts, self.top_k) for number in range(self.layers))
        return Topology("PlantedForCausalLM", tuple(layers))

    @property
    def planted_experts(self) -> list[tuple[int, int]]:
        """(layer, expert), no two in one layer."""
        generator = np.random.default_rng([self.seed, 1])
        layers = generator.choice(self.layers, self.planted, replace=False)
        return [(int(layer), int(generator.integers(self.experts))) for layer in sorted(layers)]

    def requests(self) -> Iterator[TracedRequest]:
        generator = np.random.default_rng([self.seed, 2])
        shape = (self.layers, self.experts)
        categories = generator.normal(0, self.topic, (self.categories, *shape))
        for pair in range(self.pairs):
            category = pair % self.categories
            of_pair = categories[category] + generator.normal(0, self.topic / 2, shape)
            for label in ("target", "benign"):
                logits_LE = of_pair + generator.normal(0, self.own, shape)
                if label == "target":
                    for place in self.planted_experts:
                        logits_LE[place] += self.effect
                labels = {"label": label, "pair_id": f"{pair}", "category": f"topic-{category}"}
                yield TracedRequest(self._routing(logits_LE, generator), labels=labels)

    def _routing(self, logits_LE: np.ndarray, generator: np.random.Generator) -> Routing:
        """Two tokens of prompt, then the output."""
        noise_TLE = generator.gumbel(size=(self.tokens + 2, *logits_LE.shape))
        scores_TLE = logits_LE + noise_TLE
        ids_TLK = np.argpartition(-scores_TLE, self.top_k - 1, axis=-1)[..., : self.top_k]
        weights_TLK = np.exp(np.take_along_axis(scores_TLE, ids_TLK, axis=-1))
        weights_TLK /= weights_TLK.sum(axis=-1, keepdims=True)
        return Routing(ids_TLK.astype(np.int32), weights_TLK.astype(np.float32), 2)
