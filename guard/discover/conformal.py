"""Thresholds that hold for prompts, and how surely a rate of prompts is known."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom

from guard.discover.errors import DiscoverError

Floats = NDArray[np.float64]


def conformal_threshold(furthest_N: Floats, budget: float, *, decimals: int = 4) -> float:
    """What a benign prompt's furthest value is above with a probability of at most `budget`.

    The ⌈(n+1)(1-budget)⌉-th smallest of n benign prompts' furthest values (split conformal
    prediction, Vovk et al. 2005). It holds for prompts that are exchangeable with these, on average
    over draws of them; tokens of one prompt are not. NaN: the condition was never known in that
    prompt and cannot fire.

    decimals: the threshold is rounded up to so many, so that it holds as it is written; policy tests
        can meet four exactly

    Raises DiscoverError where there are too few prompts for the budget.
    """
    if not 0 < budget < 1:
        raise DiscoverError(f"a budget lies between 0 and 1; {budget:g} does not")
    num_prompts = len(furthest_N)
    rank = math.ceil((num_prompts + 1) * (1 - budget) - 1e-9)
    if rank > num_prompts:
        raise DiscoverError(
            f"a budget of {budget:g} needs at least {math.ceil(1 / budget) - 1} benign prompts to "
            f"calibrate on, and there are {num_prompts}; record more, or take a larger budget"
        )
    ordered = np.sort(np.nan_to_num(furthest_N, nan=-math.inf))
    value = float(ordered[rank - 1])
    return value if math.isinf(value) else math.ceil(value * 10**decimals - 1e-9) / 10**decimals


def iid_threshold(rate: float, num_draws: int, budget: float) -> float:
    """What a share of independent draws is above with a probability of at most `budget`: what tokens
    are not. For comparison only.

    rate: of the benign traffic; num_draws: tokens times experts of the window
    """
    return float(binom.ppf(1 - budget, num_draws, rate)) / num_draws


class Proportion(NamedTuple):
    """hits of total, and the exact 95 % interval of the rate (Clopper and Pearson 1934)."""

    hits: int
    total: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        return self.hits / self.total if self.total else math.nan

    @staticmethod
    def of(hits: int, total: int, confidence: float = 0.95) -> Proportion:
        tail = (1 - confidence) / 2
        low = float(beta.ppf(tail, hits, total - hits + 1)) if hits else 0.0
        high = float(beta.ppf(1 - tail, hits + 1, total - hits)) if hits < total else 1.0
        return Proportion(hits, total, low, high)

    def __str__(self) -> str:
        return f"{self.hits} of {self.total} ({self.low:.2%} to {self.high:.2%})"
