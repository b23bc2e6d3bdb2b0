"""Statistics of finders against other implementations of the same, and against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.discover.effects import (
    SignFlips,
    benjamini_hochberg,
    log_odds,
    naive_token_q,
    risk_difference,
    stability,
    studentized,
)


def test_the_risk_difference_is_that_of_published_counts() -> None:
    """SteerMoE's safety table of Qwen3-30B-A3B, top row: layer 12, expert 85."""
    assert risk_difference(48824, 64588, 10884, 371582) == pytest.approx(0.7266, abs=5e-5)


def test_the_smoothed_log_odds_are_finite_where_an_expert_never_fires() -> None:
    found = log_odds(0, 100, 7, 100)
    assert found.ratio == pytest.approx(np.log(0.5 / 100.5) - np.log(7.5 / 93.5))
    assert found.error == pytest.approx(np.sqrt(1 / 0.5 + 1 / 100.5 + 1 / 7.5 + 1 / 93.5))
    assert log_odds(7, 100, 0, 100).ratio == pytest.approx(-found.ratio)


def test_the_statistic_is_the_paired_t() -> None:
    difference_PX = np.random.default_rng(0).normal(0.1, 1, (30, 5))
    expected = scipy.stats.ttest_1samp(difference_PX, 0).statistic
    assert studentized(difference_PX) == pytest.approx(expected)


def test_an_expert_that_never_differs_is_no_finding_and_one_that_always_does_is_a_finite_one() -> None:
    difference_PX = np.zeros((10, 2))
    difference_PX[:, 1] = 0.25
    found = studentized(difference_PX)
    assert found[0] == 0.0
    assert np.isfinite(found[1])
    assert found[1] > 1000


def test_p_values_of_sign_flips_are_those_of_all_flips() -> None:
    difference_PX = np.random.default_rng(1).normal(0.5, 1, (10, 1))
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=10)))
    own = abs(studentized(difference_PX)[0])
    exact = np.mean(
        [abs(studentized(difference_PX * sign[:, None])[0]) >= own - 1e-9 for sign in signs]
    )
    flips = SignFlips(difference_PX, flips=20_000)
    assert flips.p_X(studentized(difference_PX))[0] == pytest.approx(exact, abs=0.01)
    assert flips.family_p_X(studentized(difference_PX))[0] == pytest.approx(exact, abs=0.01)


def test_the_p_of_a_family_is_never_below_that_of_one_expert_by_more_than_chance() -> None:
    difference_PX = np.random.default_rng(2).normal(0, 1, (40, 50))
    flips, t_X = SignFlips(difference_PX), studentized(difference_PX)
    assert (flips.family_p_X(t_X) >= flips.p_X(t_X) - 1e-9).all()


def test_an_expert_that_few_pairs_differ_in_is_not_tested() -> None:
    difference_PX = np.random.default_rng(3).normal(0, 1, (20, 2))
    difference_PX[4:, 0] = 0.0
    assert SignFlips(difference_PX).p_X(np.array([9.0, 9.0]))[0] == 1.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_q_values_are_benjamini_and_hochbergs(p: list[float]) -> None:
    expected = scipy.stats.false_discovery_control(p)
    assert benjamini_hochberg(np.array(p)) == pytest.approx(expected)


def test_stability_is_the_share_of_resamples_in_which_an_expert_is_on_top() -> None:
    difference_PX = np.random.default_rng(4).normal(0, 1, (12, 6)) + np.arange(6) / 3
    generator = np.random.default_rng(7)
    hits_X = np.zeros(6)
    for _ in range(40):
        drawn = generator.integers(12, size=12)
        hits_X[np.argsort(-np.abs(studentized(difference_PX[drawn])))[:2]] += 1
    assert stability(difference_PX, 2, resamples=40, seed=7) == pytest.approx(hits_X / 40)


def test_the_naive_test_is_the_two_proportion_z_test_with_q_values() -> None:
    rate_1_X, rate_2_X = np.array([0.2, 0.5, 0.0]), np.array([0.1, 0.5, 0.0])
    z = 0.1 / np.sqrt(0.15 * 0.85 * (1 / 100 + 1 / 100))
    expected = benjamini_hochberg(np.array([2 * scipy.stats.norm.sf(z), 1.0, 1.0]))
    assert naive_token_q(rate_1_X, 100, rate_2_X, 100) == pytest.approx(expected)
