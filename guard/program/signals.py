"""Collects the signals and readings that conditions need, each once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.policy.model import Expert, NamedWindow, Phase, Together, TogetherIn, Window
from guard.program.program import (
    TOKEN_SIGNAL,
    Floats,
    IndicatorTable,
    ReadingTable,
    SignalTable,
    SparseWeights,
    WindowKind,
)
from guard.program.topology import Topology

FIXED_POINT = 10**9
"""Nine decimals: every decimal weight an operator is likely to write is whole at this scale, and a gate
weight in float32 (24 significant bits) loses nothing that a threshold could tell."""

SignalKind = Literal["token", "unit", "spread", "mass", "layer mass", "indicator"]


class Signal(NamedTuple):
    """A signal by its number among those of its kind: its row in the table is known in the end."""

    kind: SignalKind
    number: int


TOKENS = Signal("token", 0)


class _Weights(NamedTuple):
    """The weights of a signal that are not 0: [n] each, by place in a flattened [L, E], or in [L]."""

    place: NDArray[np.int32]
    value: Floats

    @property
    def key(self) -> bytes:
        return self.place.tobytes() + self.value.tobytes()


class SignalBuilder:
    """Equal weights are one signal, and the same signal over the same window is one reading."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._index_of_layer = topology.index_of_layer
        self._numbers: dict[tuple[SignalKind, object], int] = {}
        self._weights: dict[SignalKind, list[_Weights]] = {
            "unit": [],
            "spread": [],
            "mass": [],
            "layer mass": [],
        }
        self._unit_scale: list[float] = []
        self._indicators: list[tuple[Signal, int]] = []
        self._readings: dict[tuple[Signal, WindowKind, int, bool], int] = {}

    def unit(self, weights: Mapping[Expert, float]) -> Signal:
        """Σ w(l,e) over the chosen experts."""
        largest = max(map(abs, weights.values()), default=1.0)
        whole = all(float(weight).is_integer() for weight in weights.values())
        digits = 0 if whole else 9 - max(0, math.ceil(math.log10(largest)))
        scale = 10.0**digits
        signal, is_new = self._signal("unit", self._scaled(weights, scale), digits)
        if is_new:
            self._unit_scale.append(scale)
        return signal

    def members(self, experts: Iterable[Expert]) -> Signal:
        """How many of some experts were chosen."""
        return self.unit(dict.fromkeys(experts, 1.0))

    def spread(self, experts: Iterable[Expert]) -> Signal:
        """In how many layers at least one of some experts was chosen."""
        return self._signal("spread", self._scaled(dict.fromkeys(experts, 1.0), 1.0))[0]

    def together(self, experts: Iterable[Expert], together: Together) -> Signal:
        """1 where a token used that much of a set, else 0."""
        match together.of:
            case TogetherIn.MEMBERS:
                of = self.members(experts)
            case TogetherIn.LAYERS:
                of = self.spread(experts)
        number = self._numbers.setdefault(("indicator", (of, together.least)), len(self._indicators))
        if number == len(self._indicators):
            self._indicators.append((of, together.least))
        return Signal("indicator", number)

    def mass(self, experts: Iterable[Expert]) -> Signal:
        """Σ g over the chosen ones of some experts."""
        weights = self._scaled(dict.fromkeys(experts, 1.0), FIXED_POINT)
        return self._signal("mass", weights)[0]

    def layer_mass(self, numbers: Iterable[int]) -> Signal:
        """Σ g over all chosen experts of some layers."""
        place = np.array(sorted(self._index_of_layer[n] for n in set(numbers)), dtype=np.int32)
        weights = _Weights(place, np.full(len(place), float(FIXED_POINT)))
        return self._signal("layer mass", weights)[0]

    def _signal(self, kind: SignalKind, weights: _Weights, also: int = 0) -> tuple[Signal, bool]:
        """The signal, and whether there was none like it."""
        of_kind = self._weights[kind]
        number = self._numbers.setdefault((kind, (weights.key, also)), len(of_kind))
        is_new = number == len(of_kind)
        if is_new:
            of_kind.append(weights)
        return Signal(kind, number), is_new

    def reading(self, signal: Signal, over: Window, phase: Phase) -> int:
        """Row of the reading table for a signal over a window."""
        window: tuple[WindowKind, int, bool]
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
        return self._readings.setdefault((signal, *window), len(self._readings))

    def signal_row(self, signal: Signal) -> int:
        """Row of the signal table; only right once every signal has been added."""
        if signal.kind == "token":
            return TOKEN_SIGNAL
        row = 1 + signal.number
        for kind, of_kind in self._weights.items():
            if kind == signal.kind:
                return row
            row += len(of_kind)
        return row

    def tables(self) -> tuple[SignalTable, ReadingTable]:
        tables = {kind: _stack(of_kind) for kind, of_kind in self._weights.items()}
        num_masses = len(tables["mass"]) + len(tables["layer mass"])
        scale = [1.0, *self._unit_scale, *[1.0] * len(tables["spread"]), *[FIXED_POINT] * num_masses]
        signals = SignalTable(
            unit=tables["unit"],
            spread=tables["spread"],
            mass=tables["mass"],
            layer_mass=tables["layer mass"],
            indicators=IndicatorTable(
                np.array([self.signal_row(of) for of, _ in self._indicators], dtype=np.int64),
                np.array([least for _, least in self._indicators], dtype=np.int64),
            ),
            scale=np.array([*scale, *[1.0] * len(self._indicators)], dtype=np.float64),
        )
        keys = list(self._readings)
        readings = ReadingTable(
            signal=np.array([self.signal_row(key[0]) for key in keys], dtype=np.int64),
            window=np.array([key[1] for key in keys], dtype=np.int64),
            tokens=np.array([key[2] for key in keys], dtype=np.int64),
            in_output=np.array([key[3] for key in keys], dtype=np.bool_),
        )
        return signals, readings

    def _scaled(self, weights: Mapping[Expert, float], scale: float) -> _Weights:
        row, num_experts = self._index_of_layer, self._topology.max_experts
        place = np.array([row[layer] * num_experts + id_ for layer, id_ in weights], dtype=np.int32)
        value = np.rint(np.array(list(weights.values()), dtype=np.float64) * scale)
        order = np.argsort(place)
        order = order[value[order] != 0]
        return _Weights(place[order], value[order])


def _stack(signals: Sequence[_Weights]) -> SparseWeights:
    none = SparseWeights.none()
    return SparseWeights(
        start=np.cumsum([0, *(len(weights.place) for weights in signals)], dtype=np.int64),
        place=np.concatenate([none.place, *(weights.place for weights in signals)]),
        value=np.concatenate([none.value, *(weights.value for weights in signals)]),
    )
