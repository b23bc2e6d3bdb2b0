"""What the guard costs, in ratios to a vLLM whose guard is off.

    python -m benchmarks.overhead [--groups guard,policies,masks,plugin] [--concurrency 1,4,32,256]
        [--workloads decode,prefill] [--slices 12] [--starts 2] [--model 340m] [--dtype bfloat16]
        [--eager] [--one-at-a-time] [--states again,armed] [--out NAME]

All states of a group are up at once in one process, each with an engine of its own, and take turns: in
decoding step by step, in an order that is drawn anew for each step. A state's ratio in a slice is its
median step over that of the base in the same slice. A second engine of the base's kind shows what the
method cannot tell apart. Weights are random, so nothing is downloaded.

On one GPU: `--model qwen3-30b-a3b --one-at-a-time --starts 5`, which starts each engine five times.

Decoding: the median step of a steady batch, which is the inter-token latency. Prefill: the mean time to
the first token of requests that come at once. Writes NAME.json and NAME.png to `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.overhead.runs import Plan, Slice, Workload, run_group
from benchmarks.overhead.states import GROUPS, MODELS, STATES, states_of
from benchmarks.paired import paired_ratio

RESULTS = Path(__file__).resolve().parents[1] / "results"


STEPS = {1: 30, 4: 15, 32: 6}
"""Of a slice of decoding, by concurrency; of larger batches 3, whose steps take long."""


def workloads(concurrency: Sequence[int], kinds: Sequence[str]) -> list[Workload]:
    """A slice of prefill has so many tokens that it takes about as long as one of decoding. What
    takes little time has more slices, since it is disturbed more easily."""
    made = {
        "decode": lambda each: Workload("decode", each, 4, STEPS.get(each, 3), 2),
        "prefill": lambda each: Workload(
            "prefill",
            each,
            128 if each < 32 else 2048 // each,
            slices=4 if each < 4 else 2 if each < 32 else 1,
        ),
    }
    return [made[kind](each) for kind in kinds for each in concurrency]


def summary(group: str, base: str, slices: Sequence[Slice]) -> list[dict[str, Any]]:
    """A row for each state and workload. base: the state that they are compared with"""
    rows = []
    for workload in dict.fromkeys(each.workload for each in slices):
        for state in dict.fromkeys(each.state for each in slices):
            own = [each for each in slices if (each.workload, each.state) == (workload, state)]
            ratio = paired_ratio([each.value_s for each in own], [each.base_s for each in own])
            tokens = workload.concurrency * (1 if workload.name == "decode" else workload.prompt_tokens)
            behind = [each.value_s if workload.name == "decode" else each.last_s for each in own]
            rows.append(
                {
                    "group": group,
                    "base": base,
                    "workload": asdict(workload),
                    "state": state,
                    "milliseconds": 1000 * statistics.median(each.value_s for each in own),
                    "base_milliseconds": 1000 * statistics.median(each.base_s for each in own),
                    "tokens_per_second": tokens / statistics.median(behind),
                    "ratio": asdict(ratio),
                    "ratio_of_each_start": [
                        statistics.median(e.value_s / e.base_s for e in own if e.start == start)
                        for start in sorted({each.start for each in own})
                    ],
                }
            )
    order = [state.name for state in STATES]
    return sorted(rows, key=lambda row: order.index(row["state"]))


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        base = own[0]["base"]
        cells: dict[str, dict[str, str]] = {base: {}}
        for row in own:
            ratio, kind = row["ratio"], f"{row['workload']['name']} {row['workload']['concurrency']}"
            cells[base][kind] = f"{row['base_milliseconds']:.2f} ms"
            cells.setdefault(row["state"], {})[kind] = (
                f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})"
            )
        table = Table("state", *cells[base], title=group)
        for state, of_kind in cells.items():
            table.add_row(state, *(of_kind.get(kind, "") for kind in cells[base]))
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--concurrency", default="1,4,32,256")
    parser.add_argument("--workloads", default="decode,prefill")
    parser.add_argument(
        "--states", help="of a group only the base and those with one of these in the name"
    )
    parser.add_argument("--slices", type=int, default=12, help="of each start; of short work more")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--model", choices=MODELS, default="340m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="where the device has no room for all engines"
    )
    parser.add_argument("--out", help="name of the files to write; by default none")
    options = parser.parse_args()
    console = Console(highlight=False, width=170)
    plan = Plan(
        options.model,
        options.dtype,
        options.starts,
        options.slices,
        options.eager,
        options.one_at_a_time,
    )
    parts = options.states.split(",") if options.states else []
    rows, slices = [], []
    for group in options.groups.split(","):
        first, *others = states_of(group)
        wanted = [s for s in others if not parts or any(part in s.name for part in parts)]
        states = [first, *wanted]
        found = run_group(
            states,
            workloads(list(map(int, options.concurrency.split(","))), options.workloads.split(",")),
            plan,
            say=lambda text: console.print(text, style="dim"),
        )
        rows += summary(group, states[0].name, found)
        slices += [{"group": group, **asdict(each)} for each in found]
        show(rows, console)
    if options.out:
        report = {**machine(), "options": vars(options), "summary": rows, "slices": slices}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{options.out}.json").write_text(json.dumps(report, indent=1) + "\n")
        from benchmarks.overhead.plot import plot

        plot(report, RESULTS / f"{options.out}.png")


if __name__ == "__main__":
    main()
