"""Lays out what conditions on distributions read, and bounds what they make a request keep."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.policy.fault import Fault, PolicyError
from guard.policy.model import Baselines, Condition, ConditionKind, Phase, Reduce, Window
from guard.program.distribution_table import DistributionTable, Statistic
from guard.program.program import WindowKind
from guard.program.signals import Signal, SignalBuilder, window_of
from guard.program.topology import Topology

MAX_RECENT_BYTES: Final = 512 * 1024
"""Of a request's slot, for the experts of its last tokens: 256 MiB for 512 requests."""


class _Row(NamedTuple):
    """number: of the condition in the condition table"""

    number: int
    window: int
    condition: Condition
    baseline: int


class DistributionBuilder:
    """Collects the distributions that conditions read, each window once."""

    def __init__(self, builder: SignalBuilder, topology: Topology) -> None:
        self._builder = builder
        self._topology = topology
        self._windows: list[tuple[Signal, tuple[WindowKind, int, bool]]] = []
        self._baselines: dict[int, tuple[int, Baselines]] = {}  # by identity, which stays alive
        self._rows: list[_Row] = []

    def source(self, over: Window, phase: Phase) -> Signal:
        """What is counted for a window."""
        signal = self._builder.experts(over, phase)
        if signal.number == len(self._windows):
            self._windows.append((signal, window_of(over, phase)))
        return signal

    def add(self, number: int, condition: Condition, phase: Phase) -> None:
        """number: of the condition in the condition table."""
        baseline = -1
        if condition.kind is ConditionKind.DIVERGENCE:
            assert condition.baselines is not None, "`divergence` reads baselines"
            entry = (len(self._baselines), condition.baselines)
            baseline = self._baselines.setdefault(id(condition.baselines), entry)[0]
        window = self.source(condition.over, phase).number
        self._rows.append(_Row(number, window, condition, baseline))

    def table(self) -> DistributionTable:
        """Once every signal has been added.

        Raises PolicyError where requests would have to keep too much.
        """
        builder, rows = self._builder, self._rows
        kinds = [kind for _, (kind, _, _) in self._windows]
        named = np.array([kind is not WindowKind.RECENT for kind in kinds], dtype=np.bool_)
        sources = [builder.identity(signal) for signal, _ in self._windows]
        divergence = ConditionKind.DIVERGENCE
        table = DistributionTable(
            topology=self._topology,
            window=np.array(kinds, dtype=np.int64),
            tokens=np.array([tokens for _, (_, tokens, _) in self._windows], dtype=np.int64),
            in_output=np.array([limited for _, (_, _, limited) in self._windows], dtype=np.bool_),
            histogram=np.where(named, named.cumsum() - 1, -1),
            token_signal=np.array(
                [builder.signal_row(builder.tokens_of(signal)) for signal, _ in self._windows],
                dtype=np.int64,
            ),
            keys=tuple(source.key for source in sources),
            epochs=tuple(source.epoch for source in sources),
            condition=np.array([row.number for row in rows], dtype=np.int64),
            condition_window=np.array([row.window for row in rows], dtype=np.int64),
            statistic=np.array([Statistic[row.condition.kind.name] for row in rows], dtype=np.int64),
            takes_max=np.array(
                [c.kind is divergence and c.reduce is Reduce.MAX for _, _, c, _ in rows], dtype=np.bool_
            ),
            baseline=np.array([row.baseline for row in rows], dtype=np.int64),
            shares=self._shares(),
        )
        self._check_size(table)
        return table

    def _shares(self) -> NDArray[np.float64]:
        """Each layer's rates by their sum; all 0 where that is 0, or the layer was not measured."""
        layers = self._topology.layers
        shares = np.zeros((len(self._baselines), len(layers), self._topology.max_experts))
        for number, baselines in self._baselines.values():
            for row, layer in enumerate(layers):
                rates = np.array(baselines.rates.get(layer.number, ()), dtype=np.float64)
                if rates.sum() > 0:
                    shares[number, row, : len(rates)] = rates / rates.sum()
        return shares

    def _check_size(self, table: DistributionTable) -> None:
        if table.recent_bytes <= MAX_RECENT_BYTES:
            return
        longest = max(self._rows, key=lambda row: int(table.tokens[row.window])).condition
        most = 1 + MAX_RECENT_BYTES // (table.recent_bytes // table.recent_positions)
        text = (
            f"`{longest.label}` over {longest.over} tokens would keep the experts of that many tokens "
            f"for every request, {table.recent_bytes:,} bytes each on this model, where "
            f"{MAX_RECENT_BYTES:,} are allowed (256 MiB for 512 requests); give a window of at most "
            f"{most} tokens, or a named one, which keeps {table.histogram_bytes_each:,} bytes"
        )
        raise PolicyError([Fault(longest.location, text)])
