"""Collects the signals and readings that conditions need, each once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from guard.policy.model import Expert, NamedWindow, Phase, Window
from guard.program.program import (
    TOKEN_SIGNAL,
    Floats,
    Ints,
    ReadingTable,
    SignalTable,
    WindowKind,
)
from guard.program.topology import Topology

FIXED_POINT = 10**9
"""Nine decimals: every decimal weight an operator is likely to write is whole at this scale, and a gate
weight in float32 (24 significant bits) loses nothing that a threshold could tell."""


class _Weights(NamedTuple):
    """The weights of a signal that are not 0: [n] each, by place in a flattened [L, E]."""

    place: Ints
    value: Floats

    @property
    def key(self) -> bytes:
        return self.place.tobytes() + self.value.tobytes()


class SignalBuilder:
    """Equal weights are one signal, and the same signal over the same window is one reading."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._unit: dict[bytes, int] = {}
        self._mass: dict[bytes, int] = {}
        self._unit_weights: list[_Weights] = []
        self._mass_weights: list[_Weights] = []
        self._unit_scale: list[float] = []
        self._readings: dict[tuple[str, int, WindowKind, int, bool], int] = {}

    def unit(self, weights: Mapping[Expert, float]) -> int:
        """A signal of Σ w(l,e) over the chosen experts; its number among the unit signals."""
        largest = max(map(abs, weights.values()), default=1.0)
        whole = all(float(weight).is_integer() for weight in weights.values())
        digits = 0 if whole else 9 - max(0, math.ceil(math.log10(largest)))
        scaled = self._scaled(weights, 10.0**digits)
        key = scaled.key + str(digits).encode()
        if key not in self._unit:
            self._unit[key] = len(self._unit_weights)
            self._unit_weights.append(scaled)
            self._unit_scale.append(10.0**digits)
        return self._unit[key]

    def mass(self, weights: Mapping[Expert, float]) -> int:
        """A signal of Σ g·w(l,e) over the chosen experts; its number among the mass signals."""
        return self._mass_signal(self._scaled(weights, FIXED_POINT))

    def layer_mass(self, numbers: Iterable[int]) -> int:
        """As `mass`, with weight 1 on every expert of some layers."""
        num_experts = self._topology.max_experts
        chosen = set(numbers)
        place = np.concatenate(
            [
                index * num_experts + np.arange(layer.num_experts)
                for index, layer in enumerate(self._topology.layers)
                if layer.number in chosen
            ]
        )
        return self._mass_signal(_Weights(place, np.full(len(place), float(FIXED_POINT))))

    def _mass_signal(self, scaled: _Weights) -> int:
        if scaled.key not in self._mass:
            self._mass[scaled.key] = len(self._mass_weights)
            self._mass_weights.append(scaled)
        return self._mass[scaled.key]

    def reading(self, kind: str, signal: int, over: Window, phase: Phase) -> int:
        """Row of the reading table for a signal of the kind `token`, `unit` or `mass` over a window."""
        match over:
            case NamedWindow.REQUEST:
                window = (WindowKind.REQUEST, 0, False)
            case NamedWindow.PROMPT:
                window = (WindowKind.PROMPT, 0, False)
            case NamedWindow.OUTPUT:
                window = (WindowKind.OUTPUT, 0, False)
            case NamedWindow.TOKEN:
                window = (WindowKind.RECENT, 1, False)
            case tokens:
                window = (WindowKind.RECENT, int(tokens), phase is Phase.OUTPUT)
        return self._readings.setdefault((kind, signal, *window), len(self._readings))

    def signal_row(self, kind: str, signal: int) -> int:
        """Row of the signal table; only right once every signal has been added."""
        match kind:
            case "token":
                return TOKEN_SIGNAL
            case "unit":
                return 1 + signal
            case _:
                return 1 + len(self._unit_weights) + signal

    def tables(self) -> tuple[SignalTable, ReadingTable]:
        shape = (len(self._topology.layers), self._topology.max_experts)
        signals = SignalTable(
            unit_weights=_stack(self._unit_weights, shape),
            mass_weights=_stack(self._mass_weights, shape),
            scale=np.array(
                [1.0, *self._unit_scale, *[FIXED_POINT] * len(self._mass_weights)], dtype=np.float64
            ),
        )
        keys = list(self._readings)
        readings = ReadingTable(
            signal=np.array([self.signal_row(key[0], key[1]) for key in keys], dtype=np.int64),
            window=np.array([key[2] for key in keys], dtype=np.int64),
            tokens=np.array([key[3] for key in keys], dtype=np.int64),
            in_output=np.array([key[4] for key in keys], dtype=np.bool_),
        )
        return signals, readings

    def _scaled(self, weights: Mapping[Expert, float], scale: float) -> _Weights:
        row, num_experts = self._topology.index_of_layer, self._topology.max_experts
        place = np.array([row[layer] * num_experts + id_ for layer, id_ in weights], dtype=np.int64)
        value = np.rint(np.array(list(weights.values()), dtype=np.float64) * scale)
        order = np.argsort(place)
        order = order[value[order] != 0]
        return _Weights(place[order], value[order])


def _stack(signals: list[_Weights], shape: tuple[int, int]) -> Floats:
    tables = np.zeros((len(signals), *shape))
    for table, weights in zip(tables, signals, strict=True):
        table.reshape(-1)[weights.place] = weights.value
    return tables
