"""The overhead benchmark up to the point where it needs an engine: what it starts, pairs and shows."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from guard_vllm.settings import Settings

from benchmarks.overhead import __main__ as overhead
from benchmarks.overhead import runs
from benchmarks.overhead.runs import Plan, Workload, run_group
from benchmarks.overhead.states import ENGINES, GROUPS, MODELS, STATES, State, states_of
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


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_each_round_runs_every_state_once_on_an_engine_of_its_own(
    monkeypatch: pytest.MonkeyPatch, one_at_a_time: bool
) -> None:
    up: list[str] = []
    most_up = [0]

    class Process:
        def __init__(self, engines: Any, *_: Any, **__: Any) -> None:
            self.names = [engine.name for engine in engines]
            up.extend(self.names)
            most_up[0] = max(most_up[0], len(up))

        def run(self, workload: Workload, state: State) -> list[float]:
            assert state.engine in self.names
            return [2.0 if state.engine == "mask-1" else 1.0] * 3

        def close(self) -> None:
            for name in self.names:
                up.remove(name)

    monkeypatch.setattr(runs, "EngineProcess", Process)
    monkeypatch.setattr(runs, "PAUSE_S", 0.0)
    states = states_of("guard")
    plan = Plan(starts=2, rounds=3, one_at_a_time=one_at_a_time)
    slices = run_group(states, [DECODE], plan, say=lambda _: None)
    assert most_up[0] == (1 if one_at_a_time else len(GROUPS["guard"]))
    assert not up
    for start in range(2):
        for number in range(3):
            own = [s.state for s in slices if (s.start, s.round) == (start, number)]
            assert sorted(own) == sorted(state.name for state in states[1:])
    rows = {row["state"]: row for row in overhead.summary("guard", states[0].name, slices)}
    assert rows["masking half of the requests"]["ratio"]["median"] == 2.0
    assert rows["masking half of the requests"]["ratio_of_each_start"] == [2.0, 2.0]
    assert rows["plugin, off, again (A/A)"]["ratio"]["median"] == 1.0
    assert rows["plugin, off, again (A/A)"]["tokens_per_second"] == DECODE.concurrency


def test_a_slice_is_compared_with_one_of_the_base_beside_it_which_is_first_by_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = itertools.count(1)

    class Process:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def run(self, *_: Any) -> list[float]:
            return [float(next(clock))]

        def close(self) -> None: ...

    monkeypatch.setattr(runs, "EngineProcess", Process)
    monkeypatch.setattr(runs, "PAUSE_S", 0.0)
    states = states_of("guard")[:2]
    slices = run_group(states, [DECODE], Plan(starts=1, rounds=4), say=lambda _: None)
    assert [s.value_s - s.base_s for s in slices] == [-1, 1, -1, 1]


def test_a_state_that_does_not_run_here_is_said_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        def __init__(self, engines: Any, *_: Any, **__: Any) -> None:
            if engines[0].name == "capture":
                raise runs.EngineError("capture: a long story\nnot on this device")

        def run(self, *_: Any) -> list[float]:
            return [1.0]

        def close(self) -> None: ...

    monkeypatch.setattr(runs, "EngineProcess", Process)
    monkeypatch.setattr(runs, "PAUSE_S", 0.0)
    states = states_of("plugin")
    said: list[str] = []
    for one_at_a_time in (False, True):
        plan = Plan(starts=1, rounds=2, one_at_a_time=one_at_a_time)
        slices = run_group(states, [DECODE], plan, said.append)
        assert {each.state for each in slices} == {"no plugin again (A/A)", "plugin, off"}
    assert said.count("does not run here: not on this device") == 2


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
    engine = BY_NAME["mask-256"]
    with pytest.raises(runs.EngineError, match="mask-256: no GPU here: -m benchmarks") as error:
        runs.EngineProcess([engine], "qwen3-30b-a3b", tmp_path, 256, eager=False)
    job = json.loads(str(error.value).split("engine_process ", 1)[1])["engines"][0]
    section = job["additional_config"]["moe_guard"]
    settings = Settings.of(job["additional_config"])
    assert settings is not None
    assert settings.mask_actions == 256
    assert Path(job["folder"], section["policies"], "all.yaml").exists()
    assert job["arguments"] == {"enforce_eager": False}
