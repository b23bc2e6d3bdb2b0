"""How often benign prompts' tokens choose each expert: what `dormant`, `suppressed` and `divergence`
are measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from guard.discover.table import Choice
from guard.program.topology import Topology
from guard.trace.format import TracedRequest
from guard.trace.reader import TraceReader, trace_files


@dataclass(frozen=True, slots=True)
class BaselineRates:
    """rates_LE: selections a token, 0 beyond a layer's experts; tokens: they are the mean of"""

    topology: Topology
    tokens: int
    rates_LE: NDArray[np.float64]


def baseline_rates(paths: Iterable[Path], choice: Choice) -> BaselineRates:
    """Of every token of the reference prompts, prompt and output, that was seen.

    Raises TraceError.
    """
    readers = [TraceReader(file) for path in paths for file in trace_files(path)]
    return _rates(readers, lambda one: one.labels.get(choice.label) == choice.reference)


def use_of_experts(paths: Iterable[Path]) -> dict[tuple[int, int], float]:
    """Selections a token of each (the model's own layer number, expert), over all tokens of all traces.

    Raises TraceError.
    """
    readers = [TraceReader(file) for path in paths for file in trace_files(path)]
    found = _rates(readers, lambda _: True)
    return {
        (layer.number, expert): float(found.rates_LE[row, expert])
        for row, layer in enumerate(found.topology.layers)
        for expert in range(layer.num_experts)
    }


def _rates(readers: Sequence[TraceReader], counts: Callable[[TracedRequest], bool]) -> BaselineRates:
    topology = readers[0].header.topology
    counts_LE = np.zeros((len(topology.layers), topology.max_experts))
    tokens = 0
    for reader in readers:
        for request in filter(counts, reader):
            routing = request.routing
            seen = [p for p in range(len(routing.topk_ids)) if routing.is_seen(p)]
            tokens += len(seen)
            ids_TLK, weights_TLK = routing.topk_ids[seen], routing.topk_weights[seen]
            is_at_work_TLK = (ids_TLK >= 0) & (weights_TLK != 0)
            for layer in range(len(topology.layers)):
                chosen = ids_TLK[:, layer][is_at_work_TLK[:, layer]]
                counts_LE[layer] += np.bincount(chosen, minlength=topology.max_experts)
    return BaselineRates(topology, tokens, counts_LE / max(1, tokens))
