"""What reading and compiling many policies costs, for a model of 61 layers of 384 experts, 8 chosen.

    .venv/bin/python -m benchmarks.compile_policies [--policies 100] [--rounds 5]

Each policy has three sets, of which one names 40 experts in every layer, and three rules over them,
one of which masks. Time and memory are measured in runs of their own: tracing allocations takes time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from guard.policy.load import load_policies
from guard.program.compile import compile_policies
from guard.program.program import Program
from guard.program.topology import MoELayer, Topology

LAYERS, EXPERTS, TOP_K = 61, 384, 8
TOPOLOGY = Topology("DeepseekV3ForCausalLM", tuple(MoELayer(n, EXPERTS, TOP_K) for n in range(LAYERS)))

POLICY = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {{name: p-{number:03}, severity: high}}
spec:
  mode: enforce
  experts:
    broad: [{{layers: 0-60, experts: [{broad}]}}]
    weighted: [{{layers: 20-30, weights: {{{weights}}}}}]
    masked: [{{layer: {layer}, experts: [{number}]}}]
  rules:
    - {{name: first, when: {first}, then: {{mask: {{experts: masked, until: clear}}}}}}
    - {{name: second, when: {second}}}
    - {{name: third, when: {third}, then: {{block: {{message: Stopped.}}}}}}
"""
FIRST = (
    "{rate: {experts: broad, over: 64, minTokens: 16, above: 0.2}}",
    "{mass: {experts: broad, over: 64, minTokens: 16, above: 0.3}}",
)
SECOND = (
    "{coactivation: {experts: broad, layers: 12, over: request, atLeast: 4}}",
    "{all: [{entropy: {over: 32, below: 9}}, {concentration: {over: request, above: 8}}]}",
)
THIRD = "{score: {experts: weighted, over: request, minTokens: 32, above: 0.5}}"


def policy_text(number: int) -> str:
    random = np.random.default_rng(number)
    broad = sorted(random.choice(300, 40, replace=False).tolist())
    weighted = {int(e): round(float(w), 3) for e, w in enumerate(random.uniform(-1, 1, 20))}
    return POLICY.format(
        number=number,
        layer=number % LAYERS,
        broad=", ".join(map(str, broad)),
        weights=", ".join(f"{e}: {w}" for e, w in weighted.items()),
        first=FIRST[number % 2],
        second=SECOND[number // 2 % 2],
        third=THIRD,
    )


def seconds(rounds: int, work: Callable[[], object], clock: Callable[[], float]) -> list[float]:
    taken = []
    for _ in range(rounds):
        started = clock()
        work()
        taken.append(clock() - started)
    return taken


def peak_megabytes(work: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    console = Console()
    table = Table("", "first s", "median s", "median CPU s", "peak MB")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.policies):
            (Path(folder) / f"p-{number:03}.yaml").write_text(policy_text(number))

        def load() -> object:
            return load_policies(folder)

        policies = load_policies(folder)

        def compile_() -> Program:
            return compile_policies(policies, TOPOLOGY)

        for name, work in (("load_policies", load), ("compile_policies", compile_)):
            taken = seconds(options.rounds, work, time.perf_counter)
            of_cpu = seconds(options.rounds, work, time.process_time)
            numbers = (taken[0], np.median(taken), np.median(of_cpu))
            cells = [f"{float(number):.2f}" for number in numbers]
            table.add_row(name, *cells, f"{peak_megabytes(work):.1f}")
        program = compile_()
    console.print(
        f"{options.policies} policies, {len(program.rules)} rules, {program.masks.num_actions} masks, "
        f"{program.conditions.num_conditions} conditions, {program.signals.num_signals} signals; "
        f"{LAYERS} layers of {EXPERTS} experts, top {TOP_K}"
    )
    numpy_, pydantic, guard = (
        importlib.metadata.version(name) for name in ("numpy", "pydantic", "moe-guard")
    )
    console.print(
        f"Python {platform.python_version()}, numpy {numpy_}, pydantic {pydantic}, moe-guard {guard}, "
        f"{platform.machine()}"
    )
    console.print(table)
    kept = program.distribution_bytes
    console.print(
        f"distributions keep {kept.slot:,} bytes a request, {kept.cached_token:,} a cached token"
    )


if __name__ == "__main__":
    main()
