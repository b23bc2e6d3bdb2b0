"""Are targeted ablations easier on an MoE than on a dense transformer?

    python -m benchmarks.ablation [--out NAME] [--seeds 20,21,22] [--draws 5] [--jobs 2]

Trains twins of the demo model on its own plan: without the separation term, dense with as many neurons
as a token of the MoE meets, and dense with as many as the MoE has. Twins are kept in `.cache/ablation`.
Units are chosen on the choosing split, by two methods and at random, and ever more of them are
taken out; on the held-out split the growth of the loss on restricted answers stands against that on
benign ones. Models are compared where the benign loss has grown by 2 and by 5 %: on held-out words, and
on documents of training's words. Writes NAME.json and NAME.png to `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.ablation.curves import BUDGETS, RESAMPLES, SIDES
from benchmarks.ablation.plot import plot
from benchmarks.ablation.study import Studied, points, study, summary
from benchmarks.ablation.texts import COUNTS, corpus
from benchmarks.ablation.twins import Kind, load_tokenizer
from benchmarks.machine import machine
from demo.names import Split

RESULTS: Final = Path(__file__).resolve().parents[1] / "results"


def run(kinds: Sequence[Kind], seeds: Sequence[int], draws: int, jobs: int, say: Any) -> list[Studied]:
    """Every model of every seed, some at a time, each on one thread."""
    found: list[Studied] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = {pool.submit(study, kind, seed, draws) for seed in seeds for kind in kinds}
        for done in as_completed(waiting):
            studied = done.result()
            found.append(studied)
            trained = f"trained in {studied.train_s:.0f} s" if studied.train_s else "trained before"
            say(f"{studied.kind}, seed {studied.seed}: {trained}, {len(studied.curves)} curves")
    return sorted(found, key=lambda each: (list(Kind).index(each.kind), each.seed))


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    for side, budget in itertools.product(SIDES, BUDGETS):
        table = Table(
            "model",
            "units",
            "chosen by",
            "target, nats (95 %)",
            "of each seed",
            "more than dense",
            "random",
            "worst benign, nats",
            "share of parameters",
            "active on target",
            "active on benign",
            title=f"where the loss on {side} benign answers has grown by {100 * budget:.0f} %",
        )
        for row in rows:
            if (row["side"], row["budget"]) != (side, budget):
                continue
            over = ""
            if "over_dense" in row:
                low, high = row["over_dense_low"], row["over_dense_high"]
                over = f"{row['over_dense']:+.2f} ({low:+.2f}–{high:+.2f})"
            table.add_row(
                row["model"],
                f"{row['units']:.1f} {row['unit']}"
                + ("" if row["reached"] == 1 else " (not all used up)"),
                row["method"],
                f"{row['target']:.2f} ({row['target_low']:.2f}–{row['target_high']:.2f})",
                ", ".join(f"{value:.2f}" for value in row["of_each_seed"].values()),
                over,
                "" if row["random"] is None else f"{row['random']:.2f}",
                f"{row['worst']:.3f}",
                *(f"{100 * row[name]:.1f} %" for name in ("share", "target_active", "benign_active")),
            )
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="20")
    parser.add_argument("--kinds", default="separated,plain,dense", help="of them, and of `wide`")
    parser.add_argument("--draws", type=int, default=5, help="random orders of each kind of unit")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time, each on one thread")
    parser.add_argument("--out", help="name of the files to write; by default none")
    options = parser.parse_args()
    console = Console(highlight=False, width=190)
    started = time.monotonic()
    studied = run(
        [Kind[name.upper()] for name in options.kinds.split(",")],
        list(map(int, options.seeds.split(","))),
        options.draws,
        options.jobs,
        say=lambda text: console.print(text, style="dim"),
    )
    held_out = corpus(Split.HELD_OUT, load_tokenizer())
    curves = [curve for each in studied for curve in each.curves]
    rows = summary(curves, held_out)
    about = machine()
    about["versions"]["transformers"] = version("transformers")
    report = {
        **about,
        "options": vars(options),
        "seconds": round(time.monotonic() - started),
        "resamples": RESAMPLES,
        "documents": {str(split): counts for split, counts in COUNTS.items()},
        "models": [
            {
                "model": str(each.kind),
                "seed": each.seed,
                "parameters": each.parameters,
                "active_parameters": each.active_parameters,
                "train_s": each.train_s and round(each.train_s),
            }
            for each in studied
        ],
        "summary": rows,
        "curves": [points(curve, held_out) for curve in curves],
    }
    show(rows, console)
    console.print(str(about))
    if options.out:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{options.out}.json").write_text(json.dumps(report, indent=1) + "\n")
        plot(report, RESULTS / f"{options.out}.png")


if __name__ == "__main__":
    main()
