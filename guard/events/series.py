"""A cap on how many series there are: whatever is in the policies, Prometheus can keep them."""

from __future__ import annotations

from collections import Counter as Count
from collections import defaultdict
from typing import Any, Final, TypeVar

import prometheus_client

MOST_SERIES: Final = 5_000
"""Combinations of labels of one engine. A histogram's buckets are one."""

_Metric = TypeVar(
    "_Metric", prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram
)


class Nothing:
    """Stands in for a series that was not made."""

    def inc(self, amount: float = 1) -> None:
        """Kept out."""

    def set(self, value: float) -> None:
        """Kept out."""

    def observe(self, amount: float) -> None:
        """Kept out."""


NOTHING: Final = Nothing()


class SeriesCap:
    """Makes series, each once, up to `most` of an engine. Those that exist stay and go on.

    dropped: counts those kept out, by model and engine: each once, while no more than `most` of them
        have to be remembered, and behind that each time
    """

    def __init__(self, most: int, dropped: prometheus_client.Counter) -> None:
        self._most = most
        self._dropped = dropped
        self._made: dict[tuple[Any, ...], Any] = {}
        self._num_made: Count[str] = Count()
        self._kept_out: defaultdict[str, set[tuple[Any, ...]]] = defaultdict(set)

    def of(self, metric: _Metric, model: str, engine: str, *labels: str) -> _Metric | Nothing:
        key = (metric, model, engine, *labels)
        found: _Metric | None = self._made.get(key)
        if found is not None:
            return found
        if self._num_made[engine] < self._most:
            made: _Metric = metric.labels(model, engine, *labels)
            self._made[key] = made
            self._num_made[engine] += 1
            return made
        kept_out = self._kept_out[engine]
        if key not in kept_out:
            if len(kept_out) < self._most:
                kept_out.add(key)
            self._dropped.labels(model, engine).inc()
        return NOTHING
