"""The overhead benchmark up to the point where it needs an engine: what it starts, pairs and shows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guard_vllm.settings import Settings

from benchmarks.overhead import __main__ as overhead
from benchmarks.overhead import runs
from benchmarks.overhead.engine_process import WARM_UP_STEPS, TurnClock, share_weights, slices
from benchmarks.overhead.runs import Plan, Workload, run_group
from benchmarks.overhead.states import ENGINES, GROUPS, MODELS, STATES, states_of
from guard.policy import parse_policies
from guard.program.compile import compile_policies
from guard.program.configuration import topology_from_config

DECODE = Workload("decode", 4, 16, 8)
BY_NAME = {engine.name: engine for engine in ENGINES}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", [e for e in ENGINES if e.policies], ids=lambda e: e.name)
def test_every_engines_policies_fit_every_model(model: str, engine: Any) -> None:
    topology = topology_from_config(MODELS[model])
    text = runs.policies_for(engine, MODELS[model])
    program = compile_policies(parse_policies(text), topology)
    assert program.rules


def test_256_masks_are_256_different_ones_that_requests_ask_for() -> None:
    topology = topology_from_config(MODELS["340m"])
    text = runs.policies_for(BY_NAME["mask-256"], MODELS["340m"])
    program = compile_policies(parse_policies(text), topology)
    assert len(set(program.masks.keys)) == 256
    state = next(state for state in STATES if "256 different masks" in state.name)
    assert set(state.masks) == set(program.policies)


def test_every_state_is_in_a_group_with_its_controls() -> None:
    grouped = {name for group in GROUPS.values() for name in group}
    assert {state.engine for state in STATES} == grouped == set(BY_NAME)
    assert all(group[1] == f"{group[0]}-again" for group in GROUPS.values())


class FakeProcess:
    """Stands in for a process of engines. up: what runs; most_up: at once"""

    up: list[str]
    most_up: int

    def __init__(self, states: Any, *_: Any, **__: Any) -> None:
        self.names = [state.name for state in states]
        type(self).up += self.names
        type(self).most_up = max(self.most_up, len(self.up))

    def run(self, workload: Workload, states: Any, slices: int, seed: int) -> Any:
        assert {state.name for state in states} <= set(self.names)
        for number in range(slices):
            yield {
                state.name: [(1.0 + number) * (2 if "masking half" in state.name else 1)]
                * workload.steps
                for state in states
            }

    def close(self) -> None:
        for name in self.names:
            self.up.remove(name)


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> type[FakeProcess]:
    monkeypatch.setattr(runs, "EngineProcess", FakeProcess)
    monkeypatch.setattr(FakeProcess, "up", [], raising=False)
    monkeypatch.setattr(FakeProcess, "most_up", 0, raising=False)
    return FakeProcess


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_each_slice_has_every_state_on_an_engine_of_its_own(
    process: type[FakeProcess], one_at_a_time: bool
) -> None:
    states = states_of("guard")
    plan = Plan(starts=2, slices=3, one_at_a_time=one_at_a_time)
    found = run_group(states, [DECODE], plan, say=lambda _: None)
    assert process.most_up == (1 if one_at_a_time else len(states))
    assert not process.up
    for start in range(2):
        for number in range(3):
            own = [s.state for s in found if (s.start, s.number) == (start, number)]
            assert sorted(own) == sorted(state.name for state in states[1:])
    rows = {row["state"]: row for row in overhead.summary("guard", states[0].name, found)}
    assert rows["masking half of the requests"]["ratio"]["median"] == 2.0
    assert rows["masking half of the requests"]["ratio_of_each_start"] == [2.0, 2.0]
    assert rows["plugin, off, again (A/A)"]["ratio"]["median"] == 1.0
    assert rows["plugin, off, again (A/A)"]["ratio"]["pairs"] == 6
    assert rows["plugin, off, again (A/A)"]["tokens_per_second"] == DECODE.concurrency / 2


def test_some_states_of_a_group_are_compared_with_its_base_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[list[str]] = []

    def run(states: Any, *_: Any, **__: Any) -> list[Any]:
        compared.append([state.name for state in states])
        return [runs.Slice(0, 0, states[1].name, DECODE, 1.0, 1.0, 1.0)]

    monkeypatch.setattr(overhead, "run_group", run)
    arguments = ["--groups", "masks", "--states", "again,256 different"]
    monkeypatch.setattr(sys, "argv", ["overhead", *arguments])
    overhead.main()
    [names] = compared
    assert names[:2] == ["plugin, off", "plugin, off, again (A/A)"]
    assert names[2:] == ["masking all requests, 256 different masks"]


class FakeBatches:
    """Writes down what it is asked for."""

    def __init__(self, name: str, calls: list[tuple[str, str]]) -> None:
        self._name, self._calls = name, calls

    def _note(self, what: str, value: Any = None) -> Any:
        self._calls.append((what, self._name))
        return value

    def begin_decoding(self, order: Any, masks: Any) -> None:
        self._note("begin")

    def decode(self) -> float:
        return float(self._note("step", len(self._calls)))

    def end_decoding(self) -> None:
        self._note("end")

    def prefill(self, order: Any, masks: Any) -> list[float]:
        return [float(self._note("prefill", len(self._calls)))]


def test_states_take_turns_step_by_step_in_orders_of_their_own() -> None:
    calls: list[tuple[str, str]] = []
    order = {"workload": "decode", "masks": dict.fromkeys("abc"), "slices": 4, "steps": 10, "seed": 0}
    found = list(slices({name: FakeBatches(name, calls) for name in "abc"}, order))
    assert [{name: len(each) for name, each in seconds.items()} for seconds in found] == [
        dict.fromkeys("abc", 10)
    ] * 4
    assert calls[:3] == [("begin", name) for name in "abc"]
    assert calls[-3:] == [("end", name) for name in "abc"]
    stepped = "".join(name for what, name in calls if what == "step")
    turns = [stepped[at : at + 3] for at in range(0, len(stepped), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) == 6
    measured = sorted(second for seconds in found for each in seconds.values() for second in each)
    first = 3 + 3 * WARM_UP_STEPS
    assert measured == list(range(first, first + 120))


def test_an_engines_clock_stands_still_while_others_have_their_turn() -> None:
    real = [100.0]
    clock, read = TurnClock(lambda: real[0]), {}
    for seconds, whose in ((1.0, "a"), (2.0, "b"), (4.0, "a"), (8.0, "b"), (16.0, "a")):
        clock.turn_to(whose)
        real[0] += seconds
        read[whose] = clock()
    assert read == {"a": 1.0 + 4.0 + 16.0, "b": 2.0 + 8.0}


def test_dense_weights_that_are_packed_are_shared_too_and_released_once() -> None:
    released: list[int] = []

    def made(address: int) -> tuple[torch.nn.Module, Any]:
        handler = SimpleNamespace(handler_tensor=torch.tensor(address), dtor=released.append)
        layer = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        layer.cpu_linear = lambda x: handler  # type: ignore[assignment]
        return torch.nn.Sequential(layer, torch.nn.ReLU()), handler

    (first, theirs), (second, own) = made(7), made(8)
    share_weights(second, first)
    assert released == [8]
    assert int(own.handler_tensor) == int(theirs.handler_tensor) == 7
    for handler in (theirs, own):
        handler.dtor(int(handler.handler_tensor))
    assert released == [8, 7]
    weights = [model.get_parameter("0.weight") for model in (first, second)]
    assert weights[0].data_ptr() == weights[1].data_ptr()


def test_a_slice_of_prefill_is_a_batch_of_each_state_behind_one_that_warms_up() -> None:
    calls: list[tuple[str, str]] = []
    order = {"workload": "prefill", "masks": dict.fromkeys("ab"), "slices": 3, "steps": 0, "seed": 0}
    found = list(slices({name: FakeBatches(name, calls) for name in "ab"}, order))
    assert [sorted(seconds) for seconds in found] == [["a", "b"]] * 3
    assert len(calls) == 8
    assert min(second for seconds in found for (second,) in seconds.values()) == 2.0


def test_a_state_that_does_not_run_here_is_said_and_left_out(
    monkeypatch: pytest.MonkeyPatch, process: type[FakeProcess]
) -> None:
    class Process(process):  # type: ignore[misc,valid-type]
        def __init__(self, states: Any, *_: Any, **__: Any) -> None:
            if any(state.engine == "capture" for state in states):
                raise runs.EngineError("capture: a long story\nnot on this device")
            super().__init__(states)

    monkeypatch.setattr(runs, "EngineProcess", Process)
    states = states_of("plugin")
    said: list[str] = []
    for one_at_a_time in (False, True):
        plan = Plan(starts=1, slices=2, one_at_a_time=one_at_a_time)
        found = run_group(states, [DECODE], plan, said.append)
        assert {each.state for each in found} == {"no plugin again (A/A)", "plugin, off"}
    text = "vLLM's own routed-experts capture does not run here: not on this device"
    assert said.count(text) == 2


def test_engines_without_the_plugin_come_before_those_that_have_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = tmp_path / "python"
    said.write_text('#!/bin/sh\necho "$*"\n')
    said.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(said))
    with pytest.raises(runs.EngineError) as error:
        runs.EngineProcess(states_of("plugin")[::-1], Plan(), tmp_path, 4)
    jobs = json.loads(str(error.value).split("engine_process ", 1)[1])["engines"]
    assert [job["plugin"] for job in jobs] == [False, False, False, True]


def test_a_slice_of_decoding_is_its_median_step_and_one_of_prefill_its_mean_first_token() -> None:
    seconds = (1.0, 1.0, 7.0)
    assert runs.value_of(DECODE, seconds) == 1.0
    assert runs.value_of(Workload("prefill", 4, 16), seconds) == 3.0


def test_an_engine_that_ends_is_reported_with_what_it_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = tmp_path / "python"
    said.write_text('#!/bin/sh\necho "no GPU here: $*"\n')
    said.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(said))
    state = next(state for state in STATES if "256 different masks" in state.name)
    with pytest.raises(runs.EngineError, match="256 different masks: no GPU here: -m ben") as error:
        runs.EngineProcess([state], Plan("qwen3-30b-a3b"), tmp_path, 256)
    job = json.loads(str(error.value).split("engine_process ", 1)[1])["engines"][0]
    section = job["additional_config"]["moe_guard"]
    settings = Settings.of(job["additional_config"])
    assert settings is not None
    assert settings.mask_actions == 256
    assert Path(job["folder"], section["policies"], "all.yaml").exists()
    assert job["arguments"] == {"enforce_eager": False}
