"""A process of engines, one for each state, that take turns."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.overhead.states import ENGINES, MODELS, Engine, State

_ROOT = Path(__file__).resolve().parents[2]
_BY_NAME = {engine.name: engine for engine in ENGINES}


@dataclass(frozen=True, slots=True)
class Workload:
    """name: `decode`, of which a slice is so many steps of a steady batch, or `prefill`, of which it is
    the requests' first tokens
    slices: so many times as many as `Plan.slices`
    """

    name: str
    concurrency: int
    prompt_tokens: int
    steps: int = 0
    slices: int = 1

    def __str__(self) -> str:
        return f"{self.name} at {self.concurrency}"


@dataclass(frozen=True, slots=True)
class Slice:
    """value_s: what is compared; base_s: that of the base in the same slice; last_s: when
    the last of the requests had its token"""

    start: int
    number: int
    state: str
    workload: Workload
    value_s: float
    base_s: float
    last_s: float


def value_of(workload: Workload, seconds: Sequence[float]) -> float:
    """The median step, or the mean time to the first token."""
    return statistics.median(seconds) if workload.name == "decode" else statistics.fmean(seconds)


def policies_for(engine: Engine, config: Mapping[str, Any]) -> str:
    """The engine's policies, for the layers and experts of a model."""
    assert engine.policies is not None, "the guard is off"
    policies = engine.policies.replace("ALL_LAYERS", f"0-{config['num_hidden_layers'] - 1}")
    return policies.replace("ALL_EXPERTS", f"0-{config['num_experts'] - 1}")


class EngineError(RuntimeError):
    """An engine ended, with the last of what it said."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How states are compared. starts: so many times the engines are started anew; slices: of
    each workload in each start
    one_at_a_time: where a device has no room for two engines; then states do not take turns step by
        step, and what is measured is compared by the slice's number
    """

    model: str = "340m"
    dtype: str = "bfloat16"
    starts: int = 2
    slices: int = 10
    eager: bool = False
    one_at_a_time: bool = False


def environment() -> dict[str, str]:
    """Of a process of engines. It loads the plugin itself, behind the engines without."""
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [_ROOT, _ROOT / "integrations" / "vllm"])),
        "VLLM_PLUGINS": "",
    }
    variables.pop("MOE_GUARD_POLICIES", None)
    return variables


class EngineProcess:
    """One process. In it are the engines of its states: they have one thread pool, one
    allocator and one interpreter, so that what differs from process to process is no difference."""

    def __init__(
        self,
        states: Sequence[State],
        plan: Plan,
        scratch: Path,
        max_num_seqs: int,
        *,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.name = ", ".join(state.name for state in states)
        variables = environment()
        read_fd, write_fd = os.pipe()
        in_order = sorted(states, key=lambda state: _BY_NAME[state.engine].plugin)
        jobs = [
            job_of(state, plan, scratch / str(nth), max_num_seqs) for nth, state in enumerate(in_order)
        ]
        job = {"engines": jobs, "answers_fd": write_fd}
        self._log = scratch / "engines.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.overhead.engine_process", json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                pass_fds=[write_fd],
                text=True,
            )
        os.close(write_fd)
        self._answers: IO[str] = os.fdopen(read_fd)
        for _ in jobs:
            say(f"{self._answer()['ready']} is up")

    def run(
        self, workload: Workload, states: Sequence[State], slices: int, seed: int
    ) -> Iterator[dict[str, list[float]]]:
        """For each slice, the seconds of each state."""
        assert self._process.stdin is not None
        order = {
            "workload": workload.name,
            "concurrency": workload.concurrency,
            "prompt_tokens": workload.prompt_tokens,
            "steps": workload.steps,
            "slices": slices,
            "seed": seed,
            "masks": {state.name: state.masks for state in states},
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        for _ in range(slices):
            yield self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            self.close()
            raise EngineError(f"{self.name}: {self._log.read_text(errors='replace')[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def job_of(state: State, plan: Plan, folder: Path, max_num_seqs: int) -> dict[str, Any]:
    """What `Batches` needs for an engine of this state. folder: an empty one, for its files"""
    engine, config = _BY_NAME[state.engine], MODELS[plan.model]
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    arguments = {"enforce_eager": plan.eager, **engine.arguments}
    section: dict[str, Any] = {}
    if engine.policies is not None:
        (folder / "policies").mkdir()
        (folder / "policies" / "all.yaml").write_text(policies_for(engine, config))
        section = {"policies": "policies", "reload": False}
        if "mask_actions" in arguments:
            section["mask_actions"] = arguments.pop("mask_actions")
    return {
        "name": state.name,
        "plugin": engine.plugin,
        "folder": str(folder),
        "model": "model",
        "dtype": plan.dtype,
        "max_num_seqs": max_num_seqs,
        "max_model_len": 1024,
        "additional_config": {"moe_guard": section} if section else {},
        "arguments": arguments,
    }


def run_group(
    states: Sequence[State], workloads: Sequence[Workload], plan: Plan, say: Callable[[str], None]
) -> list[Slice]:
    """The first state is the base."""
    order = random.Random(0)
    found = []
    for start in range(plan.starts):
        drawn = order.sample(states, len(states))
        # Where engines have a process each, so that none is in another one's way.
        for together in [[state] for state in drawn] if plan.one_at_a_time else [drawn]:
            with _running(together, workloads, plan, say) as (process, running):
                for workload in workloads:
                    if process is None:  # none of them runs here
                        break
                    say(f"start {start + 1} of {plan.starts}: {workload}")
                    slices = workload.slices * plan.slices
                    for number, seconds in enumerate(process.run(workload, running, slices, start)):
                        found += [(start, number, workload, *each) for each in seconds.items()]
    return _compared(found, states[0].name)


def _compared(found: Sequence[tuple[int, int, Workload, str, list[float]]], base: str) -> list[Slice]:
    base_s = {
        (start, number, workload): value_of(workload, seconds)
        for start, number, workload, state, seconds in found
        if state == base
    }
    return [
        Slice(
            start,
            number,
            state,
            workload,
            value_of(workload, seconds),
            base_s[start, number, workload],
            max(seconds),
        )
        for start, number, workload, state, seconds in found
        if state != base
    ]


@contextmanager
def _running(
    states: Sequence[State], workloads: Sequence[Workload], plan: Plan, say: Callable[[str], None]
) -> Iterator[tuple[EngineProcess | None, Sequence[State]]]:
    """The process, and the states that run in it: all, or those that every machine can run."""
    most = max(workload.concurrency for workload in workloads)
    while states:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                process = EngineProcess(states, plan, Path(scratch), most, say=say)
            except EngineError as error:
                surely = [state for state in states if not _BY_NAME[state.engine].may_fail]
                if len(surely) == len(states):
                    raise
                left_out = ", ".join(state.name for state in states if state not in surely)
                say(f"{left_out} does not run here: {str(error).strip().splitlines()[-1]}")
                states = surely
                continue
            try:
                yield process, states
            finally:
                process.close()
            return
    yield None, ()
