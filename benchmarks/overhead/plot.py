"""The picture: each state's ratio with its interval, for each workload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot(report: dict[str, Any], path: Path) -> None:
    """report: what `benchmarks.overhead` writes as JSON"""
    rows = report["summary"]
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    names = list(dict.fromkeys((row["group"], row["state"]) for row in rows))
    figure = Figure(figsize=(3.2 + 2.3 * len(kinds), 1.4 + 0.3 * len(names)), layout="constrained")
    figure.suptitle(
        "Time over that of the base (the guard off), median of pairs and its 95 % interval\n"
        f"{report['date']}, {report['hardware']}, vLLM {report['versions'].get('vllm')}",
        fontsize=10,
    )
    for axes, kind in zip(
        figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True
    ):
        axes.axvspan(0.99, 1.01, color="0.92")
        axes.axvline(1.0, color="0.6", linewidth=1)
        for row in rows:
            if _kind(row) != kind:
                continue
            ratio, place = row["ratio"], names.index((row["group"], row["state"]))
            color = "tab:gray" if "A/A" in row["state"] else "tab:blue"
            axes.plot([ratio["low"], ratio["high"]], [place, place], color=color, linewidth=2)
            axes.plot(ratio["median"], place, "o", color=color, markersize=4)
        axes.set_title(f"{kind[0]} at {kind[1]}", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.set_yticks(range(len(names)), [f"{state}  [{group}]" for group, state in names])
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def _kind(row: dict[str, Any]) -> tuple[str, int]:
    return row["workload"]["name"], row["workload"]["concurrency"]
