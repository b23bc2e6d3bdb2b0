"""Engines that are up at once, each in its own process, and take turns."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.overhead.states import ENGINES, MODELS, Engine, State

_ROOT = Path(__file__).resolve().parents[2]
PAUSE_S = 0.01
"""Between two slices: idle threads of OpenMP look for work for a while, at the next engine's cost."""


@dataclass(frozen=True, slots=True)
class Workload:
    """name: `decode`, of which a slice is so many steps of a steady batch, or `prefill`, of which it is
    the requests' first tokens
    rounds: so many times as many as `Plan.rounds`
    """

    name: str
    concurrency: int
    prompt_tokens: int
    steps: int = 0
    rounds: int = 1

    def __str__(self) -> str:
        return f"{self.name} at {self.concurrency}"


@dataclass(frozen=True, slots=True)
class Slice:
    """value_s: what is compared; base_s: that of the base's slice beside it; last_s: when
    the last of the requests had its token"""

    start: int
    round: int
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


class EngineProcess:
    """One process. In it are the engines that it was started with: they have one thread pool, one
    allocator and one interpreter, so that what differs from process to process is no difference."""

    def __init__(
        self,
        engines: Sequence[Engine],
        model: str,
        scratch: Path,
        max_num_seqs: int,
        *,
        eager: bool,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.name = ", ".join(engine.name for engine in engines)
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, [_ROOT, _ROOT / "integrations" / "vllm"])),
        }
        environment.pop("MOE_GUARD_POLICIES", None)
        plugins = {engine.plugin for engine in engines}
        assert len(plugins) == 1, "a process has the plugin or does not"
        if plugins == {False}:
            environment["VLLM_PLUGINS"] = ""
        read_fd, write_fd = os.pipe()
        job = {
            "engines": [_job(engine, model, scratch, max_num_seqs, eager=eager) for engine in engines],
            "answers_fd": write_fd,
            "share_weights": True,
        }
        self._log = scratch / "engines.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.overhead.engine_process", json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[write_fd],
                text=True,
            )
        os.close(write_fd)
        self._answers: IO[str] = os.fdopen(read_fd)
        for _ in engines:
            say(f"{self._answer()['ready']} is up")

    def run(self, workload: Workload, state: State) -> list[float]:
        assert self._process.stdin is not None
        order = {
            "engine": state.engine,
            "workload": workload.name,
            "concurrency": workload.concurrency,
            "prompt_tokens": workload.prompt_tokens,
            "steps": workload.steps,
            "masks": state.masks,
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        seconds: list[float] = self._answer()["seconds"]
        return seconds

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


def _job(
    engine: Engine, model: str, scratch: Path, max_num_seqs: int, *, eager: bool
) -> dict[str, Any]:
    folder = scratch / engine.name
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(MODELS[model]))
    arguments = {"enforce_eager": eager, **engine.arguments}
    section: dict[str, Any] = {}
    if engine.policies is not None:
        (folder / "policies").mkdir()
        (folder / "policies" / "all.yaml").write_text(policies_for(engine, MODELS[model]))
        section = {"policies": "policies", "reload": False}
        if "mask_actions" in arguments:
            section["mask_actions"] = arguments.pop("mask_actions")
    return {
        "name": engine.name,
        "folder": str(folder),
        "model": "model",
        "max_num_seqs": max_num_seqs,
        "max_model_len": 1024,
        "additional_config": {"moe_guard": section} if section else {},
        "arguments": arguments,
    }


@dataclass(frozen=True, slots=True)
class Plan:
    """How states are compared. starts: so many times the engines are started anew; rounds: slices of
    each state and workload in each start
    one_at_a_time: where a device has no room for two engines; then there is no slice of the base beside
        each one, and what is measured is compared by its round
    """

    model: str = "340m"
    starts: int = 2
    rounds: int = 10
    eager: bool = False
    one_at_a_time: bool = False


def run_group(
    states: Sequence[State], workloads: Sequence[Workload], plan: Plan, say: Callable[[str], None]
) -> list[Slice]:
    """The first state is the base. In each round every other one runs a slice of the same work, in an
    order that is drawn anew, with a slice of the base beside it."""
    order = random.Random(0)
    slices = []
    names = list(dict.fromkeys(state.engine for state in states))
    for start in range(plan.starts):
        drawn = order.sample(names, len(names))
        if plan.one_at_a_time:
            slices += _one_after_the_other(start, states, drawn, workloads, plan, say)
            continue
        with _running(drawn, workloads, plan, say) as engines:
            for workload in workloads:
                say(f"start {start + 1} of {plan.starts}: {workload}")
                slices += _take_turns(start, states, workload, engines, plan, order)
    return slices


def _take_turns(
    start: int,
    states: Sequence[State],
    workload: Workload,
    engines: Mapping[str, EngineProcess],
    plan: Plan,
    order: random.Random,
) -> list[Slice]:
    def run(state: State) -> list[float]:
        time.sleep(PAUSE_S)
        return engines[state.engine].run(workload, state)

    base, *others = [state for state in states if state.engine in engines]
    for state in (base, *others):
        run(state)  # warm
    slices = []
    for number in range(workload.rounds * plan.rounds):
        for nth, state in enumerate(order.sample(others, len(others))):
            # By turns the base comes first and second: a machine that slows down favours neither.
            pair = [base, state] if (number + nth) % 2 else [state, base]
            seconds = {each.name: run(each) for each in pair}
            values = {name: value_of(workload, each) for name, each in seconds.items()}
            slices.append(
                Slice(
                    start,
                    number,
                    state.name,
                    workload,
                    values[state.name],
                    values[base.name],
                    max(seconds[state.name]),
                )
            )
    return slices


def _one_after_the_other(
    start: int,
    states: Sequence[State],
    names: Sequence[str],
    workloads: Sequence[Workload],
    plan: Plan,
    say: Callable[[str], None],
) -> list[Slice]:
    found: dict[tuple[Workload, int, str], list[float]] = {}
    for name in names:
        with _running([name], workloads, plan, say) as engines:
            for workload in workloads if name in engines else ():
                for state in (state for state in states if state.engine == name):
                    engines[name].run(workload, state)  # warm
                    for number in range(workload.rounds * plan.rounds):
                        seconds = engines[name].run(workload, state)
                        found[workload, number, state.name] = seconds
    return [
        Slice(
            start,
            number,
            name,
            workload,
            value_of(workload, seconds),
            value_of(workload, found[workload, number, states[0].name]),
            max(seconds),
        )
        for (workload, number, name), seconds in found.items()
        if name != states[0].name
    ]


@contextmanager
def _running(
    names: Sequence[str], workloads: Sequence[Workload], plan: Plan, say: Callable[[str], None]
) -> Iterator[dict[str, EngineProcess]]:
    by_name = {engine.name: engine for engine in ENGINES}
    most = max(workload.concurrency for workload in workloads)
    # All guarded ones and their base share a process, if one engine more in it can do no harm.
    apart = [[name] for name in names if not by_name[name].plugin or by_name[name].may_fail]
    shared = [name for name in names if [name] not in apart]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as closing:
        running = {}
        for number, together in enumerate([shared, *apart] if shared else apart):
            folder = Path(scratch, str(number))
            folder.mkdir()
            chosen = [by_name[name] for name in together]
            try:
                process = EngineProcess(chosen, plan.model, folder, most, eager=plan.eager, say=say)
            except EngineError as error:
                if not any(engine.may_fail for engine in chosen):
                    raise
                say(f"does not run here: {str(error).strip().splitlines()[-1]}")
                continue
            closing.callback(process.close)
            running.update(dict.fromkeys(together, process))
        yield running
