"""How evenly a model's experts are used: a few numbers for each layer, from counts of the selections.

p is the share of a layer's selections that each expert takes, q the profile's. Letters: L layers,
E experts of the largest layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from guard.events.message import LayerLoad, Load

Counts = NDArray[np.int64]
Shares = NDArray[np.float64]


class LayerCounts(msgspec.Struct, frozen=True):
    """counts: by logical expert id; load: None where no row chose an expert of the layer"""

    layer: int
    counts: list[int]
    load: LayerLoad | None = None


class ExpertCounts(msgspec.Struct, frozen=True):
    """All that was counted since the engine started. sampled_every: steps; 0: none is counted"""

    tokens: int
    sampled_every: int
    layers: list[LayerCounts]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ExpertCounts)


def encode_counts(counts: ExpertCounts) -> bytes:
    return _encoder.encode(counts)


def decode_counts(data: bytes) -> ExpertCounts:
    """Raises msgspec.DecodeError for anything else."""
    counts: ExpertCounts = _decoder.decode(data)
    return counts


def of_all_engines(counted: Sequence[ExpertCounts]) -> ExpertCounts:
    """Summed up over engines of one model; of several there is no divergence."""
    first = counted[0]
    if len(counted) == 1:
        return first
    layers = []
    for rows in zip(*(one.layers for one in counted), strict=True):
        counts_E: Counts = np.array([row.counts for row in rows], dtype=np.int64).sum(axis=0)
        number = rows[0].layer
        layers.append(LayerCounts(number, counts_E.tolist(), layer_load(number, counts_E)))
    return ExpertCounts(sum(one.tokens for one in counted), first.sampled_every, layers)


def layer_load(layer: int, counts_E: Counts, shares_E: Shares | None = None) -> LayerLoad | None:
    """effective_experts: 1/Σp²; entropy_nats: -Σ p·ln p; max_share: the largest p; divergence_nats:
    Σ p·ln(p/m)/2 + Σ q·ln(q/m)/2 with m = (p+q)/2, 0 to ln 2 (Jensen and Shannon's).

    shares_E: q; all 0 where the profile does not know the layer

    None where nothing was chosen.
    """
    total = int(counts_E.sum())
    if total == 0:
        return None
    p_E = counts_E / total
    divergence = None
    if shares_E is not None and shares_E.any():
        mean_E = (p_E + shares_E) / 2
        divergence = (_relative(p_E, mean_E) + _relative(shares_E, mean_E)) / 2
        divergence = min(max(divergence, 0.0), math.log(2))  # but for rounding
    return LayerLoad(
        layer=layer,
        effective_experts=float(1 / np.square(p_E).sum()),
        entropy_nats=max(0.0, -_relative(p_E, np.ones_like(p_E))),
        max_share=float(p_E.max()),
        divergence_nats=divergence,
    )


def _relative(p_E: Shares, of_E: Shares) -> float:
    """Σ p·ln(p/of), where 0·ln 0 is 0."""
    is_used_E = p_E > 0
    used_E = p_E[is_used_E]
    return float((used_E * np.log(used_E / of_E[is_used_E])).sum())


def layer_loads(
    layers: Sequence[int], counts_LE: Counts, shares_LE: Shares | None = None
) -> tuple[LayerLoad, ...]:
    """Of the layers that were used. layers: the model's own numbers"""
    found = [
        layer_load(number, counts_E, None if shares_LE is None else shares_LE[row])
        for row, (number, counts_E) in enumerate(zip(layers, counts_LE, strict=True))
    ]
    return tuple(load for load in found if load is not None)


def baseline_of(shares_ZLE: Shares) -> Shares | None:
    """[L, E], of each layer the first baseline that knows it, in deciding order; None where none is."""
    if not shares_ZLE.any():
        return None
    knows_ZL = shares_ZLE.any(axis=2)
    first_L = knows_ZL.argmax(axis=0)
    baseline_LE: Shares = shares_ZLE[first_L, np.arange(len(first_L))]
    return baseline_LE


class LoadWindow:
    """One engine's: what came since the last summary that got out."""

    def __init__(self, engine: int, layers: Sequence[int], max_experts: int) -> None:
        self._engine = engine
        self._layers = tuple(layers)
        self._tokens = 0
        self._counts_LE = np.zeros((len(self._layers), max_experts), dtype=np.int64)

    def summary(self, tokens: int, counts_LE: Counts, shares_LE: Shares | None) -> Load | None:
        """None where nothing came. tokens, counts_LE: from the engine's start on"""
        if tokens == self._tokens:
            return None
        loads = layer_loads(self._layers, counts_LE - self._counts_LE, shares_LE)
        return Load(self._engine, tokens - self._tokens, loads)

    def close(self, tokens: int, counts_LE: Counts) -> None:
        """What was summed up has got out: the next window begins here."""
        self._tokens, self._counts_LE = tokens, counts_LE
