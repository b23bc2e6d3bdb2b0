"""Thresholds hold for prompts that are new, where those of independent tokens do not."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from guard.discover.conformal import Proportion, conformal_threshold, iid_threshold
from guard.discover.errors import DiscoverError

TOKENS, EXPERTS = 60, 6


def benign_rates(num_prompts: int, seed: int) -> np.ndarray:
    """A flagged set's rate in prompts that differ in topic."""
    generator = np.random.default_rng(seed)
    own_N = generator.beta(4, 28, num_prompts)  # mean 1/8
    return generator.binomial(TOKENS * EXPERTS, own_N) / (TOKENS * EXPERTS)


def test_the_realised_rate_is_within_the_budget_on_fresh_prompts() -> None:
    threshold = conformal_threshold(benign_rates(2000, 0), 0.01)
    realised = Proportion.of(int((benign_rates(4000, 1) > threshold).sum()), 4000)
    assert realised.low <= 0.01


def test_a_threshold_for_independent_tokens_is_not() -> None:
    threshold = iid_threshold(benign_rates(2000, 0).mean(), TOKENS * EXPERTS, 0.01)
    realised = Proportion.of(int((benign_rates(4000, 1) > threshold).sum()), 4000)
    assert realised.low > 0.01


def test_over_many_calibrations_the_mean_rate_is_within_the_budget() -> None:
    generator = np.random.default_rng(2)
    beyond = [
        (generator.normal(size=200) > conformal_threshold(generator.normal(size=199), 0.05)).mean()
        for _ in range(500)
    ]
    assert np.mean(beyond) == pytest.approx(0.05, abs=0.004)


@given(st.lists(st.integers(0, 50), min_size=19, max_size=60), st.sampled_from([0.05, 0.1, 0.5]))
def test_the_threshold_is_that_order_statistic(values: list[int], budget: float) -> None:
    rank = int(np.ceil(round((len(values) + 1) * (1 - budget), 9)))
    assert conformal_threshold(np.array(values, dtype=float), budget) == sorted(values)[rank - 1]


def test_it_is_rounded_away_from_firing() -> None:
    assert conformal_threshold(np.full(9, 0.12341), 0.1, decimals=3) == 0.124


def test_prompts_in_which_nothing_was_known_are_furthest_from_firing() -> None:
    values = np.array([np.nan] * 18 + [0.5])
    assert conformal_threshold(values, 0.05) == 0.5
    assert conformal_threshold(values, 0.1) == -np.inf


def test_too_few_prompts_are_refused_with_how_many_are_needed() -> None:
    conformal_threshold(np.zeros(99), 0.01)
    with pytest.raises(DiscoverError, match=r"0\.01 needs at least 99 benign prompts .* there are 98"):
        conformal_threshold(np.zeros(98), 0.01)


@pytest.mark.parametrize("budget", [0.0, 1.0])
def test_a_budget_of_nothing_or_of_all_is_refused(budget: float) -> None:
    with pytest.raises(DiscoverError, match="lies between 0 and 1"):
        conformal_threshold(np.zeros(9), budget)


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (3, 10), (10, 10), (1, 400)])
def test_intervals_are_exact(hits: int, total: int) -> None:
    expected = scipy.stats.binomtest(hits, total).proportion_ci(method="exact")
    found = Proportion.of(hits, total)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
