"""What conditions on the distribution of a window's selections over all experts read and keep."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from guard.program.topology import Topology


class Statistic(IntEnum):
    """What is asked of the distribution p of one layer's selections over its experts, Σp = 1.

    DIVERGENCE: the Jensen-Shannon divergence of p and the profile's q in natural logarithms, 0 to ln 2:
        Σ p·ln(p/m)/2 + Σ q·ln(q/m)/2, m = (p+q)/2 (Lin, IEEE Trans. Inf. Theory 37, 1991). Unlike
        Kullback-Leibler's it needs no smoothing where an expert was never chosen
    ENTROPY: the effective number of experts 1/Σp², 1 to E (the inverse Herfindahl index, Rényi's
        entropy of order 2 as a number; of routers: InnerExpert, arXiv 2608.17687)
    CONCENTRATION: max p · E/k, from 1/k where all experts are used alike to E/k where one is used
        alone (after RepetitionCurse, arXiv 2512.23995, whose prompts make the load collapse)
    """

    DIVERGENCE = 0
    ENTROPY = 1
    CONCENTRATION = 2


@dataclass(frozen=True, slots=True)
class DistributionTable:
    """Conditions on how all experts were used. Letters: H histograms of a request, V windows, D such
    conditions, Z baselines.

    They are evaluated at P-1 and at output positions. Of a named window a request keeps a histogram; a
    RECENT one is counted anew from the experts of its tokens, which a request keeps too.

    window, tokens, in_output: [V] as in `ReadingTable`
    histogram: [V] row of the histograms of a request, or -1
    token_signal: [V] row of the signal table: the tokens that the window has seen
    keys, epochs: [V] as in `SignalTable`
    condition: [D] row of the condition table
    condition_window: [D] row of the windows
    statistic: [D] Statistic
    takes_max: [D] over layers; else the mean. Layers without a selection in the window are left out
    baseline: [D] row of `shares`, or -1
    shares: [Z, L, E] the profile's distributions; all 0 for a layer that it does not know
    """

    topology: Topology
    window: NDArray[np.int64]
    tokens: NDArray[np.int64]
    in_output: NDArray[np.bool_]
    histogram: NDArray[np.int64]
    token_signal: NDArray[np.int64]
    keys: tuple[str, ...]
    epochs: tuple[int, ...]
    condition: NDArray[np.int64]
    condition_window: NDArray[np.int64]
    statistic: NDArray[np.int64]
    takes_max: NDArray[np.bool_]
    baseline: NDArray[np.int64]
    shares: NDArray[np.float64]

    @property
    def num_conditions(self) -> int:
        return len(self.condition)

    @property
    def num_histograms(self) -> int:
        return int((self.histogram >= 0).sum())

    @property
    def named_keys(self) -> tuple[str, ...]:
        """[H]"""
        return tuple(key for key, row in zip(self.keys, self.histogram, strict=True) if row >= 0)

    @property
    def expert_type(self) -> np.dtype[np.uint8] | np.dtype[np.int16]:
        """Holds an expert's id + 1, or 0 for nobody."""
        return np.dtype(np.uint8) if self.topology.max_experts <= 255 else np.dtype(np.int16)

    @property
    def recent_positions(self) -> int:
        """Tokens before the one that is evaluated, of which a request keeps the experts."""
        return max(0, int(self.tokens.max(initial=0)) - 1)

    @property
    def chosen_per_token(self) -> int:
        return len(self.topology.layers) * self.topology.max_top_k

    @property
    def routing_words(self) -> int:
        """64-bit words that hold a token's experts."""
        if not self.num_conditions:
            return 0
        return -(-self.chosen_per_token * self.expert_type.itemsize // 8)

    @property
    def histogram_bytes_each(self) -> int:
        return 4 * len(self.topology.layers) * self.topology.max_experts

    @property
    def recent_bytes(self) -> int:
        """Of a request: its last tokens' experts, which tokens they are, and what had seen them."""
        return self.recent_positions * (self.chosen_per_token * self.expert_type.itemsize + 8 + 4)

    @property
    def slot_bytes(self) -> int:
        """What a request keeps for these conditions."""
        return self.num_histograms * self.histogram_bytes_each + self.recent_bytes
