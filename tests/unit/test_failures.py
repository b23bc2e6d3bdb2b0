"""A fault of the guard ends where it happened, and is counted and named."""

from __future__ import annotations

import logging

import pytest

from guard.failures import Failures, Stage


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
