"""An example comes out as a result or a documented error, within limits, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from guard.errors import GuardError
from tools.fuzz.limits import Limits
from tools.fuzz.part import ACCEPTED, Outcome, Part, judged
from tools.fuzz.rounds import Counts, OneSidedError, check_both_sides, run_for, run_turn

REFUSED = Outcome(False, "GuardError")


def part(
    read: Callable[[int], Outcome | None], state: Callable[[], object] = lambda: None
) -> Part[int]:
    return Part(st.integers(0, 99), read, (GuardError,), state)


def refuses_odd(number: int) -> None:
    if number % 2:
        raise GuardError(f"{number} is odd")


def test_outcomes_are_counted_by_part(tmp_path: Path) -> None:
    counts: Counts = Counter()
    run_turn("one", part(refuses_odd), tmp_path, counts, num_examples=50)
    assert counts["one", ACCEPTED] > 5
    assert counts["one", REFUSED] > 5
    check_both_sides(counts, {"one": part(refuses_odd)})


def test_the_same_turn_has_the_same_examples(tmp_path: Path) -> None:
    seen: list[list[int]] = [[], []]
    for numbers in seen:
        run_turn("one", part(numbers.append), tmp_path, Counter(), number=4)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("outcome", [ACCEPTED, REFUSED], ids=["accepted", "refused"])
def test_a_part_that_sees_one_outcome_alone_tells_nothing(tmp_path: Path, outcome: Outcome) -> None:
    counts: Counts = Counter()
    one = part(lambda _: outcome)
    run_turn("one", one, tmp_path, counts, num_examples=9)
    only = "nothing was refused" if outcome.is_accepted else "nothing was accepted"
    with pytest.raises(OneSidedError, match=only):
        check_both_sides(counts, {"one": one})
    with pytest.raises(OneSidedError, match="nothing was accepted or refused"):
        check_both_sides(Counter(), {"one": one})


def test_the_smallest_example_is_told_however_late_it_is(tmp_path: Path) -> None:
    def read(number: int) -> None:
        if number >= 40:
            time.sleep(0.2)  # longer than the turn may take
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as seen:
        run_for({"one": part(read)}, tmp_path, seconds=5.0)
    assert "in the part one, turn 1; the smallest example: 40" in seen.value.__notes__


def test_what_a_refusal_changed_is_seen(tmp_path: Path) -> None:
    kept: list[int] = []

    def read(number: int) -> None:
        kept.append(number)
        raise GuardError("no")

    with pytest.raises(AssertionError, match=r"before it was 0, and is 1"):
        judged(part(read, lambda: len(kept)), 1, Limits(tmp_path))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GuardError(" "), "says nothing"),
        (GuardError("half of a character: \ud800"), "surrogates not allowed"),
        (GuardError("x" * (1 << 21)), "characters of message"),
    ],
    ids=["empty", "no text", "endless"],
)
def test_a_refusal_that_nobody_can_be_shown_is_seen(
    tmp_path: Path, error: GuardError, message: str
) -> None:
    def read(_: int) -> None:
        raise error

    with pytest.raises((AssertionError, UnicodeEncodeError), match=message):
        judged(part(read), 1, Limits(tmp_path))


def test_a_lack_of_memory_behind_a_refusal_is_seen(tmp_path: Path) -> None:
    def read(_: int) -> None:
        raise GuardError("no") from MemoryError()

    with pytest.raises(AssertionError, match="memory had run out"):
        judged(part(read), 1, Limits(tmp_path))


def test_an_example_without_an_end_is_ended_whatever_the_reader_catches(tmp_path: Path) -> None:
    def read(_: int) -> None:
        while True:
            try:
                sum(range(1000))
            except Exception as error:
                raise GuardError("no") from error

    with pytest.raises(AssertionError, match=r"takes more than 0\.2 s of the processor"):
        judged(part(read), 1, Limits(tmp_path, cpu_seconds=0.2))


EFFECTS: dict[str, Callable[[Path], object]] = {
    "a file": lambda path: (path / "x").write_text("x"),
    "a folder": lambda path: (path / "x").mkdir(),
    "a link": lambda path: (path / "x").symlink_to("y"),
    "a file moved away": lambda path: (path / "inside" / "y").rename(path / "x"),
    "a process": lambda _: subprocess.run(["true"], check=True),
    "a command": lambda _: os.system("true"),
    "a connection": lambda _: socket.socket().connect(("127.0.0.1", 9)),
}


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("effect", EFFECTS.values(), ids=list(EFFECTS))
@pytest.mark.parametrize("is_swallowed", [False, True], ids=["told", "swallowed"])
def test_an_effect_is_prevented_and_seen(
    tmp_path: Path, effect: Callable[[Path], object], is_swallowed: bool
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "y").touch()

    def read(_: int) -> None:
        try:
            effect(tmp_path)
        except BaseException:
            if not is_swallowed:
                raise

    with pytest.raises(AssertionError, match="it does what no reader does"):
        judged(part(read), 1, Limits(inside))
    assert not (tmp_path / "x").is_symlink()
    assert not (tmp_path / "x").exists()


def test_its_own_folder_may_be_written_to_and_any_file_read(tmp_path: Path) -> None:
    def read(_: int) -> None:
        (tmp_path / "x").write_text("x")
        Path(__file__).read_text()

    assert judged(part(read), 1, Limits(tmp_path)) == ACCEPTED


def test_memory_is_limited_in_a_targets_process() -> None:
    code = "from tools.fuzz.limits import limit_memory; limit_memory(); bytearray(1 << 31)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stderr.endswith("MemoryError\n")


def test_the_command_says_what_it_counted() -> None:
    command = [sys.executable, "-m", "tools.fuzz", "profile", "--seconds", "4"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "profile: " in ended.stdout
    assert "  damaged: " in ended.stdout
    assert " PolicyError" in ended.stdout


def test_a_target_that_there_is_not_is_refused() -> None:
    command = [sys.executable, "-m", "tools.fuzz", "nothing"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "there is no target 'nothing'; there are policies, profile" in ended.stderr
