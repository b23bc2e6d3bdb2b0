"""Ranges of a set's entries, united without going through what overlaps again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guard.policy.references import _united

ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)))


@given(ranges)
def test_each_number_comes_once_and_in_order(drawn: list[tuple[int, int]]) -> None:
    given_ranges = [range(first, first + count) for first, count in drawn]

    assert list(_united(given_ranges)) == sorted(set().union(*given_ranges))


def test_a_range_within_another_costs_nothing() -> None:
    assert sum(1 for _ in _united([range(65_536)] * 100_000)) == 65_536
