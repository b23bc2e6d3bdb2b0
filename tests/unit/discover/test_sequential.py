"""Sequential tests: their formulas, and that their thresholds hold for prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.discover.errors import DiscoverError
from guard.discover.sequential import (
    SequentialOutcome,
    SequentialSplit,
    TokenRates,
    calibrate_sequential,
    chosen,
    cusum,
    log_likelihood_ratio,
    sprt,
    token_rates,
    wald_threshold,
)
from tests.support.planted_trace import Planted

PLANTED = Planted(layers=6, experts=16, planted=4, pairs=300, tokens=40, effect=1.5, topic=1.5)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30))
def test_cusum_is_pages_recursion(ratios: list[float]) -> None:
    expected, value = [], 0.0
    for ratio in ratios:
        value = max(0.0, value + ratio)
        expected.append(value)
    assert cusum(np.array(ratios)) == pytest.approx(expected, abs=1e-9)


def test_sprt_is_the_sum_so_far_and_walds_bound_is_his() -> None:
    assert sprt(np.array([1.0, -2.0, 0.5])).tolist() == [1.0, -1.0, -0.5]
    assert wald_threshold(0.001, 0.1) == pytest.approx(np.log(900))


def test_the_ratio_is_that_of_independent_choices() -> None:
    rates = TokenRates(np.array([0.1, 0.4]), np.array([0.3, 0.2]))
    found = log_likelihood_ratio(np.array([[True, False], [False, True]]), rates)
    expected = [np.log(0.3 / 0.1) + np.log(0.8 / 0.6), np.log(0.7 / 0.9) + np.log(0.2 / 0.4)]
    assert found == pytest.approx(expected)


def test_an_expert_that_one_side_never_chooses_has_a_finite_ratio() -> None:
    rates = token_rates([np.zeros((9, 1), bool)], [np.ones((9, 1), bool)])
    assert np.isfinite(log_likelihood_ratio(np.array([[True], [False]]), rates)).all()


def outcomes() -> list[SequentialOutcome]:
    sides: dict[str, list[np.ndarray]] = {"target": [], "benign": []}
    for request in PLANTED.requests():
        found = chosen(request.routing, PLANTED.topology, PLANTED.planted_experts)
        sides[request.labels["label"]].append(found)
    benign, target = sides["benign"], sides["target"]
    split = SequentialSplit(benign[:60], target[:60], benign[60:180], benign[180:], target[180:])
    return calibrate_sequential(split, [0.01, 0.05])


def test_thresholds_from_prompts_hold_where_walds_does_not() -> None:
    for outcome in outcomes():
        assert outcome.false_positives.low <= outcome.budget
        assert outcome.wald.low > outcome.budget


def test_a_smaller_budget_needs_more() -> None:
    for strict, loose in zip(outcomes()[::2], outcomes()[1::2], strict=True):
        assert strict.test == loose.test
        assert strict.threshold >= loose.threshold
        assert strict.detected.hits <= loose.detected.hits


def test_what_was_chosen_without_weight_or_not_seen_does_not_count() -> None:
    request = next(iter(Planted(layers=1, experts=4, top_k=2, pairs=1, tokens=4, planted=0).requests()))
    routing = request.routing
    topology = Planted(layers=1, experts=4, top_k=2).topology
    ids, weights = routing.topk_ids, routing.topk_weights.copy()
    weights[3] = 0.0
    found = chosen(
        routing._replace(topk_weights=weights, unseen=frozenset({4})),
        topology,
        [(0, expert) for expert in range(4)],
    )
    assert found.shape == (3, 4)
    assert sorted(np.flatnonzero(found[0])) == sorted(ids[2, 0])
    assert not found[1].any()
    assert sorted(np.flatnonzero(found[2])) == sorted(ids[5, 0])


def test_outputs_of_one_label_alone_are_refused() -> None:
    with pytest.raises(DiscoverError, match="outputs of both labels"):
        token_rates([np.zeros((3, 1), bool)], [])
