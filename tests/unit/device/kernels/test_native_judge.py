"""On a CPU, C++ judges where it can be compiled, and else torch does."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from guard.device.evaluate import StepEvaluator
from guard.device.kernels.backends import make_judge
from guard.device.kernels.choice import KERNELS_VARIABLE
from guard.device.kernels.native import build
from guard.device.kernels.native.judge import NativeJudge
from guard.device.kernels.native.start import NativeStart
from guard.device.layout import Capacity
from guard.device.start import TorchStart, make_start
from guard.device.state import SlotState
from guard.device.tap import RoutingTap
from guard.errors import GuardError
from guard.program.program import Program
from tests.support.judged_twice import judged
from tests.unit.device.driving import (
    FLAGGED,
    MASK,
    OTHER,
    Engine,
    policy_text,
    rule_text,
    tokens,
)

CPU = torch.device("cpu")
CAPACITY = Capacity(8, 4, 1)
COUNT = "{count: {experts: f, over: 2, atLeast: 1}}"


def forget_library() -> None:
    for cached in (build.library, build._path):
        cached.cache_clear()


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """As in a process that has not asked for it yet."""
    forget_library()
    yield
    forget_library()


def _program(condition: str = COUNT) -> Program:
    return Engine(policy_text(rule_text(condition))).program


def test_kernels_judge_and_begin_on_a_cpu() -> None:
    program = _program()
    tap, state = RoutingTap(program.topology, CAPACITY, CPU), SlotState(program, CAPACITY, CPU)
    assert isinstance(make_judge(program, CAPACITY, CPU), NativeJudge)
    assert isinstance(make_start(tap, None, state), NativeStart)


def test_torch_judges_for_those_who_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    program = _program()
    tap, state = RoutingTap(program.topology, CAPACITY, CPU), SlotState(program, CAPACITY, CPU)
    assert isinstance(make_judge(program, CAPACITY, CPU, "torch"), StepEvaluator)
    monkeypatch.setenv(KERNELS_VARIABLE, "torch")
    assert isinstance(make_judge(program, CAPACITY, CPU), StepEvaluator)
    assert isinstance(make_start(tap, None, state), TorchStart)


def test_a_choice_of_kernels_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, "triton")
    with pytest.raises(GuardError, match="MOE_GUARD_KERNELS=triton is not known; set it to auto or"):
        make_judge(_program(), CAPACITY, CPU)


def test_torch_judges_where_something_is_speculated() -> None:
    capacity = Capacity(8, 4, 1, max_draft_tokens=2)
    assert isinstance(make_judge(_program(), capacity, CPU), StepEvaluator)


def test_torch_judges_where_there_is_no_compiler_which_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fresh_library: None
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.INFO, logger=build.__name__):
        for _ in range(2):
            assert isinstance(make_judge(_program(), CAPACITY, CPU), StepEvaluator)
    assert len(caplog.records) == 1
    assert "there is no C++ compiler" in caplog.text


def test_torch_judges_where_the_compiler_fails_which_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fresh_library: None,
    tmp_path: Path,
) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo no headers >&2; exit 1; }\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    assert isinstance(make_judge(_program(), CAPACITY, CPU), StepEvaluator)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no headers" in caplog.text
    assert not list((tmp_path / "cache").iterdir()), "nothing unfinished is left"


@pytest.mark.parametrize("has_home", [True, False])
def test_a_folder_that_keeps_nothing_is_said_and_done_without(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    has_home: bool,
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nexit 0\n")
    compiler.chmod(0o755)
    if has_home:
        (tmp_path / "file").touch()
        monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    else:
        for name in (build.CACHE_VARIABLE, "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with caplog.at_level(logging.INFO, logger=build.__name__):
        made = build._compiled(str(compiler))
    assert made.exists()
    assert f"Let {build.CACHE_VARIABLE} name a folder that can be written to" in caplog.text
    shutil.rmtree(made.parent)


def test_what_was_compiled_is_used_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho ran >> {tmp_path}/runs\n")
    compiler.chmod(0o755)
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    first = build._compiled(str(compiler))
    runs = (tmp_path / "runs").read_text().count("ran")
    assert build._compiled(str(compiler)) == first
    assert (tmp_path / "runs").read_text().count("ran") == runs + 1, "its version was asked for"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]


def test_every_step_of_these_tests_is_judged_by_both() -> None:
    before = judged["both"]
    engine = Engine(policy_text(rule_text(COUNT)))
    engine.step({"a": (0, [FLAGGED, OTHER])})
    engine.step({"a": (2, [OTHER])})
    assert judged["both"] == before + 2


def test_a_step_that_is_checked_is_taken_in_parts_and_the_next_one_as_a_whole() -> None:
    engine = Engine(policy_text(rule_text(COUNT)))
    engine.guard.add_request("a", prompt_tokens=2)
    before = judged["whole"]
    engine.step({"a": (0, [FLAGGED, OTHER])})
    assert judged["whole"] == before
    report = engine.step({"a": (2, [FLAGGED])})
    assert judged["whole"] == before + 1
    assert tokens(report) == (0, 1)


@pytest.mark.parametrize(
    ("when", "then", "is_idle"),
    [("{always: {}}", "", True), ("{always: {}}", MASK, False), (COUNT, MASK, True)],
    ids=["no mask", "a mask in force", "a mask that is off"],
)
def test_a_guard_is_idle_behind_a_step_that_leaves_no_masked_rows(
    when: str, then: str, is_idle: bool
) -> None:
    engine = Engine(policy_text(rule_text(when, then)))
    engine.guard.add_request("a", 1)
    for position in range(3):  # the first is out of the ordinary
        engine.step({"a": (position, [OTHER])})
    assert engine.guard.is_idle is is_idle
    engine.guard.idle()
    assert engine.guard.is_idle
    engine.guard.begin_step(["a"], torch.tensor([0, 1]), torch.tensor([3]))
    assert not engine.guard.is_idle
