"""Ratios of runs that took turns: what two states differ by, and how surely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Ratio:
    """median: of the pairs' ratios; low, high: its 95 % bootstrap interval; pairs: how many"""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


def paired_ratio(state: Sequence[float], base: Sequence[float], *, seed: int = 0) -> Ratio:
    """state, base: what each round measured, of the same rounds in the same order"""
    assert len(state) == len(base) > 0
    ratios = np.asarray(state, dtype=float) / np.asarray(base, dtype=float)
    drawn = np.random.default_rng(seed).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))
