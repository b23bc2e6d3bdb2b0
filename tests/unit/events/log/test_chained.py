"""The chain as it is written: over processes, rotations, crashes, and what others did to the file."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guard.events.log.anchor import Anchor
from guard.events.log.chained import ChainedLog, LogChangedError
from guard.events.log.file import Appended, DecisionLogError, LogFile, LogLimits
from guard.events.log.key import KeyFile, LogKeyError, SealingKey, read_key
from tests.unit.events.log.chains import (
    check,
    check_files,
    lines_of,
    make_key,
    older_first,
    open_log,
    record,
    told,
)

SEALED = pytest.mark.parametrize("is_sealed", [False, True], ids=["plain", "sealed"])


def key_in(folder: Path, is_sealed: bool) -> tuple[Path | None, SealingKey | None]:
    """For the server, and to verify with."""
    return (folder / "key", make_key(folder / "key")) if is_sealed else (None, None)


def chains_in(path: Path) -> list[dict[str, object]]:
    content = b"".join(one.read_bytes() for one in older_first(path))
    return [json.loads(line)["chain"] for line in content.splitlines()]


@SEALED
def test_the_chain_goes_on_over_rotations_and_restarts(tmp_path: Path, is_sealed: bool) -> None:
    path = tmp_path / "log"
    key, first_key = key_in(tmp_path, is_sealed)
    for start in range(4):
        log = open_log(path, key, max_bytes=900)
        for number in range(5):
            assert log.append(record(10 * start + number)).is_whole
        log.close()

    report = check_files(path, first_key)
    assert report.findings == ()
    assert (report.num_good, report.first_n, report.last_n) == (20, 1, 20)
    assert len(older_first(path)) > 4
    assert len({str(one["log"]) for one in chains_in(path)}) == 1
    assert all(("seal" in one) == is_sealed for one in chains_in(path))


@SEALED
def test_a_log_whose_older_files_were_deleted_is_good_and_says_where_it_begins(
    tmp_path: Path, is_sealed: bool
) -> None:
    path = tmp_path / "log"
    key, first_key = key_in(tmp_path, is_sealed)
    log = open_log(path, key, max_bytes=900, keep=2)
    for number in range(30):
        log.append(record(number))
    log.close()

    report = check_files(path, first_key)
    assert report.num_faults == 0
    assert [one.kind for one in report.findings] == ["begins-later"]
    assert report.first_n > 20


def test_two_logs_have_two_ids(tmp_path: Path) -> None:
    for name in ("a", "b"):
        log = open_log(tmp_path / name)
        log.append(record(1))
        log.close()

    assert chains_in(tmp_path / "a")[0]["log"] != chains_in(tmp_path / "b")[0]["log"]


class Killed(BaseException):
    """The process is gone: nothing catches it."""


@contextmanager
def killed_in_a_line(after: int) -> Iterator[None]:
    """In the middle of the next write, behind so many of its bytes."""
    write = os.write

    def die(fd: int, content: bytes) -> int:
        write(fd, content[: min(after, len(content) - 1)])
        raise Killed

    with mock.patch.object(os, "write", die):
        yield


@contextmanager
def killed_between_line_and_key() -> Iterator[None]:
    """Not before the line: the key may be written then too, of a line that others left."""
    write_line, write_key = LogFile.write, KeyFile.write
    is_written = False

    def write_line_and_note(file: LogFile, line: bytes) -> Appended:
        nonlocal is_written
        done = write_line(file, line)
        is_written = True
        return done

    def die_behind_the_line(file: KeyFile, *arguments: Any) -> None:
        if is_written:
            raise Killed
        write_key(file, *arguments)

    with (
        mock.patch.object(LogFile, "write", write_line_and_note),
        mock.patch.object(KeyFile, "write", die_behind_the_line),
    ):
        yield


WRITERS = 3
Step = tuple[str, int, int]
STEPS = st.one_of(
    st.tuples(st.just("line"), st.integers(0, WRITERS - 1), st.integers(0, 40)),
    st.tuples(st.just("line"), st.integers(0, WRITERS - 1), st.integers(0, 40)),
    st.tuples(st.just("killed in a line"), st.integers(0, WRITERS - 1), st.integers(0, 500)),
    st.tuples(st.just("killed before the key"), st.integers(0, WRITERS - 1), st.just(0)),
    st.tuples(st.just("disk full"), st.integers(0, WRITERS - 1), st.integers(0, 500)),
    st.tuples(st.just("restart"), st.integers(0, WRITERS - 1), st.just(0)),
)


@settings(max_examples=80, deadline=None)
@given(
    steps=st.lists(STEPS, max_size=40),
    max_bytes=st.sampled_from([1, 400, 900, 4000, None]),
    is_sealed=st.booleans(),
)
@example(steps=[("disk full", 0, 320), ("killed before the key", 0, 0)], max_bytes=1, is_sealed=True)
def test_whatever_writers_are_killed_in_the_chain_has_no_fault_and_no_line_is_lost(
    steps: list[Step], max_bytes: int | None, is_sealed: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log")
        key, first_key = key_in(Path(folder), is_sealed)

        def opened() -> ChainedLog:
            return open_log(path, key, max_bytes=max_bytes)

        logs = [opened() for _ in range(WRITERS)]
        written = []
        for number, (what, writer, size) in enumerate(steps):
            log, line = logs[writer], record(number, size % 40)
            match what:
                case "line":
                    assert log.append(line).is_whole
                    written.append(number)
                case "killed in a line":
                    with killed_in_a_line(size), pytest.raises(Killed):
                        log.append(line)
                    log.close()
                    logs[writer] = opened()
                case "killed before the key" if is_sealed:
                    with killed_between_line_and_key(), pytest.raises(Killed):
                        log.append(line)
                    written.append(number)
                    log.close()
                    logs[writer] = opened()
                case "disk full":
                    with mock.patch.object(os, "write", _short(size)):
                        done = log.append(line)
                    assert not done.is_whole
                case "restart":
                    log.close()
                    logs[writer] = opened()
        for log in logs:
            log.close()

        report = check_files(path, first_key)
        assert report.num_faults == 0, report.findings
        lines = [line for one in older_first(path) for line in one.read_bytes().splitlines()]
        ids = [int(json.loads(line)["decision_id"]) for line in lines if _is_json(line)]
        assert set(written) <= set(ids)
        assert ids == sorted(ids)
        assert report.num_good == report.last_n == len(ids)


def _short(after: int) -> object:
    """An `os.write` on a disk that has room for so many bytes more; not for a whole line."""
    write = os.write
    return lambda fd, content: write(fd, content[: min(after, len(content) - 1)])


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _write_until_killed(path: Path, key: Path | None, seed: int, count: int) -> None:
    """Ends by itself, or in the middle of a line, or by a signal at any moment."""
    chance = random.Random(seed)
    log = open_log(path, key, max_bytes=4_000)
    dies_at = chance.randrange(2 * count)
    for number in range(count):
        if number == dies_at:
            with killed_in_a_line(chance.randrange(300)):
                try:
                    log.append(record(number, chance.randrange(200)))
                except Killed:
                    os._exit(0)
        log.append(record(number, chance.randrange(200)))
    log.close()


@SEALED
def test_processes_that_are_killed_at_any_moment_leave_a_chain_without_fault(
    tmp_path: Path, is_sealed: bool
) -> None:
    path = tmp_path / "log"
    key, first_key = key_in(tmp_path, is_sealed)
    context = multiprocessing.get_context("fork")
    chance = random.Random(11)
    for turn in range(5):
        processes = [
            context.Process(target=_write_until_killed, args=(path, key, 10 * turn + n, 120))
            for n in range(3)
        ]
        for process in processes:
            process.start()
        processes[0].join(chance.random() * 0.05)
        processes[0].kill()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes[1:]] == [0, 0]
    log = open_log(path, key)  # ends a line that the last process cut short
    log.append(record(0))
    log.close()

    report = check_files(path, first_key)
    assert report.num_faults == 0, report.findings
    assert report.num_good == report.last_n > 100


@SEALED
def test_who_rotates_goes_on_behind_the_process_that_is_faster_in_the_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_sealed: bool
) -> None:
    path = tmp_path / "log"
    key, first_key = key_in(tmp_path, is_sealed)
    log = open_log(path, key, max_bytes=900)
    replace = os.replace

    def rotate(source: str, target: str) -> None:
        replace(source, target)
        faster = open_log(path, key)
        faster.append(record(100))
        faster.close()

    monkeypatch.setattr(os, "replace", rotate)
    while not path.with_name("log.1").exists():
        log.append(record(1))
    log.close()

    report = check_files(path, first_key)
    assert report.findings == ()
    assert b'"100"' in path.read_bytes().splitlines()[0]
    assert len(path.read_bytes().splitlines()) == 2


def test_a_line_that_was_cut_by_nothing_but_its_end_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    one, other = open_log(path), open_log(path)
    with mock.patch.object(os, "write", _short(9_999)):
        assert not one.append(record(0)).is_whole
    other.append(record(1))
    one.append(record(2))
    one.close()
    other.close()

    assert check_files(path).findings == ()
    assert check_files(path).num_good == 3


class Faults(list[str]):
    def __call__(self, error: Exception) -> None:
        assert isinstance(error, LogChangedError)
        self.append(str(error))


def heeded(path: Path, faults: Faults, key: Path | None = None) -> ChainedLog:
    return ChainedLog(path, LogLimits(), key, faults)


@SEALED
def test_a_tail_that_is_cut_off_under_a_running_writer_is_told_once_and_shows(
    tmp_path: Path, is_sealed: bool
) -> None:
    path, faults = tmp_path / "log", Faults()
    key, first_key = key_in(tmp_path, is_sealed)
    log = heeded(path, faults, key)
    for number in range(10):
        log.append(record(number))
    lines = path.read_bytes().splitlines(keepends=True)
    os.truncate(path, len(b"".join(lines[:6])))
    for number in range(10, 13):
        log.append(record(number))
    log.close()

    assert len(faults) == 1
    assert "n=6, but n=10 was written, and is gone" in faults[0]
    report = check_files(path, first_key)
    assert told(report) == ["file-0:7 missing"]
    assert "lines n=7 to n=10 are missing" in str(report.findings[0])


@SEALED
def test_a_file_that_is_emptied_under_a_running_writer_is_told_and_shows(
    tmp_path: Path, is_sealed: bool
) -> None:
    path, faults = tmp_path / "log", Faults()
    key, first_key = key_in(tmp_path, is_sealed)
    log = heeded(path, faults, key)
    log.append(record(0))
    os.truncate(path, 0)
    log.append(record(1))
    log.close()

    assert len(faults) == 1
    assert "shorter than this process left it" in faults[0]
    assert told(check_files(path, first_key)) == ["file-0:1 begins-later"]


def test_another_logs_line_at_the_end_is_told_and_shows(tmp_path: Path) -> None:
    path, faults = tmp_path / "log", Faults()
    logs = [heeded(path, faults) for _ in range(2)]
    for log in logs:
        log.append(record(0))
    with path.open("ab") as file:
        file.write(lines_of(1)[0])
    for log in (*logs, *logs):
        log.append(record(1))
    for log in logs:
        log.close()

    assert len(faults) == 2, "each writer says it once, and they go on together"
    assert all("another log" in fault for fault in faults)
    assert told(check_files(path)) == ["file-0:3 spliced"]


def test_a_sealed_log_goes_on_over_a_line_that_its_key_did_not_make(tmp_path: Path) -> None:
    path, faults = tmp_path / "log", Faults()
    key, first_key = key_in(tmp_path, True)
    assert first_key is not None
    log = heeded(path, faults, key)
    log.append(record(0))
    forged = lines_of(2, head=first_key.head)[1]  # of this log, with the next number, without a seal
    with path.open("ab") as file:
        file.write(forged)
    log.append(record(1))
    log.append(record(2))
    log.close()

    assert len(faults) == 1
    assert told(check_files(path, first_key)) == [
        "file-0:2 unsealed",
        "file-0:3 repeated",
        "file-0:4 replaced",
    ]


def test_a_sealed_log_whose_end_was_cut_off_while_no_server_ran_is_told_at_the_start(
    tmp_path: Path,
) -> None:
    path, faults = tmp_path / "log", Faults()
    key, first_key = key_in(tmp_path, True)
    log = heeded(path, faults, key)
    for number in range(5):
        log.append(record(number))
    log.close()
    lines = path.read_bytes().splitlines(keepends=True)
    os.truncate(path, len(b"".join(lines[:3])))

    log = heeded(path, faults, key)
    log.append(record(5))
    log.close()

    assert len(faults) == 1
    assert told(check_files(path, first_key)) == ["file-0:4 missing"]


@SEALED
def test_a_log_that_is_moved_away_goes_on_in_a_new_file_whoever_writes_it(
    tmp_path: Path, is_sealed: bool
) -> None:
    path = tmp_path / "log"
    key, first_key = key_in(tmp_path, is_sealed)
    one, other = open_log(path, key), open_log(path, key)
    one.append(record(0))
    other.append(record(1))
    with mock.patch.object(os, "write", _short(9)):
        other.append(record(2))  # cut short in the file that is moved
    path.rename(tmp_path / "moved")
    one.append(record(3))
    other.append(record(4))
    one.close()
    other.close()

    report = check([(tmp_path / "moved").read_bytes()], [path.read_bytes()], key=first_key)
    assert told(report) == ["file-0:3 torn"]
    assert report.num_good == 4


@SEALED
@pytest.mark.parametrize("sync", ["never", "second", "always"])
def test_a_key_on_the_disk_is_of_a_line_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_sealed: bool, sync: str
) -> None:
    key, _ = key_in(tmp_path, is_sealed)
    log = ChainedLog(tmp_path / "log", LogLimits(sync=sync), key, lambda error: None)
    done: list[str] = []
    fsync, write = os.fsync, KeyFile.write

    def sync_file(fd: int) -> None:
        done.append("sync")
        fsync(fd)

    def write_key(file: KeyFile, key: SealingKey) -> None:
        done.append("key")
        write(file, key)

    monkeypatch.setattr(os, "fsync", sync_file)
    monkeypatch.setattr(KeyFile, "write", write_key)
    log.append(record(0))
    log.sync()
    log.close()

    by_line = [*(["sync"] if sync == "always" else []), "key"] if is_sealed else []
    assert done == [*by_line, *(["sync", "sync"] if is_sealed else ["sync"])]


def test_a_key_behind_its_log_catches_up_by_any_number_of_lines(tmp_path: Path) -> None:
    """As a power cut may leave them."""
    path = tmp_path / "log"
    key, first_key = key_in(tmp_path, True)
    assert key is not None
    early = key.read_bytes()
    log = open_log(path, key)
    for number in range(20):
        log.append(record(number))
    log.close()
    key.write_bytes(early)

    log = open_log(path, key)
    log.append(record(20))
    log.close()

    assert check_files(path, first_key).num_good == 21
    assert read_key(key).head.n == 21


def test_a_key_on_the_server_makes_no_line_of_before(tmp_path: Path) -> None:
    """Who takes the server has the log and the key file; the seals of older lines need older keys."""
    path = tmp_path / "log"
    key, first_key = key_in(tmp_path, True)
    assert key is not None
    assert first_key is not None
    log = open_log(path, key)
    for number in range(5):
        log.append(record(number))
    log.close()
    taken = read_key(key)
    lines = path.read_bytes().splitlines(keepends=True)

    forged = lines_of(5, taken._replace(head=first_key.head))  # as well as that key can
    assert taken.key != first_key.key
    assert check(forged, key=first_key).num_faults == 5
    assert check([*lines[:4], *lines_of(1, taken._replace(head=taken.head._replace(n=4)))]).num_faults
    behind = lines_of(1, taken)
    assert check([*lines, *behind], key=first_key).num_faults == 0, "later lines it makes"
    assert key.read_bytes().find(first_key.key.hex().encode()) == -1


def test_a_sealed_log_is_not_opened_without_its_key_nor_another_with_it(tmp_path: Path) -> None:
    key, other = tmp_path / "key", tmp_path / "other"
    make_key(key)
    make_key(other)
    log = open_log(tmp_path / "sealed", key)
    log.append(record(0))
    log.close()
    (tmp_path / "bare").write_bytes(record(0))
    log = open_log(tmp_path / "plain")
    log.append(record(0))
    log.close()

    with pytest.raises(DecisionLogError, match="is sealed: start with its key"):
        open_log(tmp_path / "sealed")
    for name in ("sealed", "bare", "plain"):
        with pytest.raises(DecisionLogError, match="holds lines that its key did not seal"):
            open_log(tmp_path / name, other)


def test_a_log_that_cannot_be_shared_is_not_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_key(tmp_path / "key")

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(DecisionLogError, match="cannot be sealed"):
        open_log(tmp_path / "log", tmp_path / "key")


def test_a_log_from_before_the_chain_goes_on_with_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(record(0) + record(1))
    for _ in range(2):
        log = open_log(path)
        log.append(record(2))
        log.close()

    report = check_files(path)
    assert told(report) == ["file-0:1 unchained"]
    assert report.num_good == 2


def test_a_pipe_gets_a_chain_that_begins_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = open_log(path, sync="always")
    for number in range(3):
        log.append(record(number))
    log.sync()
    log.close()

    assert check([os.read(reading, 10_000)]).num_good == 3
    os.close(reading)


def test_a_key_that_can_no_longer_be_kept_is_told_and_stops_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told_of: list[Exception] = []
    key, first_key = key_in(tmp_path, True)
    assert key is not None
    path = tmp_path / "log"
    log = ChainedLog(path, LogLimits(), key, told_of.append)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    log.append(record(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        log.append(record(1))
    key.chmod(0o644)
    os.truncate(path, path.stat().st_size - 5)
    log.append(record(2))
    log.close()

    assert [type(one) for one in told_of] == [OSError, LogKeyError, LogChangedError]
    assert told(check_files(path, first_key)) == ["file-0:2 torn", "file-0:3 missing"]


def test_nothing_is_read_where_nobody_else_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path / "log")
    log.append(record(0))
    monkeypatch.setattr("guard.events.log.chained.read_tail", None)
    for number in range(5):
        log.append(record(number))
    log.close()

    assert check_files(tmp_path / "log").num_good == 6
    assert check_files(tmp_path / "log", anchor=Anchor(1, "0" * 64)).num_faults == 1
