"""What the guard costs, in ratios to a vLLM without the plugin.

    python -m benchmarks.overhead [--groups guard,policies,masks,capture] [--concurrency 1,4,32,256]
        [--rounds 10] [--starts 2] [--model 340m] [--eager] [--out NAME]

The engines of a group are up at once, each in its own process, and take turns: in a round every state
runs a slice of the same work, in an order that is drawn anew, and its ratio is its time over that of
`no plugin` in the same round. `no plugin again` is a second engine of the same kind: what its ratio
differs from 1 is what this method cannot tell apart. Weights are random, so nothing is downloaded.

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
from benchmarks.overhead.runs import Slice, Workload, run_group
from benchmarks.overhead.states import GROUPS, MODELS, STATES
from benchmarks.paired import paired_ratio

RESULTS = Path(__file__).resolve().parents[1] / "results"
BASE = STATES[0].name


def workloads(concurrency: Sequence[int], *, steps: int) -> list[Workload]:
    return [
        *(Workload("decode", each, 16, steps if each <= 32 else steps // 2) for each in concurrency),
        *(Workload("prefill", each, 128 if each <= 32 else 64) for each in concurrency),
    ]


def summary(group: str, slices: Sequence[Slice]) -> list[dict[str, Any]]:
    """A row for each state and workload, ratios paired by start and round."""
    rows = []
    for workload in dict.fromkeys(each.workload for each in slices):
        of_workload = [each for each in slices if each.workload == workload]
        base = {(each.start, each.round): each.value for each in of_workload if each.state == BASE}
        for state in dict.fromkeys(state.name for state in STATES):
            own = [each for each in of_workload if each.state == state]
            if not own:
                continue
            values = [each.value for each in own]
            ratio = paired_ratio(values, [base[each.start, each.round] for each in own])
            milliseconds = 1000 * statistics.median(values)
            tokens = workload.concurrency * (1 if workload.name == "decode" else workload.prompt_tokens)
            last = [max(each.seconds) if workload.name == "prefill" else each.value for each in own]
            rows.append(
                {
                    "group": group,
                    "workload": asdict(workload),
                    "state": state,
                    "milliseconds": milliseconds,
                    "tokens_per_second": tokens / statistics.median(last),
                    "ratio": asdict(ratio),
                    "ratio_of_each_start": [
                        statistics.median(
                            each.value / base[each.start, each.round] for each in own if each.start == n
                        )
                        for n in sorted({each.start for each in own})
                    ],
                }
            )
    return rows


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        kinds = list(dict.fromkeys((r["workload"]["name"], r["workload"]["concurrency"]) for r in own))
        table = Table("state", *(f"{name} {concurrency}" for name, concurrency in kinds), title=group)
        for state in dict.fromkeys(row["state"] for row in own):
            cells = []
            for kind in kinds:
                row = next(
                    r
                    for r in own
                    if r["state"] == state
                    and (r["workload"]["name"], r["workload"]["concurrency"]) == kind
                )
                ratio = row["ratio"]
                cells.append(
                    f"{row['milliseconds']:.2f} ms"
                    if state == BASE
                    else f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})"
                )
            table.add_row(state, *cells)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--concurrency", default="1,4,32,256")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=32, help="of a slice of decoding")
    parser.add_argument("--model", choices=MODELS, default="340m")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out", help="name of the files to write; by default none")
    options = parser.parse_args()
    console = Console(highlight=False, width=170)
    rows, slices = [], []
    for group in options.groups.split(","):
        found = run_group(
            [state for state in STATES if state.engine in GROUPS[group]],
            workloads(list(map(int, options.concurrency.split(","))), steps=options.steps),
            model=options.model,
            starts=options.starts,
            rounds=options.rounds,
            eager=options.eager,
            say=lambda text: console.print(text, style="dim"),
        )
        rows += summary(group, found)
        slices += [{"group": group, "value": each.value, **asdict(each)} for each in found]
        show(rows, console)
    if options.out:
        for each in slices:
            del each["seconds"]  # their median or mean is kept
        report = {**machine(), "options": vars(options), "summary": rows, "slices": slices}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{options.out}.json").write_text(json.dumps(report, indent=1) + "\n")
        from benchmarks.overhead.plot import plot

        plot(report, RESULTS / f"{options.out}.png")


if __name__ == "__main__":
    main()
