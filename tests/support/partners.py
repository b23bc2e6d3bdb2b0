"""Processes that wait for one another: where one fails, the others would never end."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping

import pytest

_POLL_SECONDS = 0.1
_DUMP_SECONDS = 30.0


def wait_for_all(
    processes: Mapping[str, subprocess.Popen[bytes]],
    timeout_s: float,
    *,
    log_of: Callable[[str], str],
    fault_of: Callable[[str], str | None],
) -> None:
    """Until all have ended well; else the test fails, and none of them is left running.

    log_of: what a process wrote, by name
    fault_of: why a process that ended well is of no use to those that still wait for it
    """
    deadline = time.monotonic() + timeout_s
    waiting = dict(processes)
    try:
        while waiting:
            for name in [name for name, process in waiting.items() if process.poll() is not None]:
                returncode = waiting.pop(name).returncode
                if returncode != 0:
                    pytest.fail(f"{name} ended with {returncode}:\n{log_of(name)}")
                if waiting and (fault := fault_of(name)) is not None:
                    pytest.fail(f"{name} failed, and {', '.join(waiting)} waited for it:\n{fault}")
            if waiting and time.monotonic() > deadline:
                _ask_for_stacks(waiting.values())
                logs = "\n".join(f"{name}:\n{log_of(name)}" for name in waiting)
                pytest.fail(f"{', '.join(waiting)} did not end in {timeout_s:g} s\n{logs}")
            time.sleep(_POLL_SECONDS)
    finally:
        for process in processes.values():
            process.kill()


def _ask_for_stacks(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Under PYTHONFAULTHANDLER a process writes where each of its threads stands as it aborts."""
    deadline = time.monotonic() + _DUMP_SECONDS
    asked = list(processes)
    for process in asked:
        process.send_signal(signal.SIGABRT)
    while any(process.poll() is None for process in asked) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
