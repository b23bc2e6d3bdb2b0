"""A topology in the words of lint."""

from __future__ import annotations

from guard.policy.lint.model_shape import LayerShape, ModelShape
from guard.program.topology import Topology


def shape_of(topology: Topology) -> ModelShape:
    return ModelShape(
        layers={layer.number: LayerShape(layer.num_experts, layer.top_k) for layer in topology.layers}
    )
