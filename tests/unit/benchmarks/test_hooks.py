"""A hook's own time: without that of the method it stands around."""

from __future__ import annotations

from typing import Any

import pytest
from guard_vllm.steps import wrap

from benchmarks.hooks import Stopwatch, time_hooks


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Engine:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def step(self, seconds: float) -> str:
        self._clock.now += seconds
        return "stepped"

    def other(self) -> None: ...


@pytest.fixture
def clock() -> Clock:
    return Clock()


def hooked(clock: Clock, module: str = "guard_vllm.tests") -> Engine:
    def around(stock: Any, *args: Any) -> Any:
        clock.now += 1.0
        result = stock(*args)
        clock.now += 2.0
        return result

    around.__module__ = module
    engine = Engine(clock)
    wrap(engine, "step", around)
    return engine


def test_the_time_of_the_engines_own_method_is_not_the_hooks(clock: Clock) -> None:
    engine, watch = hooked(clock), Stopwatch(clock)
    assert time_hooks(iter([engine]), watch) == ["step"]
    for _ in range(2):
        assert engine.step(40.0) == "stepped"
    assert watch.seconds == {"step": 6.0}


def test_a_hook_that_fails_is_timed_and_fails(clock: Clock) -> None:
    engine, watch = hooked(clock), Stopwatch(clock)
    time_hooks(iter([engine]), watch)
    with pytest.raises(TypeError):
        engine.step("long")  # type: ignore[arg-type]
    assert watch.seconds == {"step": 1.0}


def test_what_somebody_else_hung_there_is_not_timed(clock: Clock) -> None:
    assert time_hooks(iter([hooked(clock, "others")]), Stopwatch(clock)) == []
