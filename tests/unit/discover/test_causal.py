"""Masking a set beside masking random ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.discover.causal import (
    NEAREST,
    CausalDemands,
    Losses,
    TaskOutcome,
    causal_check,
    random_sets,
)
from guard.discover.errors import DiscoverError

USE = {(layer, expert): expert / 10 for layer in (1, 4) for expert in range(10)}


def losses(
    masked: float, random: float, num_texts: int = 60, noise: float = 0.05, seed: int = 0
) -> Losses:
    """Of 20 tokens each, 2 nats a token unmasked; increases in nats a token."""
    generator = np.random.default_rng(seed)
    unmasked_N = 40 + generator.normal(0, 2, num_texts)

    def raised(by: float) -> Any:
        return unmasked_N + 20 * (by + generator.normal(0, noise, num_texts))

    return Losses(
        np.full(num_texts, 20),
        unmasked_N,
        raised(masked),
        np.stack([raised(random) for _ in range(6)]),
    )


def test_random_sets_have_as_many_of_each_layer_and_none_of_the_set() -> None:
    experts = [(1, 0), (1, 9), (4, 5)]
    found = random_sets(experts, USE, 12, seed=3)
    assert len({tuple(one) for one in found}) == 12
    for one in found:
        assert [layer for layer, _ in one] == [1, 1, 4]
        assert not set(one) & set(experts)


@given(st.integers(0, 1000), st.integers(0, 9))
def test_a_random_expert_is_about_as_much_used(seed: int, expert: int) -> None:
    [[(layer, other)]] = random_sets([(4, expert)], USE, 1, seed)
    assert layer == 4
    nearest = sorted(abs(USE[4, one] - USE[4, expert]) for one in range(10) if one != expert)
    assert abs(USE[4, other] - USE[4, expert]) <= nearest[NEAREST - 1]


def test_a_set_of_most_of_a_layer_leaves_nothing_to_compare_with() -> None:
    with pytest.raises(DiscoverError, match="layer 1: more than half of its experts"):
        random_sets([(1, expert) for expert in range(6)], USE, 5, seed=0)
    with pytest.raises(DiscoverError, match="there are not 5 different random sets"):
        random_sets([(1, expert) for expert in range(5)], USE, 5, seed=0)


def test_a_set_that_matters_to_its_target_alone_passes() -> None:
    check = causal_check("reroute", losses(1.0, 0.1), losses(0.01, 0.01))
    assert check.passed
    assert check.ratio == pytest.approx(10, rel=0.15)
    assert 1 < check.ratio_low < check.ratio
    assert check.target_interval[0] < check.target_increase < check.target_interval[1]
    assert check.target_increase == pytest.approx(1.0, abs=0.05)
    assert check.reference_increase == pytest.approx(0.005, abs=0.005)
    assert check.verdict.startswith("Passed: ")


@pytest.mark.parametrize(
    ("target", "reference", "why"),
    [
        (losses(0.0, 0.0), losses(0.0, 0.0), "does not surely raise the target's loss"),
        (losses(0.3, 0.25), losses(0.0, 0.0), "times as much as random sets of the same layers"),
        (losses(1.0, 0.1), losses(0.2, 0.1), "it raises the loss of the reference texts by 10"),
    ],
    ids=["nothing", "no more than random", "harms the rest"],
)
def test_a_set_that_does_not_pass_says_why(target: Losses, reference: Losses, why: str) -> None:
    check = causal_check("reroute", target, reference)
    assert not check.passed
    assert why in check.verdict


def test_what_is_asked_can_be_set() -> None:
    target, reference = losses(0.3, 0.1), losses(0.2, 0.1)
    assert len(causal_check("drop", target, reference).failures) == 2
    assert causal_check("drop", target, reference, demands=CausalDemands(2.0, 0.15)).passed


def test_where_random_sets_raise_nothing_the_ratio_has_no_end() -> None:
    check = causal_check("reroute", losses(1.0, -0.1), losses(0.0, 0.0))
    assert math.isinf(check.ratio)
    assert check.passed
    assert "ratio" not in check.as_profile({})
    assert "infinitely many times" in check.verdict


def test_exact_tasks_stand_beside_it() -> None:
    task = TaskOutcome(
        np.array([True] * 4), np.array([True, True, True, False]), np.array([[True] * 4, [False] * 4])
    )
    found = causal_check("reroute", losses(1, 0.1), losses(0, 0), task).as_profile({"t": "abc"})
    assert found["tasks"] == {"prompts": 4, "unmasked": 1.0, "masked": 0.75, "random": 0.5}
    assert found["data"] == {"t": "abc"}


def test_too_few_texts_are_refused() -> None:
    with pytest.raises(DiscoverError, match="7 texts of the target label are too few"):
        causal_check("reroute", losses(1, 0, num_texts=7), losses(0, 0))


def test_the_increase_is_by_token_not_by_text() -> None:
    """A long text weighs as much as it has tokens."""
    tokens_N = np.array([10, 90] * 10)
    unmasked_N = tokens_N * 2.0
    masked_N = unmasked_N + np.where(tokens_N == 90, 90.0, 0.0)
    random_SN = np.stack([unmasked_N + 1])
    check = causal_check("reroute", Losses(tokens_N, unmasked_N, masked_N, random_SN), losses(0.0, 0.0))
    assert check.target_increase == pytest.approx(0.9)
