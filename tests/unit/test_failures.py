"""A fault of the guard ends where it happened, and is counted and named."""

from __future__ import annotations

import logging

import pytest

from guard.failures import Failures, Stage
from tests.support.drills import drilling


def test_a_fault_is_counted_logged_and_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures()
    with caplog.at_level(logging.ERROR), failures.caught(Stage.LEDGER):
        raise RuntimeError("injected")
    with failures.caught(Stage.LEDGER):
        raise RuntimeError("again")

    assert failures.count == {Stage.LEDGER: 2}
    first, second = caplog.records
    assert "fault 1 in stage ledger: injected" in first.getMessage()
    assert first.exc_info, "the first of a stage shows where it came from"
    assert not second.exc_info


def test_what_was_taken_is_not_given_again() -> None:
    failures = Failures()
    assert failures.take() == {}
    with failures.caught(Stage.EVALUATE):
        raise RuntimeError
    assert failures.take() == {"evaluate": 1}
    assert failures.take() == {}
    for _ in range(2):
        with failures.caught(Stage.EVALUATE):
            raise RuntimeError
    assert failures.take() == {"evaluate": 2}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_process_is_no_fault(stop: type[BaseException]) -> None:
    failures = Failures()
    with pytest.raises(stop), failures.caught(Stage.DELIVER):
        raise stop
    assert not failures.count


def test_a_single_call_ends_as_a_block_does() -> None:
    failures = Failures()
    assert failures.tried(Stage.LEDGER, divmod, 7, 2) == (3, 1)
    assert failures.tried(Stage.LEDGER, divmod, 7, 0) is None
    assert failures.take() == {"ledger": 1}


def test_a_single_call_can_be_made_to_fail_before_it_is_made() -> None:
    failures, calls = Failures(), list[int]()
    with drilling("ledger@2"):
        for number in range(3):
            failures.tried(Stage.LEDGER, calls.append, number)
    assert calls == [0, 2]
    assert failures.take() == {"ledger": 1}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_single_call_lets_through_what_ends_a_process(stop: type[BaseException]) -> None:
    def work() -> None:
        raise stop

    with pytest.raises(stop):
        Failures().tried(Stage.LEDGER, work)
