"""How many experts a model has and chooses, as far as a policy, its profile or a topology tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from guard.policy.model import Policy


class LayerShape(NamedTuple):
    """None where it is not known."""

    experts: int | None = None
    top_k: int | None = None


@dataclass(frozen=True, slots=True)
class ModelShape:
    """layers: by layer number, all MoE layers of the model; empty where only `every` is known
    every: what is known of each layer that `layers` does not have
    """

    layers: Mapping[int, LayerShape] = field(default_factory=dict)
    every: LayerShape = field(default_factory=LayerShape)

    def layer(self, number: int) -> LayerShape:
        return self.layers.get(number, self.every)

    def all_layers(self) -> tuple[LayerShape, ...]:
        """Of all MoE layers, or one that stands for them."""
        return tuple(self.layers.values()) or (self.every,)


def shape_for(policy: Policy) -> ModelShape:
    """What the policy itself says of its model: it is served by no other."""
    said = [policy.model] if policy.model else []
    said += [profile.model for profile in policy.profiles]
    return ModelShape(
        every=LayerShape(
            next((model.experts for model in said if model.experts is not None), None),
            next((model.top_k for model in said if model.top_k is not None), None),
        )
    )
