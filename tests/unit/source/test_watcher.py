"""The watcher hands over sets that are new and whole, says what it could not read, and goes on."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from guard.failures import Failures, Stage
from guard.policy import PolicyError, PolicySet, PolicyTexts, load_policies
from guard.source.files import FileSource
from guard.source.source import out_of_reach
from guard.source.watcher import PolicyWatcher
from tests.unit.source.test_files import replace_by_rename, rewrite
from tests.unit.source.writing import policy, write

SOON_S = 60.0
"""Longer than any step of these tests takes; they wait for events, not for this."""


@dataclass(frozen=True)
class Result:
    fault: str | None = None


class Engines:
    """Takes what the watcher hands over, as the engines' side does."""

    def __init__(self, revision: str) -> None:
        self.revision = revision
        self.refusals: list[str] = []
        self.taken: queue.SimpleQueue[tuple[str, ...]] = queue.SimpleQueue()
        self.faults: Iterator[str | Exception] = iter(())

    def apply(self, load: Callable[[], PolicySet]) -> Result:
        try:
            policies = load()
        except PolicyError as error:
            self.refusals.append(str(error))
            self.taken.put(())
            return Result(str(error))
        fault = next(self.faults, None)
        if isinstance(fault, Exception):
            raise fault
        if fault is not None:
            return Result(fault)
        self.revision = policies.revision
        self.taken.put(tuple(sorted(p.name for p in policies.policies)))
        return Result()

    def all_taken(self) -> list[tuple[str, ...]]:
        taken = []
        while not self.taken.empty():
            taken.append(self.taken.get())
        return taken


class Scripted:
    """A source that gives, or raises, one thing after another."""

    name = "scripted"

    def __init__(self, *polls: PolicyTexts | PolicyError | Exception | None) -> None:
        self.polls = iter(polls)
        self.forced: list[bool] = []
        self.kept = 0
        self.keep_fault: PolicyError | None = None

    def poll(self, *, force: bool = False) -> PolicyTexts | None:
        self.forced.append(force)
        poll = next(self.polls)
        if isinstance(poll, Exception):
            raise poll
        return poll

    def keep(self) -> None:
        self.kept += 1
        if self.keep_fault is not None:
            raise self.keep_fault

    def delay_s(self) -> float:
        return 3600.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "p", a=policy("a"))


@pytest.fixture
def engines(folder: Path) -> Engines:
    return Engines(load_policies(folder).revision)


def watching(source: FileSource | Scripted, engines: Engines, failures: Failures) -> PolicyWatcher:
    return PolicyWatcher(source, engines.apply, lambda: engines.revision, failures)


def files(folder: Path) -> FileSource:
    return FileSource(folder, seconds=0.001, pause=lambda _: None)


def texts(folder: Path) -> PolicyTexts:
    read = files(folder).poll()
    assert read is not None
    return read


def broken(texts: PolicyTexts) -> PolicyTexts:
    return PolicyTexts((texts.policies[0]._replace(text="kind: Polcy\n"),))


def test_what_is_in_force_is_not_put_in_force_again(folder: Path, engines: Engines) -> None:
    watcher = watching(files(folder), engines, Failures())

    watcher.turn()
    (folder / "a.yaml").write_text("# A remark changes nothing.\n" + policy("a"))
    watcher.turn()

    assert engines.all_taken() == []


def test_what_changed_before_the_watcher_came_is_put_in_force_at_its_first_look(folder: Path) -> None:
    engines = Engines("000000000000")
    watching(files(folder), engines, Failures()).turn()

    assert engines.all_taken() == [("a",)]


def test_a_bad_set_is_refused_once_with_every_fault_and_the_good_one_that_follows_is_taken(
    folder: Path, engines: Engines
) -> None:
    watcher = watching(files(folder), engines, Failures())

    watcher.turn()
    write(folder, a=policy("a").replace("rules", "rulez"), b="kind: Polcy\n")
    watcher.turn()
    watcher.turn()
    (refusal,) = engines.refusals
    assert f"{folder}/a.yaml:6:3: " in refusal
    assert f"{folder}/b.yaml:1:" in refusal
    (folder / "b.yaml").unlink()
    rewrite(folder)
    watcher.turn()

    assert engines.all_taken() == [(), ("c",)]


def test_a_set_that_is_taken_back_to_what_is_in_force_is_told(
    folder: Path, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    good = texts(folder)
    watcher = watching(Scripted(broken(good), good, good), engines, Failures())

    with caplog.at_level(logging.INFO):
        for _ in range(3):
            watcher.turn()

    assert caplog.messages == [f"policies unchanged: scripted has revision {engines.revision}"]
    assert engines.all_taken() == [()]


def test_a_source_out_of_reach_is_told_once_for_each_reason_and_when_it_is_back(
    engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    down, other = out_of_reach("scripted", "is down"), out_of_reach("scripted", "is elsewhere")
    watcher = watching(Scripted(down, down, other, other, down, None, None), engines, Failures())

    with caplog.at_level(logging.INFO):
        for _ in range(7):
            watcher.turn()

    expected = ["scripted: is down", "scripted: is elsewhere", "scripted: is down"]
    assert engines.refusals == expected
    assert caplog.messages == ["policies can be read again: scripted"]


def test_who_asks_is_answered_in_any_case(
    folder: Path, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    down = out_of_reach("scripted", "is down")
    source = Scripted(down, down, texts(folder))
    watcher = watching(source, engines, Failures())

    with caplog.at_level(logging.INFO):
        watcher.turn()
        watcher.turn(is_asked=True)
        watcher.turn(is_asked=True)

    assert len(engines.refusals) == 2
    assert caplog.messages[-1] == f"policies unchanged: scripted has revision {engines.revision}"
    assert source.forced == [False, True, True]


def test_only_a_set_that_is_in_force_is_kept(
    folder: Path, tmp_path: Path, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    good, new = texts(folder), texts(write(tmp_path / "q", b=policy("b")))
    source = Scripted(broken(good), new, good, new)
    source.keep_fault = out_of_reach("cache", "cannot be written")
    watcher = watching(source, engines, Failures())
    engines.faults = iter(["it does not fit the model"])

    for expected in (0, 0, 1, 2):  # the third is what is in force already
        watcher.turn()
        assert source.kept == expected
    assert "not kept for the next start: cache: cannot be written" in caplog.text


def test_what_is_in_force_is_asked_for_at_every_look(folder: Path, engines: Engines) -> None:
    """Another way of reloading may have put in force what this source does not say."""
    good = texts(folder)
    watcher = watching(Scripted(good, good), engines, Failures())

    watcher.turn()
    engines.revision = "000000000000"
    watcher.turn(is_asked=True)

    assert engines.all_taken() == [("a",)]


@pytest.mark.parametrize("where", ["source", "engines"])
def test_a_fault_of_ours_is_counted_and_the_next_look_tries_again(
    folder: Path, tmp_path: Path, engines: Engines, where: str
) -> None:
    new = texts(write(tmp_path / "q", b=policy("b")))
    if where == "engines":
        engines.faults = iter([RuntimeError("no answer")])
        source = Scripted(new, new)
    else:
        source = Scripted(RuntimeError("a bug"), new)
    failures = Failures()
    watcher = watching(source, engines, failures)

    for _ in range(2):
        with failures.caught(Stage.RELOAD):
            watcher.turn()

    assert failures.take() == {"reload": 1}
    assert source.forced == [False, True]
    assert engines.all_taken() == [("b",)]


def test_the_thread_notices_a_change_and_stops(folder: Path, engines: Engines) -> None:
    failures = Failures()
    watcher = watching(files(folder), engines, failures)
    watcher.start()
    try:
        replace_by_rename(folder)  # whole at once: nothing pauses here for a file to come to rest
        assert engines.taken.get(timeout=SOON_S) == ("c",)
        (folder / "a.yaml").write_text("kind: Polcy\n")
        assert engines.taken.get(timeout=SOON_S) == ()
    finally:
        watcher.stop()
    assert "moe-guard-policies" not in {thread.name for thread in threading.enumerate()}
    assert failures.take() == {}


def test_the_thread_looks_at_once_when_it_is_asked(folder: Path, engines: Engines) -> None:
    source = Scripted(None, RuntimeError("a bug"), texts(folder))
    engines.revision = "000000000000"
    failures = Failures()
    watcher = watching(source, engines, failures)
    watcher.start()
    try:
        watcher.trigger()
        watcher.trigger()
        assert engines.taken.get(timeout=SOON_S) == ("a",)
    finally:
        watcher.stop()
    assert source.forced == [False, True, True]
    assert failures.take() == {"reload": 1}


def test_a_watcher_that_never_ran_can_be_stopped(engines: Engines) -> None:
    watching(Scripted(), engines, Failures()).stop()
