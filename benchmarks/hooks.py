"""What the guard's hooks take of a decode step in a real engine, one by one, where nothing is warm.

    python -m benchmarks.hooks [--state 'observing, 16 policies'] [--concurrency 1,32] [--steps 400]
        [--model 340m] [--dtype bfloat16] [--eager]

One engine in this process, as `overhead` starts them. A hook's time is what passes in it, less what
passes in the engine's own method that it stands around; reading the clock is part of it. What the
routers' operation takes inside the graph is not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.overhead.engine_process import WARM_UP_STEPS, Batches, TurnClock
from benchmarks.overhead.runs import Plan, environment, job_of
from benchmarks.overhead.states import MODELS, STATES, State

_PACKAGE = "guard_vllm"


class Stopwatch:
    """Seconds in each hook since `clear`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def around(self, name: str, work: Callable[..., Any], sign: int = 1) -> Callable[..., Any]:
        """`work`, whose time counts under the name, or with sign -1 does not."""
        clock, seconds = self._clock, self.seconds

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = clock()
            try:
                return work(*args, **kwargs)
            finally:
                seconds[name] += sign * (clock() - began)

        return timed


def time_hooks(owners: Iterator[object], watch: Stopwatch) -> list[str]:
    """Put the watch into each of the guard's hooks on these objects. Returns their names."""
    names = []
    for owner in owners:
        for name, hook in list(vars(owner).items()):
            if not isinstance(hook, partial) or not hook.func.__module__.startswith(_PACKAGE):
                continue
            stock, *others = hook.args
            inner = partial(hook.func, watch.around(name, stock, -1), *others, **hook.keywords)
            setattr(owner, name, watch.around(name, inner))
            names.append(name)
    return names


def owners(core: Any) -> Iterator[object]:
    """All in an engine that the guard hangs on in each step."""
    scheduler = core.scheduler
    yield from (core, scheduler, scheduler.kv_cache_manager, scheduler.kv_cache_manager.block_pool)
    yield core.model_executor.driver_worker.worker.model_runner


def measure(
    state: State, plan: Plan, concurrency: int, steps: int, scratch: Path
) -> tuple[Mapping[str, list[float]], list[float]]:
    """Of each step, the seconds in each hook that was called, and in all of the step."""
    engine = Batches(job_of(state, plan, scratch, concurrency), TurnClock())
    order = {"concurrency": concurrency, "prompt_tokens": 4}
    engine.begin_decoding(order, list(state.masks))  # some hooks come with the first request
    engine.end_decoding()
    watch = Stopwatch()
    time_hooks(owners(engine.core), watch)
    engine.begin_decoding(order, list(state.masks))
    for _ in range(WARM_UP_STEPS):
        engine.decode()
    hooks: defaultdict[str, list[float]] = defaultdict(list)
    took = []
    for _ in range(steps):
        watch.seconds.clear()
        took.append(engine.decode())
        for name, seconds in watch.seconds.items():
            hooks[name].append(seconds)
    engine.end_decoding()
    return hooks, took


def main() -> None:
    states = {state.name: state for state in STATES if state.engine not in ("none", "off")}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state", choices=states, default="observing, 16 policies", metavar="STATE")
    parser.add_argument(
        "--concurrency", type=lambda text: [*map(int, text.split(","))], default=[1, 32]
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--model", choices=MODELS, default="340m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    os.environ.update(environment())
    from guard_vllm.plugin import register

    register()
    plan = Plan(model=options.model, dtype=options.dtype, eager=options.eager)
    table = Table("requests", "hook", "µs, median", "in steps")
    for concurrency in options.concurrency:
        with tempfile.TemporaryDirectory() as scratch:
            hooks, took = measure(
                states[options.state], plan, concurrency, options.steps, Path(scratch)
            )
        in_most = 0.0
        for name, seconds in hooks.items():
            table.add_row(
                str(concurrency),
                name,
                f"{1e6 * statistics.median(seconds):.1f}",
                f"{len(seconds) / len(took):.0%}",
            )
            in_most += statistics.median(seconds) if 2 * len(seconds) > len(took) else 0.0
        table.add_row(str(concurrency), "those in most steps", f"{1e6 * in_most:.1f}", "")
        table.add_row(str(concurrency), "the whole step", f"{1e6 * statistics.median(took):.0f}", "")
        table.add_section()
    console = Console(width=120, highlight=False)
    console.print(table)
    console.print(str(machine()))


if __name__ == "__main__":
    main()
