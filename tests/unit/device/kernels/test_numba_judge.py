"""On a CPU, kernels that numba compiles judge where there are any, and else torch does."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from guard.device.evaluate import StepEvaluator
from guard.device.kernels import choice
from guard.device.kernels.backends import make_judge
from guard.device.kernels.choice import KERNELS_VARIABLE
from guard.device.kernels.numba_judge import compiled
from guard.device.kernels.numba_judge.judge import NumbaJudge
from guard.device.kernels.numba_judge.start import NumbaStart
from guard.device.layout import Capacity
from guard.device.start import TorchStart, make_start
from guard.device.state import SlotState
from guard.device.tap import RoutingTap
from guard.errors import GuardError
from guard.program.program import Program
from tests.support.judged_twice import judged
from tests.unit.device.driving import FLAGGED, OTHER, Engine, policy_text, rule_text

pytest.importorskip("numba")
CPU = torch.device("cpu")
CAPACITY = Capacity(8, 4, 1)
COUNT = "{count: {experts: f, over: 2, atLeast: 1}}"


def _program(condition: str = COUNT) -> Program:
    return Engine(policy_text(rule_text(condition))).program


def test_kernels_judge_and_begin_on_a_cpu() -> None:
    program = _program()
    tap, state = RoutingTap(program.topology, CAPACITY, CPU), SlotState(program, CAPACITY, CPU)
    assert isinstance(make_judge(program, CAPACITY, CPU), NumbaJudge)
    assert isinstance(make_start(tap, None, state), NumbaStart)


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


def test_torch_judges_where_numba_is_missing_which_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = _program()
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    choice._say_that_it_is_missing.cache_clear()
    with caplog.at_level(logging.INFO, logger=choice.__name__):
        for _ in range(2):
            assert isinstance(make_judge(program, CAPACITY, CPU), StepEvaluator)
    assert [record.getMessage() for record in caplog.records] == [
        "numba is not installed, so torch judges each step, which takes longer"
    ]


def _twice(numbers: np.ndarray) -> np.ndarray:
    return numbers * 2


def test_kernels_are_compiled_in_memory_where_no_directory_can_keep_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("numba.core.caching.CompileResultCacheImpl._locator_classes", [])
    compiled._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=compiled.__name__):
        twice = compiled.compiled(_twice, (np.arange(3),))
    assert twice(np.arange(3)).tolist() == [0, 2, 4]
    assert "Let NUMBA_CACHE_DIR name a directory that can be written to" in caplog.text


def test_a_step_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = make_judge(_program(), CAPACITY, CPU)
    assert isinstance(judge, NumbaJudge)
    for kernel in (judge._reduce, judge._decide, *judge._keep.values()):
        assert not kernel._can_compile  # type: ignore[attr-defined]


def test_every_step_of_these_tests_is_judged_by_both() -> None:
    before = judged["both"]
    engine = Engine(policy_text(rule_text(COUNT)))
    engine.step({"a": (0, [FLAGGED, OTHER])})
    engine.step({"a": (2, [OTHER])})
    assert judged["both"] == before + 2


def test_an_engine_may_look_through_all_modules_behind_numba() -> None:
    """As a CPU worker of vLLM does when it starts: the second one of a process comes behind numba."""
    ffi = pytest.importorskip("llvmlite.binding.ffi")
    assert not hasattr(ffi.lib, "__dict__")
    assert ffi.lib.LLVMPY_GetVersionInfo is not None
