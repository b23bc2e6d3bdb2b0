"""Which units go first, from the choosing split alone.

Shapes: G topics (the target, then the benign ones), L layers, E experts, N neurons of an expert,
T tokens, H hidden size, B documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.ablation.texts import BENIGN, TARGET, Batch, Corpus, by_topic, loss_sums_B
from benchmarks.ablation.units import Layout, Order, Unit, down_parameters, layout, within_limit
from demo.names import Split

TOPICS: Final = (TARGET, *BENIGN)


class Method(StrEnum):
    """How a unit is judged. Activation: what it does more on the target than on benign text.
    Attribution: how much more the loss hangs on it there than here, to first order."""

    ACTIVATION = "activation"
    ATTRIBUTION = "attribution"


def orders(model: Any, choosing: Corpus, units: Sequence[Unit]) -> dict[tuple[Unit, Method], Order]:
    """The units by falling score."""
    assert choosing.split is Split.CHOOSE, "held-out text is for the measurement alone"
    sizes = layout(model)
    rates_GLE, means_GLEN, squares_GLEN = activations(model, choosing)
    by_expert_GLE, by_neuron_GLEN = attributions(model, choosing)
    spread_LEN = (squares_GLEN[1:].mean(0) - means_GLEN[1:].mean(0).square()).clamp(min=0).sqrt()
    neurons = {
        Method.ACTIVATION: over_benign(means_GLEN) / (spread_LEN + 1e-6),
        Method.ATTRIBUTION: over_benign(by_neuron_GLEN),
    }
    experts = {
        Method.ACTIVATION: over_benign(rates_GLE),
        Method.ATTRIBUTION: over_benign(by_expert_GLE),
    }
    return {
        (unit, method): _falling(scores[method], sizes, unit)
        for unit in units
        for scores in (neurons if unit is Unit.NEURONS else experts,)
        for method in Method
    }


def over_benign(values: Tensor) -> Tensor:
    """The target's value, less the mean over benign topics, each of which counts alike."""
    return values[0] - values[1:].mean(0)


def _falling(scores: Tensor, sizes: Layout, unit: Unit) -> Order:
    order = np.argsort(-scores.numpy(), axis=None, kind="stable")
    return within_limit(order, sizes, unit)


def activations(model: Any, texts: Corpus) -> tuple[Tensor, Tensor, Tensor]:
    """By topic, over all tokens of its documents: each expert's activation rate [G, L, E], and the
    mean and the mean square of each neuron's |activation| times its expert's weight [G, L, E, N].
    """
    sizes = layout(model)
    shape = (len(TOPICS), sizes.layers, sizes.experts)
    rates_GLE = torch.zeros(shape)
    sums_GLEN, squares_GLEN = (torch.zeros(*shape, sizes.neurons) for _ in range(2))
    tokens_G = torch.zeros(len(TOPICS))
    for at, batch in _parts(texts):
        is_real_T = batch.is_real_BT.flatten()
        tokens_G[at] += is_real_T.sum()
        with torch.no_grad(), _watched(model) as seen:
            model.model(batch.ids_BT, use_cache=False)
        for layer, (weights_TE, acts_TEN) in enumerate(seen.neurons):
            weights_TE, acts_TEN = weights_TE[is_real_T], acts_TEN[is_real_T]
            values_TEN = (acts_TEN * weights_TE[..., None]).abs()
            rates_GLE[at, layer] += (weights_TE > 0).sum(0)
            sums_GLEN[at, layer] += values_TEN.sum(0)
            squares_GLEN[at, layer] += values_TEN.square().sum(0)
    rates_GLE /= tokens_G[:, None, None]
    sums_GLEN /= tokens_G[:, None, None, None]
    squares_GLEN /= tokens_G[:, None, None, None]
    return rates_GLE, sums_GLEN, squares_GLEN


def attributions(model: Any, texts: Corpus) -> tuple[Tensor, Tensor]:
    """By topic, the mean over all tokens of what the loss would change by without an expert
    [G, L, E] or a neuron [G, L, E, N] there, to first order and whichever way: |activation times
    gradient|.

    Which way is left out on purpose. Of text with unknown words the loss falls when a model is less
    sure of itself, and units that make it so would seem to be the best to take out.
    """
    sizes = layout(model)
    downs = [weight.detach() for weight in down_parameters(model)]
    of_experts = torch.zeros(len(TOPICS), sizes.layers, sizes.experts)
    of_neurons = torch.zeros(*of_experts.shape, sizes.neurons)
    tokens_G = torch.zeros(len(TOPICS))
    for at, batch in _parts(texts):
        is_real_T = batch.is_real_BT.flatten()
        tokens_G[at] += is_real_T.sum()
        with _watched(model) as seen:
            loss = loss_sums_B(model, batch).sum()
        gradients = torch.autograd.grad(loss, seen.outputs)
        for layer, gradient in enumerate(gradients):
            costs_TEN = costs(*seen.neurons[layer], gradient.flatten(0, -2), downs[layer])[is_real_T]
            of_neurons[at, layer] += costs_TEN.abs().sum(0)
            of_experts[at, layer] += costs_TEN.sum(-1).abs().sum(0)
    return of_experts / tokens_G[:, None, None], of_neurons / tokens_G[:, None, None, None]


def costs(weights_TE: Tensor, acts_TEN: Tensor, gradient_TH: Tensor, down: Tensor) -> Tensor:
    """What the loss would grow by without a neuron at a token, to first order: [T, E, N].

    gradient_TH: of the loss, by what the feed-forward part puts out
    """
    down_EHN = down if down.ndim == 3 else down[None]
    pulls_TEN = torch.einsum("th,ehn->ten", gradient_TH, down_EHN)
    return -pulls_TEN * acts_TEN.detach() * weights_TE.detach()[..., None]


def _parts(texts: Corpus) -> Iterator[tuple[int, Batch]]:
    """Batches of one topic of those that choose, with its number."""
    for topic, batch in by_topic(texts):
        if topic in TOPICS:
            yield TOPICS.index(topic), batch


class _Seen(NamedTuple):
    """What each layer does: its experts' weights [T, E] and its neurons' activations [T, E, N]; and
    what it puts out, [B, T, H]."""

    neurons: list[tuple[Tensor, Tensor]]
    outputs: list[Tensor]


@contextmanager
def _watched(model: Any) -> Iterator[_Seen]:
    sizes, seen = layout(model), _Seen([], [])

    def keep_dense(_module: object, inputs: tuple[Tensor]) -> None:
        acts_TEN = inputs[0].flatten(0, -2)[:, None]
        seen.neurons.append((acts_TEN.new_ones(acts_TEN.shape[:2]), acts_TEN))

    @torch.no_grad()
    def keep_experts(experts: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        states_TH, ids_TK, weights_TK = inputs
        weights_TE = weights_TK.new_zeros(len(states_TH), sizes.experts).scatter(1, ids_TK, weights_TK)
        both = torch.einsum("th,enh->ten", states_TH, experts.gate_up_proj)
        gate_TEN, up_TEN = both.chunk(2, dim=-1)
        seen.neurons.append((weights_TE, experts.act_fn(gate_TEN) * up_TEN))

    def keep_output(_module: object, _inputs: object, output: Tensor) -> None:
        seen.outputs.append(output)

    with ExitStack() as hooks:
        for layer in model.model.layers:
            if sizes.experts == 1:
                handle = layer.mlp.down_proj.register_forward_pre_hook(keep_dense)
            else:
                handle = layer.mlp.experts.register_forward_pre_hook(keep_experts)
            hooks.callback(handle.remove)
            hooks.callback(layer.mlp.register_forward_hook(keep_output).remove)
        yield seen
