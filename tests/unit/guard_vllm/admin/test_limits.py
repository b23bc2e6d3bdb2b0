"""How often is too often: bursts, what is due again, one caller beside another, bounded memory."""

from __future__ import annotations

import pytest
from guard_vllm.admin import limits
from guard_vllm.admin.limits import AdminLimits, Rate, RateLimit, caller_of
from hypothesis import given
from hypothesis import strategies as st


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_is_taken_at_once_and_one_more_for_each_interval() -> None:
    clock = Clock()
    limit = RateLimit(Rate(burst=3, every_s=10.0), clock)

    assert [limit.take("a") for _ in range(5)] == [0, 0, 0, 10.0, 10.0]
    assert limit.take("b") == 0
    clock.now += 9
    assert limit.wait_s("a") == pytest.approx(1.0)
    clock.now += 1
    assert [limit.take("a") for _ in range(2)] == [0, 10.0]
    clock.now += 1000
    assert [limit.take("a") for _ in range(4)] == [0, 0, 0, 10.0]


@given(
    st.lists(st.floats(0, 30), min_size=1, max_size=60), st.integers(1, 5), st.sampled_from([0.5, 2.0])
)
def test_in_no_stretch_of_time_is_more_taken_than_the_rate_gives(
    pauses: list[float], burst: int, every_s: float
) -> None:
    clock = Clock()
    limit = RateLimit(Rate(burst, every_s), clock)
    taken = []
    for pause in pauses:
        clock.now += pause
        if limit.take("a") == 0:
            taken.append(clock.now)
    for first, start in enumerate(taken):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + (taken[last] - start) / every_s + 1e-6


def test_what_is_refused_costs_nothing() -> None:
    clock = Clock()
    limit = RateLimit(Rate(burst=1, every_s=10.0), clock)
    limit.take("a")
    for _ in range(100):
        limit.take("a")
    clock.now += 10
    assert limit.take("a") == 0


def test_the_callers_that_are_remembered_are_bounded_and_the_latest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MAX_CALLERS", 3)
    limit = RateLimit(Rate(burst=1, every_s=10.0), Clock())
    for caller in "abc":
        limit.take(caller)
    limit.take("d")

    assert len(limit) == 3
    assert limit.wait_s("a") == 0
    assert all(limit.wait_s(caller) for caller in "bcd")


def test_an_urgent_change_is_held_up_by_its_own_callers_changes_alone() -> None:
    clock = Clock()
    own = AdminLimits(
        changes_each=RateLimit(Rate(2, 10.0), clock), changes_all=RateLimit(Rate(2, 10.0), clock)
    )
    assert own.change("a", is_urgent=False) == 0
    assert own.change("b", is_urgent=False) == 0
    assert own.change("c", is_urgent=False) > 0
    assert own.change("d", is_urgent=True) == 0
    assert own.change("a", is_urgent=True) == 0
    assert own.change("a", is_urgent=True) > 0


@pytest.mark.parametrize(
    ("client", "caller"),
    [
        (("192.0.2.7", 5), "192.0.2.7"),
        (("2001:db8:1:2:3:4:5:6", 5), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 5), "fe80::/64"),
        (("::ffff:192.0.2.7", 5), "192.0.2.7"),
        (("x\n" * 999, 5), ascii("x\n" * 32)),
        (None, "''"),
        (("", 0), "''"),
    ],
)
def test_a_caller_is_an_address_or_a_network_of_ipv6(
    client: tuple[str, int] | None, caller: str
) -> None:
    assert caller_of(client) == caller
