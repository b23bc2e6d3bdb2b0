"""A policy set comes into force in all engines that this process speaks with, or in none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from guard_vllm.core_reload import (
    CORE_ABANDON_METHOD,
    CORE_COMMIT_METHOD,
    CORE_PREPARE_METHOD,
    CORE_PROGRAM_METHOD,
)
from guard_vllm.reload import Reloader

from guard.policy import parse_policies
from guard.program.codec import decode_program, encode_program
from guard.program.compile import compile_policies
from guard.program.topology import MoELayer, Topology
from tests.unit.device.driving import COUNT, policy_text, rule_text

TOPOLOGY = Topology("T", (MoELayer(0, 8, 2), MoELayer(1, 8, 2)))
OLD = parse_policies(policy_text(rule_text("{always: {}}")))
NEW = parse_policies(policy_text(rule_text(COUNT)))


class Bus:
    revision = OLD.revision

    def note_reload(self, *, succeeded: bool) -> None:
        pass


class Engine:
    """parts: that preparing takes; refuses: the method that it answers with a fault"""

    def __init__(self, parts: int = 1, refuses: str = "") -> None:
        self.program = encode_program(compile_policies(OLD, TOPOLOGY))
        self.calls: list[str] = []
        self._parts = parts
        self._refuses = refuses
        self._preparing = self.program

    def call(self, method: str, data: bytes | None = None) -> Any:
        self.calls.append(method)
        if method == self._refuses:
            return "no room"
        if method == CORE_PROGRAM_METHOD:
            return self.program
        if method == CORE_PREPARE_METHOD:
            self._preparing = data or self._preparing
            return "" if self.calls.count(method) >= self._parts else None
        if method == CORE_COMMIT_METHOD:
            self.program = self._preparing
        return ""


def reloader(*engines: Engine, of: int | None = None) -> Reloader:
    def call(method: str, *args: Any) -> list[Any]:
        return [engine.call(method, *args) for engine in engines]

    num_engines = len(engines) if of is None else of
    bus: Any = Bus()
    return Reloader(call, bus, observe_only=False, model="m", engines=num_engines)


def revisions(*engines: Engine) -> list[str]:
    return [decode_program(engine.program).revision for engine in engines]


def test_no_engine_commits_before_all_have_prepared() -> None:
    quick, slow = Engine(parts=1), Engine(parts=4)
    order: list[tuple[str, str]] = []

    def noting(name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        def call(method: str, *args: Any) -> Any:
            order.append((name, method))
            return stock(method, *args)

        return call

    for name, engine in (("quick", quick), ("slow", slow)):
        engine.call = noting(name, engine.call)  # type: ignore[method-assign]

    assert reloader(quick, slow).apply(lambda: NEW).is_in_force

    last = max(i for i, (_, method) in enumerate(order) if method == CORE_PREPARE_METHOD)
    first = min(i for i, (_, method) in enumerate(order) if method == CORE_COMMIT_METHOD)
    assert last < first
    assert order.count(("slow", CORE_PREPARE_METHOD)) == 4
    assert revisions(quick, slow) == [NEW.revision] * 2


def test_what_one_engine_cannot_prepare_comes_into_force_in_none() -> None:
    good, bad = Engine(parts=3), Engine(refuses=CORE_PREPARE_METHOD)

    result = reloader(good, bad).apply(lambda: NEW)

    assert result.fault == "engine 1: no room"
    assert revisions(good, bad) == [OLD.revision] * 2
    for engine in (good, bad):
        assert engine.calls[-1] == CORE_ABANDON_METHOD
        assert CORE_COMMIT_METHOD not in engine.calls


def test_engines_that_differ_are_told_apart_and_change_no_more() -> None:
    good, bad = Engine(), Engine(refuses=CORE_COMMIT_METHOD)
    both = reloader(good, bad)

    first = both.apply(lambda: NEW)
    second = both.apply(lambda: OLD)

    assert first.fault == "engine 1: no room; other engines have it in force: restart the server"
    assert second.fault == "the engines have different policies in force; restart the server"


def test_of_one_engine_no_number_is_said() -> None:
    assert reloader(Engine(refuses=CORE_PREPARE_METHOD)).apply(lambda: NEW).fault == "no room"


@pytest.mark.parametrize("spoken_with", [1, 2])
def test_a_process_that_does_not_speak_with_all_engines_changes_nothing(spoken_with: int) -> None:
    engines = [Engine() for _ in range(spoken_with)]

    result = reloader(*engines, of=3).apply(lambda: NEW)

    assert result.fault is not None
    assert f"{spoken_with} of 3" in result.fault
    assert revisions(*engines) == [OLD.revision] * spoken_with
