"""`moe-guard discover` on a large trace: seconds of each part, and the most memory that it took.

    python -m benchmarks.discover [--pairs 500] [--tokens 200] [--layers 48] [--experts 128]
        [--keep DIR]

The routing is drawn, with six experts planted; so are the tokens, by a power law of 50,000.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.machine import machine
from guard.discover.discovery import discover
from guard.discover.probe import fit_probe
from guard.discover.table import Choice, read_table
from guard.trace.format import TraceHeader
from guard.trace.writer import TraceWriter
from tests.support.planted_trace import Planted

Result = TypeVar("Result")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--keep", type=Path, help="a folder for the trace, to use it again")
    options = parser.parse_args()
    console = Console(highlight=False)
    planted = Planted(options.layers, options.experts, 8, options.pairs, options.tokens)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        path = folder / "planted.moetrace"
        if not path.exists():
            generator = np.random.default_rng(1)
            with TraceWriter(path, TraceHeader("planted", planted.topology, tokens=True)) as writer:
                for request in track(planted.requests(), "drawing", 2 * planted.pairs):
                    token_ids = generator.zipf(1.2, len(request.routing.topk_ids)) % 50_000
                    writer.write(replace(request, token_ids=token_ids.astype(np.int32)))
        console.print(f"{path.stat().st_size / 2**20:.0f} MiB of trace")
        seconds: dict[str, float] = {}
        choice = Choice("target", "benign", first_tokens=options.tokens)
        table = timed(seconds, "reading", lambda: read_table([path], choice))
        found = timed(seconds, "statistics and controls", lambda: discover(table))
        probe = timed(seconds, "probe", lambda: fit_probe(table))
    for part, took in seconds.items():
        console.print(f"{part}: {took:.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(f"in all {sum(seconds.values()):.1f} s, at most {peak:.2f} GiB")
    missed = set(planted.planted_experts) - set(found.experts)
    console.print(f"{found.verdict} Planted and missed: {sorted(missed) or 'none'}")
    console.print(f"probe, held-out categories: {probe.quality.worst_held_out}")
    console.print(str(machine()))


def timed(seconds: dict[str, float], part: str, work: Callable[[], Result]) -> Result:
    began = time.perf_counter()
    result = work()
    seconds[part] = time.perf_counter() - began
    return result


if __name__ == "__main__":
    main()
