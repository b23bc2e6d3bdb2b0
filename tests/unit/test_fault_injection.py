"""The seam of drills: which faults it injects where and when; and while it is off, none."""

from __future__ import annotations

import ast
import logging
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard import fault_injection
from guard.failures import Attempt, Failures, Stage
from guard.fault_injection import (
    MESSAGE,
    MOST_DRILL_SECONDS,
    NAMES,
    Drill,
    Fault,
    FaultInjectionError,
    InjectedError,
    conduct,
    parse_faults,
    strikes,
)
from tests.support.drills import drilling

ROOT = Path(__file__).resolve().parents[2]
STAGES = list(Stage)


def run_blocks(failures: Failures, stage: Stage, count: int) -> list[tuple[bool, bool]]:
    """Of each block: whether it was run, and whether it is said to have failed."""
    found = []
    for _ in range(count):
        ran = False
        with failures.caught(stage) as attempt:
            ran = True
        found.append((ran, attempt.failed))
    return found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("when", "struck"), [("3", {3}), ("*", {1, 2, 3, 4, 5, 6, 7}), ("*/3", {3, 6}), ("9", set())]
)
def test_a_block_of_each_stage_fails_before_its_first_line_when_it_is_asked_to(
    stage: Stage, when: str, struck: set[int]
) -> None:
    failures = Failures()
    with drilling(f"{stage}@{when}") as drill:
        found = run_blocks(failures, stage, 7)
    assert found == [(n not in struck, n in struck) for n in range(1, 8)]
    assert failures.count.get(stage, 0) == drill.struck[stage] == len(struck)


def test_other_stages_go_on_and_so_does_the_one_when_the_drill_is_over() -> None:
    failures = Failures()
    with drilling("ledger@*"):
        assert run_blocks(failures, Stage.DELIVER, 1) == [(True, False)]
        assert run_blocks(failures, Stage.LEDGER, 1) == [(False, True)]
    assert run_blocks(failures, Stage.LEDGER, 1) == [(True, False)]


def test_of_nested_blocks_the_one_that_is_struck_fails() -> None:
    failures = Failures()
    reached = []
    with drilling("admit@2"), failures.caught(Stage.ADMIT) as outer:
        reached.append("outer")
        with failures.caught(Stage.ADMIT) as inner:
            reached.append("inner")
        reached.append("behind")
    assert reached == ["outer", "behind"]
    assert (outer.failed, inner.failed) == (False, True)


def test_a_block_may_wait_and_then_does_what_it_always_does(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("guard.fault_injection.time.sleep", waited.append)
    failures = Failures()
    with drilling("evaluate=200ms@*/2"):
        assert run_blocks(failures, Stage.EVALUATE, 4) == [(True, False)] * 4
    assert waited == [0.2, 0.2]
    assert not failures.count


@pytest.mark.parametrize("name", ["decision_log", "event_buffer", "routing", "message"])
def test_what_is_no_block_is_struck_too(name: str) -> None:
    with drilling(f"{name}@2"):
        assert [strikes(name) for _ in range(3)] == [False, True, False]
    assert not strikes(name)


def test_a_place_that_waits_does_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("guard.fault_injection.time.sleep", waited.append)
    with drilling("decision_log=50ms@1"):
        assert [strikes("decision_log") for _ in range(2)] == [False, False]
    assert waited == [0.05]


def test_whoever_traces_the_thread_goes_on_tracing() -> None:
    seen: list[str] = []

    def tracer(frame: FrameType, event: str, _: object) -> Any:
        seen.append(event)
        return tracer

    before = sys.gettrace()
    with drilling("metrics@*"):
        sys.settrace(tracer)
        try:
            run_blocks(Failures(), Stage.METRICS, 1)
            assert sys.gettrace() is tracer
        finally:
            sys.settrace(before)
    assert "line" in seen


def test_entries_are_counted_over_all_threads() -> None:
    failures = Failures()
    with drilling("deliver@*/5") as drill:
        threads = [
            threading.Thread(target=run_blocks, args=(failures, Stage.DELIVER, 50)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert drill.struck[Stage.DELIVER] == failures.count[Stage.DELIVER] == 200 // 5


def _tries(failures: Failures, ran: list[str]) -> str:
    with failures.caught(Stage.RECORD):
        try:
            ran.append("try")
        except ValueError:
            ran.append("except")
        finally:
            ran.append("finally")
    return "behind"


def _returns(failures: Failures, ran: list[str]) -> str:
    with failures.caught(Stage.RECORD):
        return str(ran)
    return "behind"


def _loops(failures: Failures, ran: list[str]) -> str:
    with failures.caught(Stage.RECORD):
        while True:
            ran.append("while")
            break
    return "behind"


def _branches(failures: Failures, ran: list[str]) -> str:
    with failures.caught(Stage.RECORD) as attempt:
        match ran:
            case []:
                ran.append("match")
    return "behind" if attempt.failed else "ran"


def _nests(failures: Failures, ran: list[str]) -> str:
    with threading.Lock(), failures.caught(Stage.RECORD):
        with failures.caught(Stage.DELIVER):
            ran.append("with")
        ran.append("behind it")
    return "behind"


@pytest.mark.parametrize("block", [_tries, _returns, _loops, _branches, _nests])
def test_a_block_fails_whatever_it_begins_with(block: Any) -> None:
    ran: list[str] = []
    failures = Failures()
    with drilling("record@1"):
        assert block(failures, ran) == "behind"
    assert set(ran) <= {"finally"}, "that of a `try:` is run, as it is when its first line raises"
    assert failures.count == {Stage.RECORD: 1}


def blocks() -> list[tuple[str, ast.With]]:
    """Every `with` of the product that catches faults."""
    found = []
    for folder in (ROOT / "guard", ROOT / "integrations" / "vllm" / "guard_vllm"):
        for path in sorted(folder.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.With) and any(".caught(" in ast.unparse(i) for i in node.items):
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def test_every_block_begins_on_a_line_of_its_own_where_it_can_be_made_to_fail() -> None:
    found = blocks()
    assert len(found) > 40, "the sources were not found"
    for place, node in found:
        assert node.body[0].lineno > node.lineno, place
        assert ".caught(" in ast.unparse(node.items[-1]), f"{place}: must come last"


def test_while_no_drill_is_on_nothing_is_different() -> None:
    assert fault_injection.drill is None
    assert type(Failures().caught(Stage.EVALUATE)) is Attempt
    with drilling("evaluate@5"):
        pass
    assert fault_injection.drill is None
    assert type(Failures().caught(Stage.EVALUATE)) is Attempt


def test_a_drill_says_so_at_its_start_and_with_its_faults(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), drilling("evaluate@3,decision_log=500ms@*/2,message@*"):
        run_blocks(Failures(), Stage.EVALUATE, 3)
    first, struck, fault = caplog.messages
    assert "faults are injected on purpose" in first
    assert "evaluate fails at entry 3; decision_log waits 500 ms at every entry of 2" in first
    assert "message fails at every entry" in first
    assert "unset MOE_GUARD_INJECT_FAULTS" in first
    assert "MoE Guard drill: evaluate fails at entry 3" in struck
    assert "MoE Guard fault 1 in stage evaluate: injected by a drill" in fault


def test_a_drill_that_was_forgotten_ends_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    drill = Drill(parse_faults("ledger@*"), clock=lambda: now[0])
    assert drill.strike(Stage.LEDGER) is not None
    now[0] += MOST_DRILL_SECONDS
    assert [drill.strike(Stage.LEDGER) for _ in range(3)] == [None] * 3
    assert sum("drill is over" in message for message in caplog.messages) == 1


def test_a_process_that_is_told_the_same_again_goes_on_counting() -> None:
    try:
        conduct("ledger@2")
        drill = fault_injection.drill
        assert drill is not None
        assert not strikes(Stage.LEDGER)
        conduct("ledger@2")
        assert fault_injection.drill is drill
        assert strikes(Stage.LEDGER)
        conduct("ledger@3")
        assert fault_injection.drill is not drill
        conduct(None)
        assert fault_injection.drill is None
    finally:
        fault_injection.end()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no fault to inject; write STAGE@3"),
        ("evaluate", "is no fault to inject"),
        ("evaluate@", "is no fault to inject"),
        ("evaluate@-1", "is no fault to inject"),
        ("evaluate@3,", "'' is no fault to inject"),
        ("evaluate=20@3", "is no fault to inject"),
        ("evalute@3", "there is no stage 'evalute'; did you mean 'evaluate'"),
        ("decision-log@3", "did you mean 'decision_log'"),
        ("zzz@3", "there are admit, begin_step"),
        ("evaluate@0", "entries are counted from 1"),
        ("evaluate@*/0", "entries are counted from 1"),
        ("evaluate=0ms@1", "a wait takes 1 to 600000 ms"),
        ("evaluate=600001ms@1", "a wait takes 1 to 600000 ms"),
        ("message=5ms@1", "message has nothing that could wait"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_to_write(text: str, message: str) -> None:
    with pytest.raises(FaultInjectionError, match=message.replace("*", r"\*")):
        parse_faults(text)


_WHEN = st.one_of(
    st.just("*"), st.integers(1, 999).map(str), st.integers(1, 999).map(lambda n: f"*/{n}")
)


@given(st.lists(st.tuples(st.sampled_from(NAMES), _WHEN), min_size=1, max_size=5), st.integers(1, 3000))
def test_faults_strike_where_their_text_says(entries: list[tuple[str, str]], entry: int) -> None:
    faults = parse_faults(", ".join(f"{name}@{when}" for name, when in entries))
    assert [fault.name for fault in faults] == [name for name, _ in entries]
    for fault, (_, when) in zip(faults, entries, strict=True):
        step = int(when.rpartition("/")[2]) if when != "*" else 1
        expected = entry % step == 0 if when.startswith("*") else entry == step
        assert fault.strikes_at(entry) is expected


def test_every_stage_can_be_named() -> None:
    assert {*map(str, Stage), MESSAGE} == set(NAMES)
    assert parse_faults(",".join(f"{name}@1" for name in NAMES)) == tuple(
        Fault(name, 1, 0) for name in NAMES
    )


def test_the_trace_of_a_fault_points_at_the_block() -> None:
    noted: list[BaseException] = []

    class Noting(Failures):
        def note(self, stage: Stage, error: BaseException) -> None:
            noted.append(error)

    with drilling("admit@1"):
        run_blocks(Noting(), Stage.ADMIT, 1)
    [error] = noted
    assert isinstance(error, InjectedError)
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    assert frames[0] == "run_blocks"
