"""The decision log: its fields, its file, and what happens when that cannot be written."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from guard.events.log import decision_log
from guard.events.log.decision_log import DecisionLog
from guard.events.log.file import DecisionLogError
from tests.unit.events.reports import decision

# As in the policy language's contract.
FIELDS = {
    "decision_id", "time", "revision", "policy", "rule", "mode", "action", "severity", "request_id",
    "model", "phase", "position", "evidence", "unseen_tokens", "exempt", "outcome",
}  # fmt: skip


def no_drop(count: int) -> None:
    raise AssertionError(f"{count} lines dropped")


def test_each_decision_is_a_line_of_json_with_the_fields_of_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "new" / "decisions.jsonl"
    log = DecisionLog(path, no_drop)
    log.write(decision('quote " and \n newline'))
    log.write(decision("cmpl-2"))
    log.close()

    first, second = path.read_text(encoding="utf-8").splitlines()
    assert set(json.loads(first)) == {*FIELDS, "chain"}
    assert list(json.loads(first))[-1] == "chain"
    assert json.loads(first)["request_id"] == 'quote " and \n newline'
    assert json.loads(second)["evidence"] == [
        {"condition": "rate", "value": 0.5, "threshold": 0.25},
        {"condition": "mass", "value": None, "threshold": 0.1},
    ]


def test_without_a_chain_a_line_has_the_fields_of_the_contract_alone(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log", no_drop, chain=False)
    log.write(decision())
    log.close()

    assert set(json.loads((tmp_path / "log").read_text())) == FIELDS


def test_the_file_is_its_owners_alone_and_grows_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    for _ in range(2):
        log = DecisionLog(path, no_drop)
        log.write(decision())
        log.close()

    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_text().splitlines()) == 2


def test_a_file_that_cannot_be_opened_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(DecisionLogError, match="choose a file"):
        DecisionLog(tmp_path, no_drop)


def test_a_full_queue_drops_and_counts_and_never_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_log, "MAX_QUEUED_LINES", 3)
    go_on, write = threading.Event(), os.write
    dropped: list[int] = []

    def slow(fd: int, line: bytes) -> int:
        go_on.wait()
        return write(fd, line)

    monkeypatch.setattr(os, "write", slow)
    log = DecisionLog(tmp_path / "log", dropped.append)
    for _ in range(10):
        log.write(decision())
    go_on.set()
    log.close()

    written = len((tmp_path / "log").read_text().splitlines())
    assert written in (3, 4)  # one may already have been in the writer's hands
    assert written + sum(dropped) == 10


def test_a_failing_disk_is_counted_and_the_log_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    dropped: list[int] = []
    results = iter(["fail", "short", "whole", "whole"])

    def flaky(fd: int, line: bytes) -> int:
        match next(results):
            case "fail":
                raise OSError(28, "No space left on device")
            case "short":
                return write(fd, line[:20])
            case _:
                return write(fd, line)

    monkeypatch.setattr(os, "write", flaky)
    log = DecisionLog(tmp_path / "log", dropped.append)
    for number in range(4):
        log.write(decision(f"cmpl-{number}"))
    log.close()

    lines = (tmp_path / "log").read_text().splitlines()
    assert dropped == [1, 1]
    assert len(lines) == 3
    assert [json.loads(line)["request_id"] for line in lines[1:]] == ["cmpl-2", "cmpl-3"]


def test_what_comes_after_the_end_is_counted(tmp_path: Path) -> None:
    dropped: list[int] = []
    log = DecisionLog(tmp_path / "log", dropped.append)
    log.close()
    log.close()

    log.write(decision())

    assert dropped == [1]


def test_several_writers_share_a_file_line_by_line(tmp_path: Path) -> None:
    logs = [DecisionLog(tmp_path / "log", no_drop) for _ in range(4)]

    def write_all(number: int) -> None:
        for _ in range(200):
            logs[number].write(decision(str(number) * 500))

    threads = [threading.Thread(target=write_all, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()

    ids = [json.loads(line)["request_id"] for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(ids) == sorted(str(n) * 500 for n in range(4) for _ in range(200))
