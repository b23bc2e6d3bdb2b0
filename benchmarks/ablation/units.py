"""What can be taken out of a model, and a model that runs without it.

Shapes: L layers, E experts (1 in a dense model), N neurons of an expert, H hidden size, T tokens,
K chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Order = NDArray[np.intp]
"""Units as flat numbers, those that go first in front."""


class Unit(StrEnum):
    """A kind of unit. An expert goes before top-k, so that the next best comes in, or behind it, so
    that its weight is lost."""

    NEURONS = "neurons"
    REROUTED = "experts, rerouted"
    DROPPED = "experts, dropped"


class Layout(NamedTuple):
    """The sizes of a model's feed-forward part."""

    layers: int
    experts: int
    neurons: int
    top_k: int
    hidden: int

    def shape(self, unit: Unit) -> tuple[int, ...]:
        return (self.layers, self.experts, self.neurons)[: 3 if unit is Unit.NEURONS else 2]

    def parameters(self, unit: Unit) -> int:
        """Of one unit: a neuron has a row of gate, a row of up and a column of down."""
        return 3 * self.hidden * (1 if unit is Unit.NEURONS else self.neurons)


def layout(model: Any) -> Layout:
    config = model.config
    if hasattr(config, "num_experts_per_tok"):
        return Layout(
            config.num_hidden_layers,
            config.num_experts,
            config.moe_intermediate_size,
            config.num_experts_per_tok,
            config.hidden_size,
        )
    return Layout(config.num_hidden_layers, 1, config.intermediate_size, 1, config.hidden_size)


def units_of(model: Any) -> tuple[Unit, ...]:
    return tuple(Unit) if layout(model).experts > 1 else (Unit.NEURONS,)


def down_parameters(model: Any) -> list[torch.nn.Parameter]:
    """The down projection of each layer: [E, H, N], or [H, N] in a dense model."""
    mlps = [layer.mlp for layer in model.model.layers]
    return [mlp.experts.down_proj if hasattr(mlp, "experts") else mlp.down_proj.weight for mlp in mlps]


def within_limit(order: Order, sizes: Layout, unit: Unit) -> Order:
    """Of experts, so many of each layer stay as a token chooses; who comes too late is left out."""
    if unit is Unit.NEURONS:
        return order
    left = [sizes.experts - sizes.top_k] * sizes.layers
    kept = []
    for number in order.tolist():
        layer = number // sizes.experts
        if left[layer]:
            left[layer] -= 1
            kept.append(number)
    return np.array(kept, np.intp)


def random_order(sizes: Layout, unit: Unit, seed: int) -> Order:
    """All units, shuffled: the control, of which as many are taken as of the chosen ones."""
    count = int(np.prod(sizes.shape(unit)))
    return within_limit(np.random.default_rng(seed).permutation(count), sizes, unit)


def first_of(order: Order, count: int, sizes: Layout, unit: Unit) -> Tensor:
    """Whether a unit is among the first `count`: bool of the unit's shape."""
    gone = np.zeros(sizes.shape(unit), bool)
    gone.reshape(-1)[order[:count]] = True
    return torch.from_numpy(gone)


@contextmanager
def ablated(model: Any, unit: Unit, gone: Tensor) -> Iterator[None]:
    """The model without some units, and whole again afterwards. gone: [L, E, N] or [L, E], bool"""
    with ExitStack() as undo:
        if unit is Unit.NEURONS:
            for weight, gone_EN in zip(down_parameters(model), gone, strict=True):
                undo.callback(_restore, weight, weight.detach().clone())
                columns = gone_EN[:, None] if weight.ndim == 3 else gone_EN
                weight.data.masked_fill_(columns, 0.0)
        else:
            for layer, gone_E in zip(model.model.layers, gone, strict=True):
                hook = _Rerouting(gone_E) if unit is Unit.REROUTED else _Dropping(gone_E)
                undo.callback(layer.mlp.gate.register_forward_hook(hook).remove)
        yield


def _restore(weight: torch.nn.Parameter, before: Tensor) -> None:
    weight.data.copy_(before)


Routed = tuple[Tensor, Tensor, Tensor]
"""What a gate gives: logits [T, E], weights and experts [T, K]."""


class _Rerouting(NamedTuple):
    gone_E: Tensor

    def __call__(self, gate: Any, _inputs: object, routed: Routed) -> Routed:
        logits_TE, _, _ = routed
        scores_TE = logits_TE.softmax(-1, dtype=torch.float)
        ids_TK = logits_TE.masked_fill(self.gone_E, -torch.inf).topk(gate.top_k).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        if gate.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK.to(logits_TE.dtype), ids_TK


class _Dropping(NamedTuple):
    gone_E: Tensor

    def __call__(self, _gate: object, _inputs: object, routed: Routed) -> Routed:
        logits_TE, weights_TK, ids_TK = routed
        return logits_TE, weights_TK.masked_fill(self.gone_E[ids_TK], 0.0), ids_TK
