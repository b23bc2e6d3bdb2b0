"""Rows of steps -> the routing of one request."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from guard.program.topology import Topology
from guard.program.verdict import Routing


@dataclass
class Assembly:
    """Each position once: what comes again after preemption is left out; what never came is unseen."""

    prompt_tokens: int
    next_position: int = 0
    num_bytes: int = 0
    _parts: list[tuple[int, NDArray[np.int32], NDArray[np.float32]]] = field(default_factory=list)

    def add(self, position: int, topk_ids: NDArray[np.int32], topk_weights: NDArray[np.float32]) -> int:
        """Rows from `position` on; returns the bytes that are held for them. They are copied, so that
        a step's memory is not kept for one of its requests."""
        known = max(0, self.next_position - position)
        topk_ids, topk_weights = topk_ids[known:].copy(), topk_weights[known:].copy()
        if not len(topk_ids):
            return 0
        self._parts.append((position + known, topk_ids, topk_weights))
        self.next_position = position + known + len(topk_ids)
        added = topk_ids.nbytes + topk_weights.nbytes
        self.num_bytes += added
        return added

    def routing(self, topology: Topology, num_positions: int | None = None) -> Routing:
        """num_positions: how many of them count; None: all that were computed"""
        end = self.next_position if num_positions is None else min(num_positions, self.next_position)
        shape = (end, len(topology.layers), topology.max_top_k)
        topk_ids, topk_weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        seen = np.zeros(end, dtype=np.bool_)
        for start, ids, weights in self._parts:
            stop = min(end, start + len(ids))
            if stop > start:
                topk_ids[start:stop] = ids[: stop - start]
                topk_weights[start:stop] = weights[: stop - start]
                # A layer that wrote nothing leaves no expert: such a row was not seen.
                chooses: NDArray[np.bool_] = np.any(ids[: stop - start] >= 0, axis=2)
                seen[start:stop] = np.all(chooses, axis=1)
        first_seen = int(seen.argmax()) if seen.any() else end
        unseen = (np.flatnonzero(~seen[first_seen:]) + first_seen).tolist()
        return Routing(topk_ids, topk_weights, self.prompt_tokens, first_seen, frozenset(unseen))
