"""Collects the signals and readings that conditions need, each once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.policy.model import Expert, NamedWindow, Phase, Together, TogetherIn, Window
from guard.program.distribution_table import DistributionTable
from guard.program.program import (
    TOKEN_SIGNAL,
    Floats,
    IndicatorTable,
    Ints,
    Program,
    ReadingTable,
    SignalTable,
    SparseWeights,
    WindowKind,
)
from guard.program.topology import Topology

FIXED_POINT = 10**9
"""Nine decimals: every decimal weight an operator is likely to write is whole at this scale, and a gate
weight in float32 (24 significant bits) loses nothing that a threshold could tell."""

SignalKind = Literal["token", "unit", "spread", "mass", "layer mass", "indicator", "experts"]


class Signal(NamedTuple):
    """A signal by its number among those of its kind: its row in the table is known in the end."""

    kind: SignalKind
    number: int


TOKENS = Signal("token", 0)
"""Of the oldest epoch; of a later one the number is its epoch."""


class _Weights(NamedTuple):
    """The weights of a signal that are not 0: [n] each, by place in a flattened [L, E], or in [L]."""

    place: NDArray[np.int32]
    value: Floats

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.place.tobytes() + self.value.tobytes()).hexdigest()[:32]


class _Places(NamedTuple):
    """Where the experts of a mapping are, rising, and which of them each is."""

    experts: Mapping[Expert, float]  # kept alive: it is known by its identity
    place: NDArray[np.int32]
    order: Ints


class Identity(NamedTuple):
    """What a signal counts, and from which program's coming on."""

    content: str
    epoch: int

    @property
    def key(self) -> str:
        return f"{self.content}@{self.epoch}"


class SignalBuilder:
    """Equal weights are one signal, and the same signal over the same window is one reading.

    after: the program before, if a running one is replaced: what it counts goes on, anything else
        counts from now on, which is the epoch `epoch`
    """

    def __init__(self, topology: Topology, after: Program | None = None, epoch: int = 0) -> None:
        self._topology = topology
        self._index_of_layer = topology.index_of_layer
        self._epoch = epoch
        self._epochs: set[int] = set()
        # Where nothing is counted any more, what the program before saw still is what was seen.
        self._oldest = epoch if after is None else after.signals.epochs[TOKEN_SIGNAL]
        self._known: dict[str, set[int]] = {}
        for key in () if after is None else (*after.signals.keys, *after.distributions.keys):
            content, _, since = key.rpartition("@")
            self._known.setdefault(content, set()).add(int(since))
        self._numbers: dict[Identity, int] = {}
        self._identities: dict[SignalKind, list[Identity]] = {
            "unit": [],
            "spread": [],
            "mass": [],
            "layer mass": [],
            "indicator": [],
            "experts": [],
        }
        self._weights: dict[SignalKind, list[_Weights]] = {
            "unit": [],
            "spread": [],
            "mass": [],
            "layer mass": [],
        }
        self._places: dict[int, _Places] = {}
        self._unit_scale: list[float] = []
        self._indicators: list[tuple[Signal, int]] = []
        self._readings: dict[tuple[Signal, WindowKind, int, bool], int] = {}

    def unit(self, weights: Mapping[Expert, float]) -> Signal:
        """Σ w(l,e) over the chosen experts."""
        largest = max(map(abs, weights.values()), default=1.0)
        whole = all(map(float.is_integer, map(float, weights.values())))
        digits = 0 if whole else 9 - max(0, math.ceil(math.log10(largest)))
        scale = 10.0**digits
        signal = self._signal("unit", self._scaled(weights, scale), also=f" in {digits} digits")
        if signal.number == len(self._unit_scale):
            self._unit_scale.append(scale)
        return signal

    def members(self, experts: Mapping[Expert, float]) -> Signal:
        """How many of some experts were chosen, whatever their weights."""
        signal = self._signal("unit", self._equal(experts, 1.0), also=" in 0 digits")
        if signal.number == len(self._unit_scale):
            self._unit_scale.append(1.0)
        return signal

    def spread(self, experts: Mapping[Expert, float]) -> Signal:
        """In how many layers at least one of some experts was chosen."""
        return self._signal("spread", self._equal(experts, 1.0))

    def together(self, experts: Mapping[Expert, float], together: Together) -> Signal:
        """1 where a token used that much of a set, else 0."""
        match together.of:
            case TogetherIn.MEMBERS:
                of = self.members(experts)
            case TogetherIn.LAYERS:
                of = self.spread(experts)
        content = f"indicator:{self._identities[of.kind][of.number].content} >= {together.least}"
        signal = self._identified("indicator", content)
        if signal.number == len(self._indicators):
            self._indicators.append((of, together.least))
        return signal

    def mass(self, experts: Mapping[Expert, float]) -> tuple[Signal, Signal]:
        """Σ g over the chosen ones of some experts, and Σ g over all that were chosen in their layers.
        Both of one epoch: the share of one in the other is only right of the same tokens."""
        part = self._equal(experts, FIXED_POINT)
        place = np.unique(part.place // max(1, self._topology.max_experts))
        whole = _Weights(place, np.full(len(place), float(FIXED_POINT)))
        of_part, of_whole = _content("mass", part), _content("layer mass", whole)
        epoch = min(self._epochs_of(of_part) & self._epochs_of(of_whole), default=self._epoch)
        return self._signal("mass", part, epoch), self._signal("layer mass", whole, epoch)

    def experts(self, over: Window, phase: Phase) -> Signal:
        """All experts of a window's tokens: no number, so no row of the table, but of an epoch as all
        that is counted. Its number is that of the window among those that distributions are read of."""
        window, tokens, in_output = window_of(over, phase)
        return self._identified("experts", f"experts:{window.name} {tokens} {in_output}")

    def identity(self, signal: Signal) -> Identity:
        return self._identities[signal.kind][signal.number]

    def tokens_of(self, signal: Signal) -> Signal:
        """The token signal of its epoch."""
        return Signal("token", self._identities[signal.kind][signal.number].epoch)

    def _signal(
        self, kind: SignalKind, weights: _Weights, epoch: int | None = None, also: str = ""
    ) -> Signal:
        signal = self._identified(kind, _content(kind, weights) + also, epoch)
        if signal.number == len(self._weights[kind]):
            self._weights[kind].append(weights)
        return signal

    def _identified(self, kind: SignalKind, content: str, epoch: int | None = None) -> Signal:
        """The one of this content, which may be new."""
        if epoch is None:
            epoch = min(self._epochs_of(content), default=self._epoch)
        identity, of_kind = Identity(content, epoch), self._identities[kind]
        number = self._numbers.setdefault(identity, len(of_kind))
        if number == len(of_kind):
            of_kind.append(identity)
            self._epochs.add(epoch)
        return Signal(kind, number)

    def _epochs_of(self, content: str) -> set[int]:
        return self._known.get(content, set())

    def reading(self, signal: Signal, over: Window, phase: Phase) -> int:
        """Row of the reading table for a signal over a window."""
        return self._readings.setdefault((signal, *window_of(over, phase)), len(self._readings))

    def signal_row(self, signal: Signal) -> int:
        """Row of the signal table; only right once every signal has been added."""
        epochs = self._token_epochs
        if signal.kind == "token":
            return epochs.index(max(signal.number, epochs[TOKEN_SIGNAL]))
        row = len(epochs) + signal.number
        for kind, of_kind in self._weights.items():
            if kind == signal.kind:
                return row
            row += len(of_kind)
        return row

    @property
    def _token_epochs(self) -> list[int]:
        """Ascending, of all signals there are."""
        return sorted(self._epochs) or [self._oldest]

    def tables(self, distributions: DistributionTable) -> tuple[SignalTable, ReadingTable]:
        """distributions: what they read is part of the evidence"""
        tables = {kind: _stack(of_kind) for kind, of_kind in self._weights.items()}
        num_masses = len(tables["mass"]) + len(tables["layer mass"])
        identities = [Identity("tokens", epoch) for epoch in self._token_epochs]
        scale = [1.0] * len(identities)
        scale += [*self._unit_scale, *[1.0] * len(tables["spread"]), *[FIXED_POINT] * num_masses]
        for kind, of_kind in self._identities.items():
            identities += of_kind if kind != "experts" else ()
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
            keys=tuple(identity.key for identity in identities),
            epochs=tuple(identity.epoch for identity in identities),
            routing_words=distributions.routing_words,
            routing_epoch=min(distributions.epochs, default=0),
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
        places = self._places_of(weights)
        value = np.rint(np.array(list(weights.values()), dtype=np.float64) * scale)[places.order]
        return _Weights(places.place[value != 0], value[value != 0])

    def _equal(self, experts: Mapping[Expert, float], weight: float) -> _Weights:
        place = self._places_of(experts).place
        return _Weights(place, np.full(len(place), float(weight)))

    def _places_of(self, experts: Mapping[Expert, float]) -> _Places:
        known = self._places.get(id(experts))
        if known is None:
            row, num_experts = self._index_of_layer, self._topology.max_experts
            place = np.array([row[layer] * num_experts + id_ for layer, id_ in experts], dtype=np.int32)
            order = np.argsort(place)
            known = self._places[id(experts)] = _Places(experts, place[order], order)
        return known


def window_of(over: Window, phase: Phase) -> tuple[WindowKind, int, bool]:
    """Its kind, the tokens of a recent one, and whether that stays in the output."""
    match over:
        case NamedWindow.REQUEST:
            return WindowKind.REQUEST, 0, False
        case NamedWindow.PROMPT:
            return WindowKind.PROMPT, 0, False
        case NamedWindow.OUTPUT:
            return WindowKind.OUTPUT, 0, False
        case NamedWindow.TOKEN:
            return WindowKind.RECENT, 1, False
        case tokens:
            return WindowKind.RECENT, int(tokens), phase is Phase.OUTPUT


def _content(kind: SignalKind, weights: _Weights) -> str:
    return f"{kind}:{weights.digest}"


def _stack(signals: Sequence[_Weights]) -> SparseWeights:
    none = SparseWeights.none()
    return SparseWeights(
        start=np.cumsum([0, *(len(weights.place) for weights in signals)], dtype=np.int64),
        place=np.concatenate([none.place, *(weights.place for weights in signals)]),
        value=np.concatenate([none.value, *(weights.value for weights in signals)]),
    )
