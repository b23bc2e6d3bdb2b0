"""How much more often an expert is chosen under one label than under another.

Letters: X experts of all layers in a row, P pairs of prompts, N prompts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Floats = NDArray[np.float64]

_AT_ONCE = 50  # flips or resamples, of all experts of a large model: some ten MB


def risk_difference(chosen_1: int, tokens_1: int, chosen_2: int, tokens_2: int) -> float:
    """A1/N1 - A2/N2 of pooled tokens, as SteerMoE has it (arXiv 2509.09660). It has no error bar:
    tokens of one prompt are not independent, and a long prompt weighs more than a short one."""
    return chosen_1 / tokens_1 - chosen_2 / tokens_2


class LogOdds(NamedTuple):
    """ratio: natural logarithm of the odds ratio; error: its standard error, of independent draws"""

    ratio: float
    error: float


def log_odds(chosen_1: float, tokens_1: float, chosen_2: float, tokens_2: float) -> LogOdds:
    """With a half added to each of the four counts, so that an expert that never fires has one (Haldane
    1956, Anscombe 1956)."""
    cells = np.array([chosen_1, tokens_1 - chosen_1, chosen_2, tokens_2 - chosen_2]) + 0.5
    logs = np.log(cells)
    return LogOdds(float(logs[0] - logs[1] - logs[2] + logs[3]), float(np.sqrt((1 / cells).sum())))


def studentized(difference_PX: Floats) -> Floats:
    """[X]: the mean over its standard error; 0 where no pair differs."""
    num_pairs = len(difference_PX)
    mean_X = difference_PX.mean(axis=0)
    return _studentized(mean_X, np.square(difference_PX).sum(axis=0), num_pairs)


def _studentized(mean: Floats, squares_X: Floats, num_pairs: int) -> Floats:
    """mean: [..., X]; squares_X: each column's sum of squares, which flips of signs leave alone, or one
    of each resample"""
    variance = (squares_X - num_pairs * np.square(mean)) / (num_pairs - 1)
    error = np.sqrt(np.maximum(variance, 0) / num_pairs)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = mean / error
    # All pairs differ by the same: as sure as can be, but not infinitely.
    certain = np.sign(mean) * np.sqrt(num_pairs) * 1e6
    return np.where(error > 1e-12 * (np.abs(mean) + 1e-300), found, np.where(mean == 0, 0.0, certain))


class SignFlips:
    """A randomisation test by pair: if its two labels meant nothing, they could change places.

    The statistic is studentized, so that one null serves all experts (as in SAM, Tusher et al. 2001)
    and a p-value can be as small as many experts need. It is also the null of the same differences with
    their signs flipped in any way.
    """

    def __init__(
        self, difference_PX: Floats, *, flips: int = 1000, seed: int = 0, least_pairs: int = 5
    ) -> None:
        """least_pairs: an expert that fewer of them differ in has a p of 1"""
        num_pairs = len(difference_PX)
        squares_X = np.square(difference_PX).sum(axis=0)
        self._is_tested_X = (difference_PX != 0).sum(axis=0) >= least_pairs
        generator = np.random.default_rng(seed)
        null, most = [np.zeros(0)], [np.zeros(0)]
        for first in range(0, flips, _AT_ONCE):
            signs_SP = generator.choice([-1.0, 1.0], (min(_AT_ONCE, flips - first), num_pairs))
            mean_SX = signs_SP @ difference_PX / num_pairs
            t_SX = np.abs(_studentized(mean_SX, squares_X, num_pairs))[:, self._is_tested_X]
            null.append(t_SX.ravel())
            most.append(t_SX.max(axis=1, initial=0.0))
        self._null, self._most = (np.sort(np.concatenate(parts)) for parts in (null, most))

    def p_X(self, t_X: Floats) -> Floats:
        """Two-sided, by the null of all experts together."""
        return self._share_at_least(self._null, t_X)

    def family_p_X(self, t_X: Floats) -> Floats:
        """The probability that any expert at all comes out as far (Westfall and Young 1993)."""
        return self._share_at_least(self._most, t_X)

    def _share_at_least(self, null: Floats, t_X: Floats) -> Floats:
        """What was observed is one of the null's too, so that no share is 0."""
        beyond_X = len(null) - np.searchsorted(null, np.abs(t_X), side="left")
        return np.where(self._is_tested_X, (1 + beyond_X) / (1 + len(null)), 1.0)


def benjamini_hochberg(p_X: Floats) -> Floats:
    """q-values: the least false discovery rate at which each is still found (1995, step up)."""
    order = np.argsort(p_X)
    scaled = p_X[order] * len(p_X) / np.arange(1, len(p_X) + 1)
    q_X = np.empty_like(p_X)
    q_X[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q_X


def stability(difference_PX: Floats, top: int, *, resamples: int = 100, seed: int = 0) -> Floats:
    """[X]: in what share of bootstrap resamples of the pairs an expert is among the `top` by the size
    of its studentized effect (stability selection, Meinshausen and Bühlmann 2010)."""
    num_pairs, num_experts = difference_PX.shape
    generator = np.random.default_rng(seed)
    squares_PX = np.square(difference_PX)
    hits_X = np.zeros(num_experts)
    for first in range(0, resamples, _AT_ONCE):
        count_SP = np.stack(
            [
                np.bincount(generator.integers(num_pairs, size=num_pairs), minlength=num_pairs)
                for _ in range(min(_AT_ONCE, resamples - first))
            ]
        ).astype(np.float64)
        mean_SX = count_SP @ difference_PX / num_pairs
        size_SX = np.abs(_studentized(mean_SX, count_SP @ squares_PX, num_pairs))
        for size_X in size_SX:
            hits_X[np.argpartition(-size_X, min(top, num_experts) - 1)[:top]] += 1
    share_X: Floats = hits_X / resamples
    return share_X


def naive_token_q(rate_1_X: Floats, tokens_1: int, rate_2_X: Floats, tokens_2: int) -> Floats:
    """q-values of a two-proportion z-test that takes tokens for independent: what not to do."""
    pooled_X = (rate_1_X * tokens_1 + rate_2_X * tokens_2) / (tokens_1 + tokens_2)
    error_X = np.sqrt(pooled_X * (1 - pooled_X) * (1 / tokens_1 + 1 / tokens_2))
    with np.errstate(divide="ignore", invalid="ignore"):
        z_X = np.where(error_X > 0, np.abs(rate_1_X - rate_2_X) / error_X, 0.0)
    return benjamini_hochberg(2 * norm.sf(z_X))
