"""The reference of masked routing, by numbers that were worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from guard.program.reference_routing import route
from guard.program.topology import Router

SOFTMAX = Router()
KEPT_SOFTMAX = Router(renormalize=False)
SIGMOID = Router("sigmoid", has_bias=True)
LOG2, LOG3, LOG4 = math.log(2), math.log(3), math.log(4)

TENTHS = [LOG4, LOG3, LOG2, 0.0]
"""A softmax of .4, .3, .2 and .1."""


def approx(expected: Sequence[tuple[int, float]]) -> list[tuple[int, object]]:
    return [(expert, pytest.approx(weight, rel=1e-12, abs=0)) for expert, weight in expected]


@pytest.mark.parametrize(
    ("router", "masks", "expected"),
    [
        (SOFTMAX, {}, [(0, 4 / 7), (1, 3 / 7)]),
        (SOFTMAX, {"rerouted": [0]}, [(1, 3 / 5), (2, 2 / 5)]),
        (SOFTMAX, {"rerouted": [0, 1]}, [(2, 2 / 3), (3, 1 / 3)]),
        (SOFTMAX, {"dropped": [0]}, [(0, 0.0), (1, 3 / 7)]),
        (SOFTMAX, {"drop_renormed": [0]}, [(0, 0.0), (1, 1.0)]),
        (SOFTMAX, {"forced": [3]}, [(3, 1 / 5), (0, 4 / 5)]),
        (SOFTMAX, {"forced": [3, 2]}, [(2, 2 / 3), (3, 1 / 3)]),
        (KEPT_SOFTMAX, {}, [(0, 0.4), (1, 0.3)]),
        (KEPT_SOFTMAX, {"rerouted": [0]}, [(1, 0.3), (2, 0.2)]),  # not 3/6 and 2/6
        (KEPT_SOFTMAX, {"dropped": [0]}, [(0, 0.0), (1, 0.3)]),
        (KEPT_SOFTMAX, {"drop_renormed": [0]}, [(0, 0.0), (1, 0.7)]),
        (KEPT_SOFTMAX, {"forced": [3]}, [(3, 0.1), (0, 0.4)]),
    ],
)
def test_each_method_on_a_softmax(
    router: Router, masks: dict[str, list[int]], expected: list[tuple[int, float]]
) -> None:
    assert route(TENTHS, router, 2, **masks) == approx(expected)


def test_what_is_dropped_altogether_leaves_nothing() -> None:
    nothing = [(0, 0.0), (1, 0.0)]

    assert route(TENTHS, SOFTMAX, 2, dropped=range(4)) == nothing
    assert route(TENTHS, SOFTMAX, 2, drop_renormed=range(4)) == nothing


def test_both_ways_of_dropping_on_one_row() -> None:
    routed = route(TENTHS, KEPT_SOFTMAX, 4, dropped=[0], drop_renormed=[1])

    # .3 goes to 2 and 3 by .2 and .1; the .4 of expert 0 is lost.
    assert routed == approx([(0, 0.0), (1, 0.0), (2, 0.4), (3, 0.2)])


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ({"rerouted": [0], "drop_renormed": [0], "dropped": [0], "forced": [0]}, [(1, 0.3), (2, 0.2)]),
        ({"drop_renormed": [0], "dropped": [0], "forced": [0]}, [(0, 0.0), (1, 0.7)]),
        ({"dropped": [0], "forced": [0]}, [(0, 0.0), (1, 0.3)]),
        ({"rerouted": [3], "forced": [3]}, [(0, 0.4), (1, 0.3)]),
    ],
)
def test_the_first_method_on_an_expert_wins(
    masks: dict[str, list[int]], expected: list[tuple[int, float]]
) -> None:
    assert route(TENTHS, KEPT_SOFTMAX, 2, **masks) == approx(expected)


def test_a_softmax_under_which_all_that_is_left_underflows_is_still_shared_out() -> None:
    routed = route([0.0, -5000.0, -5000.0 + LOG3], SOFTMAX, 2, rerouted=[0])

    assert routed == approx([(2, 3 / 4), (1, 1 / 4)])


def test_a_bias_decides_the_choice_and_not_the_weight() -> None:
    # Sigmoids of 1/2, 3/4 and 1/4.
    logits = [0.0, LOG3, -LOG3]

    assert route(logits, SIGMOID, 2, bias=[0.0, 0.0, 0.0]) == approx([(1, 3 / 5), (0, 2 / 5)])
    assert route(logits, SIGMOID, 2, bias=[0.0, 0.0, 9.0]) == approx([(2, 1 / 4), (1, 3 / 4)])


def test_under_a_large_bias_a_rerouted_expert_of_the_highest_one_is_out_all_the_same() -> None:
    """A logit of -inf alone leaves it the highest score: its bias is more than any live expert has."""
    bias = [34.64, 34.5, 34.4, 34.36]
    logits = [4.0, -9.0, -8.0, -7.0]

    routed = route(logits, SIGMOID, 2, bias=bias, rerouted=[0])

    assert [expert for expert, _ in routed] == [1, 2]
    a, b = 1 / (1 + math.exp(9)), 1 / (1 + math.exp(8))
    assert routed == approx([(1, a / (a + b)), (2, b / (a + b))])


def test_groups_are_chosen_by_the_sum_of_two_under_a_bias_and_by_the_best_without() -> None:
    logits = [3.0, -9.0, 2.0, 2.0]  # the best is in group 0, the better two in group 1
    by_sum = Router("sigmoid", num_groups=2, topk_groups=1, has_bias=True)
    by_best = Router("softmax", num_groups=2, topk_groups=1)

    assert [e for e, _ in route(logits, by_sum, 2, bias=[0.0] * 4)] == [2, 3]
    assert [e for e, _ in route(logits, by_best, 2)] == [0, 1]


def test_a_masked_expert_speaks_for_its_group_no_more() -> None:
    logits = [9.0, -9.0, 2.0, 2.0]
    by_best = Router("softmax", num_groups=2, topk_groups=1)

    assert route(logits, by_best, 2, rerouted=[0, 1]) == approx([(2, 0.5), (3, 0.5)])
    with pytest.raises(ValueError, match="1 experts are left, but 2"):
        route([9.0, 8.0, 2.0, 2.0], by_best, 2, rerouted=[0])


def test_groups_of_two_with_one_masked_in_each_keep_those_of_the_best_live_experts() -> None:
    """With -inf for what is masked every sum would be -inf, and the groups arbitrary."""
    router = Router("sigmoid", num_groups=4, topk_groups=2, has_bias=True)
    logits = [9.0, -1.0, 9.0, 3.0, 9.0, -2.0, 9.0, 2.0]

    routed = route(logits, router, 2, bias=[7.0] * 8, rerouted=[0, 2, 4, 6])

    assert [expert for expert, _ in routed] == [3, 7]


def test_an_expert_is_forced_from_a_group_that_is_not_kept() -> None:
    router = Router("sigmoid", num_groups=2, topk_groups=1, has_bias=True)

    routed = route([LOG3, LOG3, -LOG3, 0.0], router, 2, bias=[0.0] * 4, forced=[2])

    assert routed == approx([(2, 1 / 4), (0, 3 / 4)])


def test_softmax_with_a_bias_chooses_by_probability_and_bias() -> None:
    ernie = Router("softmax", has_bias=True)

    routed = route(TENTHS, ernie, 2, bias=[0.0, 0.0, 0.0, 0.25])  # .4, .3, .2, .35

    assert routed == approx([(0, 4 / 5), (3, 1 / 5)])
    assert route(TENTHS, ernie, 2, bias=[0.0, 0.0, 0.0, 0.25], rerouted=[0]) == approx(
        [(3, 1 / 4), (1, 3 / 4)]
    )


def test_the_square_root_of_softplus() -> None:
    router = Router("sqrtsoftplus", has_bias=True)
    logits = [math.log(math.e - 1), math.log(math.e**4 - 1), math.log(math.e**9 - 1)]  # 1, 2, 3

    assert route(logits, router, 2, bias=[0.0] * 3) == approx([(2, 3 / 5), (1, 2 / 5)])
    assert route(logits, router, 2, bias=[0.0] * 3, rerouted=[2]) == approx([(1, 2 / 3), (0, 1 / 3)])


def test_far_below_zero_softplus_is_the_exponential() -> None:
    router = Router("sqrtsoftplus", renormalize=False)

    assert route([-400.0], router, 1) == approx([(0, math.exp(-200))])


def test_llama_4_weighs_the_next_best_by_its_own_sigmoid() -> None:
    llama4 = Router("sigmoid", renormalize=False)

    assert route([LOG3, 0.0, -1.0], llama4, 1) == approx([(0, 3 / 4)])
    assert route([LOG3, 0.0, -1.0], llama4, 1, rerouted=[0]) == approx([(1, 1 / 2)])
    assert route([LOG3, 0.0, -1.0], llama4, 1, forced=[1]) == approx([(1, 1 / 2)])
    assert route([LOG3, 0.0, -1.0], llama4, 1, dropped=[0]) == [(0, 0.0)]


class TestSparsemixer:
    ROUTER = Router(renormalize=False, kind="sparsemixer")

    def test_each_pass_is_a_softmax_over_what_is_near(self) -> None:
        # 9.9 is 1 % behind 10, and 9.85 half a per cent behind 9.9; 5 is far from both.
        routed = route([5.0, 10.0, 9.9, 9.85], self.ROUTER, 2)

        first = 1 / (1 + math.exp(-0.1) + math.exp(-0.15))
        assert routed == approx([(1, first), (2, 1 / (1 + math.exp(-0.05)))])

    def test_an_expert_that_stands_alone_has_all_the_weight_of_its_pass(self) -> None:
        assert route([5.0, 10.0, 1.0], self.ROUTER, 2) == approx([(1, 1.0), (0, 1.0)])

    def test_a_rerouted_expert_takes_no_part_in_any_pass(self) -> None:
        routed = route([5.0, 10.0, 9.9, 9.85], self.ROUTER, 2, rerouted=[1])

        assert routed == approx([(2, 1 / (1 + math.exp(-0.05))), (3, 1.0)])

    def test_a_forced_expert_is_weighed_by_the_live_ones_near_to_it_or_above(self) -> None:
        routed = route([5.0, 10.0, 9.0, 1.0], self.ROUTER, 2, forced=[0])

        # The second pass is without expert 1, but with expert 2, which is above the forced one.
        assert routed == approx([(1, 1.0), (0, 1 / (1 + math.exp(4.0)))])

    def test_with_one_live_expert_there_is_no_second_pass(self) -> None:
        with pytest.raises(ValueError, match="1 experts are left, but 2"):
            route([5.0, 10.0, 9.0], self.ROUTER, 2, rerouted=[0, 1])


def test_zero_experts_are_chosen_like_others_and_keep_their_ids() -> None:
    longcat = Router(renormalize=False, has_bias=True, num_zero_experts=2)

    routed = route(TENTHS, longcat, 2, bias=[0.0, 0.0, 0.0, 0.25], rerouted=[0])

    assert routed == approx([(3, 0.1), (1, 0.3)])  # 2 and 3 are zero experts


def test_a_factor_for_each_expert_comes_behind_renormalisation_and_dropping() -> None:
    scale = [10.0, 100.0, 1.0, 1.0]

    assert route(TENTHS, SOFTMAX, 2, expert_scale=scale) == approx([(0, 40 / 7), (1, 300 / 7)])
    assert route(TENTHS, SOFTMAX, 2, expert_scale=scale, drop_renormed=[0]) == approx(
        [(0, 0.0), (1, 100.0)]
    )


@pytest.mark.parametrize("router", [SOFTMAX, KEPT_SOFTMAX])
def test_fewer_live_experts_than_are_chosen_are_refused(router: Router) -> None:
    with pytest.raises(ValueError, match="1 experts are left, but 2 are chosen"):
        route(TENTHS, router, 2, rerouted=[0, 1, 2])
    with pytest.raises(ValueError, match="0 experts are left"):
        route(TENTHS, router, 2, rerouted=range(4))


def test_more_forced_experts_than_are_chosen_are_refused() -> None:
    with pytest.raises(ValueError, match="3 experts are forced, but 2 are chosen"):
        route(TENTHS, SOFTMAX, 2, forced=[0, 1, 2])
