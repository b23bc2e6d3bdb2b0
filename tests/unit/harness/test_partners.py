"""What the tests' engines do when one of several fails: an answer at once, and nothing left running."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.partners import wait_for_all
from tests.support.ports import free_port

FOR_EVER_S = 300.0
WAITS = f"import sys, time; print('ready', file=sys.stderr, flush=True); time.sleep({FOR_EVER_S})"


def start(code: str, log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
    with log.open("w") as output:
        return subprocess.Popen([sys.executable, "-c", code], stderr=output, env=environment)


def wait(
    tmp_path: Path, timeout_s: float = FOR_EVER_S, fault: str | None = None, **codes: str
) -> dict[str, subprocess.Popen[bytes]]:
    def log(name: str) -> Path:
        return tmp_path / f"{name}.log"

    processes = {name: start(code, log(name)) for name, code in codes.items()}
    while any(code == WAITS and "ready" not in log(name).read_text() for name, code in codes.items()):
        time.sleep(0.01)
    try:
        wait_for_all(
            processes, timeout_s, log_of=lambda name: log(name).read_text(), fault_of=lambda _: fault
        )
    finally:
        for process in processes.values():
            process.wait(FOR_EVER_S / 2)  # less than it would wait by itself
    return processes


def test_processes_that_end_well_are_waited_for(tmp_path: Path) -> None:
    processes = wait(tmp_path, one="pass", other="import time; time.sleep(0.2)")
    assert {process.returncode for process in processes.values()} == {0}


def test_one_that_fails_is_told_with_its_log_and_ends_the_one_that_waits(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"one ended with 1:\n.*no such port"):
        wait(tmp_path, one="raise SystemExit('no such port')", other=WAITS)


def test_one_that_ends_well_and_is_of_no_use_ends_the_one_that_waits(tmp_path: Path) -> None:
    said = "one failed, and other waited for it:\nthe address is in use"
    with pytest.raises(pytest.fail.Exception, match=said):
        wait(tmp_path, fault="the address is in use", one="pass", other=WAITS)


def test_a_fault_that_nobody_waits_for_is_left_to_the_test(tmp_path: Path) -> None:
    wait(tmp_path, fault="what this test wants to see", one="pass")


def test_one_that_does_not_end_says_where_it_stands(tmp_path: Path) -> None:
    said = r"(?s)other did not end in 0.1 s\nother:\n.*Aborted.*File \"<string>\", line 1"
    with pytest.raises(pytest.fail.Exception, match=said):
        wait(tmp_path, timeout_s=0.1, other=WAITS)


def test_ports_in_a_row_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: set[int] = set()
    looked_at: list[int] = []

    def is_free(port: int) -> bool:
        looked_at.append(port)
        if not taken:
            taken.add(port)  # the first one that is looked at
        return port not in taken

    monkeypatch.setattr("tests.support.ports._is_free", is_free)
    first = free_port(in_a_row=16)
    assert taken.isdisjoint(range(first, first + 16))
    assert set(range(first, first + 16)) <= set(looked_at)
