"""Rotation, sharing and repair of the decision log's file."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.events.log.decision_log import DecisionLog
from guard.events.log.file import DecisionLogError, LogFile, LogLimits
from tests.unit.events.reports import decision


def files(path: Path) -> list[Path]:
    """From the oldest to the youngest."""
    older = sorted(path.parent.glob(f"{path.name}.*"), key=lambda one: -int(one.suffix[1:]))
    return [*older, path]


def lines(path: Path) -> list[bytes]:
    content = b"".join(one.read_bytes() for one in files(path))
    assert content.endswith(b"\n")
    return content.splitlines(keepends=True)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.binary(min_size=0, max_size=30), max_size=40),
    max_bytes=st.integers(1, 100),
    restarts=st.sets(st.integers(0, 40)),
)
def test_nothing_is_lost_and_no_file_is_larger_than_asked(
    texts: list[bytes], max_bytes: int, restarts: set[int]
) -> None:
    written = [text.replace(b"\n", b"") + b"\n" for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        log = LogFile(path, LogLimits(max_bytes, keep=50))
        for number, line in enumerate(written):
            if number in restarts:
                log.close()
                log = LogFile(path, LogLimits(max_bytes, keep=50))
            assert log.append(line) == (len(line), True)
        log.close()

        assert b"".join(one.read_bytes() for one in files(path)) == b"".join(written)
        for one in files(path):
            content = one.read_bytes()
            assert len(content) <= max_bytes or content.count(b"\n") == 1
            assert one.stat().st_mode & 0o777 == 0o600
        for older, younger in pairwise(files(path)):  # none was rotated before it was full
            first = younger.read_bytes().partition(b"\n")[0] + b"\n"
            assert older.stat().st_size + len(first) > max_bytes


def test_so_many_older_files_are_kept_and_the_youngest_is_1(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogFile(path, LogLimits(max_bytes=5, keep=2))
    for number in range(6):
        log.append(b"%04d\n" % number)
    log.close()

    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == {
        "log": b"0005\n",
        "log.1": b"0004\n",
        "log.2": b"0003\n",
    }


def _append_many(path: Path, writer: int, count: int) -> None:
    log = LogFile(path, LogLimits(max_bytes=2_000, keep=900))
    for number in range(count):
        log.append(b"%d %05d %s\n" % (writer, number, b"x" * (number % 50)))
    log.close()


def test_processes_that_share_a_file_lose_no_line_over_rotations(tmp_path: Path) -> None:
    path, count = tmp_path / "log", 800
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append_many, args=(path, n, count)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    assert [process.exitcode for process in processes] == [0, 0, 0]
    found = [line.split(b" ")[:2] for line in lines(path)]
    assert len(files(path)) > 20
    for writer in range(3):
        own = [number for by, number in found if by == b"%d" % writer]
        assert own == [b"%05d" % number for number in range(count)]


def test_a_file_that_somebody_moved_away_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogFile(path, LogLimits())
    log.append(b"one\n")
    path.rename(tmp_path / "moved")
    log.append(b"two\n")
    path.unlink()
    log.append(b"three\n")
    log.close()

    assert (tmp_path / "moved").read_bytes() == b"one\n"
    assert path.read_bytes() == b"three\n"


def test_a_line_that_a_crash_cut_short_is_ended_when_the_file_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"a": 1}\n{"b":')

    log = LogFile(path, LogLimits())
    assert path.read_bytes() == b'{"a": 1}\n{"b":\n'
    log.append(b"{}\n")
    log.close()

    assert path.read_bytes() == b'{"a": 1}\n{"b":\n{}\n'


def test_what_another_process_left_torn_spoils_no_line_of_this_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogFile(path, LogLimits())
    with path.open("ab") as other:
        other.write(b'{"torn"')
    log.append(b"{}\n")
    log.close()

    assert path.read_bytes() == b'{"torn"\n{}\n'


def test_a_torn_line_is_ended_before_its_file_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogFile(path, LogLimits(max_bytes=8))
    log.append(b"{}\n")
    with path.open("ab") as other:
        other.write(b'{"torn"')
    log.append(b"[]\n")
    log.close()

    assert path.with_name("log.1").read_bytes() == b'{}\n{"torn"\n'
    assert path.read_bytes() == b"[]\n"


def test_a_rotation_that_fails_loses_nothing_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    path = tmp_path / "log"
    log = LogFile(path, LogLimits(max_bytes=5))
    monkeypatch.setattr(os, "replace", refuse)
    for _ in range(4):
        log.append(b"1234\n")
    log.close()

    assert path.read_bytes() == b"1234\n" * 4
    (record,) = caplog.records
    assert f"cannot rotate the decision log {path} (Operation not permitted)" in record.message


def test_a_pipe_is_written_to_and_not_rotated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = LogFile(path, LogLimits(max_bytes=3, sync="always"))
    for _ in range(2):
        log.append(b"line\n")
    log.sync()
    log.close()

    assert os.read(reading, 100) == b"line\nline\n"
    os.close(reading)
    assert "does not rotate" in caplog.text


def test_a_file_system_without_locks_is_written_to_and_not_rotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    log = LogFile(tmp_path / "log", LogLimits(max_bytes=3))
    for _ in range(2):
        log.append(b"line\n")
    log.close()

    assert [one.name for one in tmp_path.iterdir()] == ["log"]


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DecisionLogError, match="choose a file"):
        LogFile(tmp_path, LogLimits())


@pytest.mark.parametrize(
    ("sync", "fewest", "most"), [("never", 0, 0), ("second", 1, 2), ("always", 5, 6)]
)
def test_the_disk_is_waited_for_as_often_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: str, fewest: int, most: int
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = DecisionLog(tmp_path / "log", lambda count: None, LogLimits(sync=sync))
    for _ in range(5):
        log.write(decision())
    log.close()

    assert fewest <= len(synced) <= most


def test_what_waits_is_on_the_disk_a_second_later_without_another_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr("guard.events.log.decision_log.SYNC_SECONDS", 0.2)
    log = DecisionLog(tmp_path / "log", lambda count: None, LogLimits(sync="second"))
    log.write(decision())

    deadline = time.monotonic() + 5
    while not synced and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(synced) == 1
    log.close()


def test_lines_that_the_disk_did_not_confirm_count_as_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    dropped: list[int] = []
    monkeypatch.setattr(os, "fsync", fail)
    log = DecisionLog(tmp_path / "log", dropped.append, LogLimits(sync="always"))
    for _ in range(3):
        log.write(decision())
    log.close()

    assert sum(dropped) == 3


def test_bytes_are_counted_as_they_are_written(tmp_path: Path) -> None:
    written: list[int] = []
    log = DecisionLog(
        tmp_path / "log", lambda count: None, LogLimits(max_bytes=500, keep=9), written.append
    )
    for _ in range(5):
        log.write(decision())
    log.close()

    assert sum(written) == sum(one.stat().st_size for one in files(tmp_path / "log"))
    assert len(files(tmp_path / "log")) > 1
