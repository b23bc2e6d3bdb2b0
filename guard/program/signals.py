"""Collects the signals and readings that conditions need, each once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from guard.policy.model import Expert, NamedWindow, Phase, Window
from guard.program.program import (
    TOKEN_SIGNAL,
    Floats,
    ReadingTable,
    SignalTable,
    WindowKind,
)
from guard.program.topology import Topology

FIXED_POINT = 10**9
"""Nine decimals: every decimal weight an operator is likely to write is whole at this scale, and a gate
weight in float32 (24 significant bits) loses nothing that a threshold could tell."""


class SignalBuilder:
    """Equal weights are one signal, and the same signal over the same window is one reading."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._unit: dict[bytes, int] = {}
        self._mass: dict[bytes, int] = {}
        self._unit_weights: list[Floats] = []
        self._mass_weights: list[Floats] = []
        self._unit_scale: list[float] = []
        self._readings: dict[tuple[str, int, WindowKind, int, bool], int] = {}

    def unit(self, weights: Mapping[Expert, float]) -> int:
        """A signal of Σ w(l,e) over the chosen experts; its number among the unit signals."""
        largest = max(map(abs, weights.values()), default=1.0)
        whole = all(float(weight).is_integer() for weight in weights.values())
        digits = 0 if whole else 9 - max(0, math.ceil(math.log10(largest)))
        table = self._table(weights, 10.0**digits)
        key = table.tobytes() + str(digits).encode()
        if key not in self._unit:
            self._unit[key] = len(self._unit_weights)
            self._unit_weights.append(table)
            self._unit_scale.append(10.0**digits)
        return self._unit[key]

    def mass(self, weights: Mapping[Expert, float]) -> int:
        """A signal of Σ g·w(l,e) over the chosen experts; its number among the mass signals."""
        table = self._table(weights, FIXED_POINT)
        key = table.tobytes()
        if key not in self._mass:
            self._mass[key] = len(self._mass_weights)
            self._mass_weights.append(table)
        return self._mass[key]

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

    def _table(self, weights: Mapping[Expert, float], scale: float) -> Floats:
        index_of_layer = self._topology.index_of_layer
        table = np.zeros((len(self._topology.layers), self._topology.max_experts))
        for expert, weight in weights.items():
            table[index_of_layer[expert.layer], expert.id] = round(weight * scale)
        return table


def _stack(tables: list[Floats], shape: tuple[int, int]) -> NDArray[np.float64]:
    return np.stack(tables) if tables else np.zeros((0, *shape))
