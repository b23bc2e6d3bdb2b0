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
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.overhead.states import ENGINES, MODELS, Engine, State

PAUSE_S = 0.25
"""Between two slices: idle threads of OpenMP look for work for so long, at the next engine's cost."""


@dataclass(frozen=True, slots=True)
class Workload:
    """name: `decode`, of which a slice is so many steps of a steady batch, or `prefill`, of which it is
    the requests' first tokens"""

    name: str
    concurrency: int
    prompt_tokens: int
    steps: int = 0

    def __str__(self) -> str:
        return f"{self.name} at {self.concurrency}"


@dataclass(frozen=True, slots=True)
class Slice:
    """seconds: of each step, or to each request's first token"""

    start: int
    round: int
    state: str
    workload: Workload
    seconds: tuple[float, ...]

    @property
    def value(self) -> float:
        """What a pair compares: the median step, or the mean time to the first token."""
        if self.workload.name == "decode":
            return statistics.median(self.seconds)
        return statistics.fmean(self.seconds)


class EngineProcess:
    def __init__(
        self, engine: Engine, model: str, folder: Path, max_num_seqs: int, *, eager: bool
    ) -> None:
        self.name = engine.name
        folder.mkdir()
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(MODELS[model]))
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            **os.environ,
        }
        environment.pop("MOE_GUARD_POLICIES", None)
        arguments = {"enforce_eager": eager, **engine.arguments}
        section: dict[str, Any] = {}
        if not engine.plugin:
            environment["VLLM_PLUGINS"] = ""
        elif engine.policies is not None:
            (folder / "policies").mkdir()
            facts = MODELS[model]
            policies = engine.policies.replace("ALL_LAYERS", f"0-{facts['num_hidden_layers'] - 1}")
            policies = policies.replace("ALL_EXPERTS", f"0-{facts['num_experts'] - 1}")
            (folder / "policies" / "all.yaml").write_text(policies)
            section = {"policies": str(folder / "policies"), "reload": False}
            if "mask_actions" in arguments:
                section["mask_actions"] = arguments.pop("mask_actions")
        read_fd, write_fd = os.pipe()
        job = {
            "model": str(folder / "model"),
            "max_num_seqs": max_num_seqs,
            "max_model_len": 1024,
            "additional_config": {"moe_guard": section} if section else {},
            "arguments": arguments,
            "answers_fd": write_fd,
        }
        self._log = folder / "engine.log"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.overhead.engine_process", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=self._log.open("wb"),
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[write_fd],
            text=True,
        )
        os.close(write_fd)
        self._answers: IO[str] = os.fdopen(read_fd)
        self._answer()

    def run(self, workload: Workload, state: State) -> list[float]:
        assert self._process.stdin is not None
        order = {
            "workload": workload.name,
            "concurrency": workload.concurrency,
            "prompt_tokens": workload.prompt_tokens,
            "steps": workload.steps,
            "enforced": state.enforced,
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

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"{self.name}: {self._log.read_text(errors='replace')[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def run_group(
    states: Sequence[State],
    workloads: Iterable[Workload],
    *,
    model: str,
    starts: int,
    rounds: int,
    eager: bool,
    say: Callable[[str], None],
) -> list[Slice]:
    """Start the engines of these states `starts` times; each time, every state runs each workload once
    in each of `rounds` rounds, in an order that is drawn anew."""
    by_name = {engine.name: engine for engine in ENGINES}
    workloads = list(workloads)
    most = max(workload.concurrency for workload in workloads)
    order = random.Random(0)
    slices = []
    for start in range(starts):
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as closing:
            running = {}
            names = list(dict.fromkeys(state.engine for state in states))
            for name in order.sample(names, len(names)):
                say(f"start {start + 1} of {starts}: {name}")
                process = EngineProcess(by_name[name], model, Path(scratch, name), most, eager=eager)
                closing.callback(process.close)
                running[name] = process
            for workload in workloads:
                say(f"start {start + 1} of {starts}: {workload}")
                for state in states:
                    running[state.engine].run(workload, state)  # warm
                for number in range(rounds):
                    for state in order.sample(list(states), len(states)):
                        time.sleep(PAUSE_S)
                        seconds = running[state.engine].run(workload, state)
                        slices.append(Slice(start, number, state.name, workload, tuple(seconds)))
    return slices
