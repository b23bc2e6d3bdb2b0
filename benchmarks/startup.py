"""What the guard adds to a start: importing the plugin, compiling policies and kernels, the proof.

    python -m benchmarks.startup [--rounds 5]

Imports are timed in processes of their own, with and without the plugin, in turns; an engine of the
340 M-parameter model is started once, eager, and its parts are timed from inside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.guards import Shape
from benchmarks.machine import machine
from benchmarks.overhead.states import MODELS, observing

_IMPORT = """
import time; began = time.perf_counter()
from vllm.plugins import load_general_plugins; middle = time.perf_counter()
load_general_plugins()
print(middle - began, time.perf_counter() - middle)
"""
_KERNELS = """
import time, torch; began = time.perf_counter()
from guard.device.kernels.native.build import library
assert library() is not None
print(time.perf_counter() - began)
"""


def _timed(code: str, **environment: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(number) for number in done.stdout.split()[-2:]]


def engine_parts(folder: Path) -> dict[str, Any]:
    """In this process: seconds of a guarded start's own parts."""
    took: dict[str, float] = {}

    def timed(owner: Any, name: str) -> None:
        stock = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return stock(*args, **kwargs)
            finally:
                took[name] = took.get(name, 0.0) + time.perf_counter() - began

        setattr(owner, name, wrapper)

    from guard_vllm import start, worker

    timed(worker, "compile_policies")
    timed(worker, "load_in_worker")
    timed(worker, "attach")
    timed(worker.WorkerGuard, "_make_guard")
    timed(worker.WorkerGuard, "_prove")
    timed(start, "resolve")
    from guard_vllm import plugin

    plugin.resolve = start.resolve
    from vllm import LLM

    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODELS["340m"]))
    (folder / "policies.yaml").write_text(
        "---\n".join(map(observing, range(16))).replace("ALL_LAYERS", "0-11")
    )
    began = time.perf_counter()
    LLM(
        model=str(folder / "model"),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        additional_config={"moe_guard": {"policies": str(folder / "policies.yaml")}},
    )
    return {**took, "engine, all": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    console = Console(width=120, highlight=False)
    plugins = {"with the plugin": {}, "without": {"VLLM_PLUGINS": ""}}
    loads: dict[str, list[float]] = {name: [] for name in plugins}
    for _ in range(options.rounds):
        for name, environment in plugins.items():
            loads[name].append(_timed(_IMPORT, **environment)[1])
    for name, seconds in loads.items():
        console.print(f"loading vLLM's plugins, {name}: {1000 * statistics.median(seconds):.1f} ms")
    with tempfile.TemporaryDirectory() as scratch:
        cold = _timed(_KERNELS, MOE_GUARD_CACHE_DIR=scratch)[-1]
        warm = [_timed(_KERNELS, MOE_GUARD_CACHE_DIR=scratch)[-1] for _ in range(options.rounds)]
    console.print(f"kernels compiled for the first time: {cold:.1f} s")
    console.print(f"kernels found compiled: {1000 * statistics.median(warm):.0f} ms")
    began = time.perf_counter()
    Shape().program()
    console.print(f"16 policies read and compiled: {1000 * (time.perf_counter() - began):.0f} ms")
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for name, seconds in engine_parts(Path(scratch)).items():
            console.print(f"{name}: {1000 * seconds:.0f} ms")
    console.print(str(machine()))


if __name__ == "__main__":
    main()
