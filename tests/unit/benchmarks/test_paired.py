"""Ratios of pairs, and how surely they are known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.paired import paired_ratio


def test_what_all_rounds_have_in_common_falls_out() -> None:
    weather = np.random.default_rng(0).uniform(1.0, 5.0, 20)
    ratio = paired_ratio((1.02 * weather).tolist(), weather.tolist())
    assert ratio.median == pytest.approx(1.02)
    assert (ratio.low, ratio.high) == pytest.approx((1.02, 1.02))
    assert ratio.pairs == 20


def test_the_interval_holds_the_median_and_grows_with_the_noise() -> None:
    random = np.random.default_rng(0)
    quiet, loud = (
        paired_ratio(random.normal(1.0, spread, 40).tolist(), [1.0] * 40) for spread in (0.01, 0.1)
    )
    assert quiet.low <= quiet.median <= quiet.high
    assert loud.high - loud.low > 3 * (quiet.high - quiet.low)


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(AssertionError):
        paired_ratio([1.0, 2.0], [1.0])
