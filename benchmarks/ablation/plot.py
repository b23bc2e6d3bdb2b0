"""The picture: what the target loses against what benign text loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from benchmarks.ablation.choose import Method
from benchmarks.ablation.study import RANDOM
from benchmarks.ablation.twins import Kind
from benchmarks.ablation.units import Unit

COLOURS: Final = {
    Kind.DENSE: "tab:orange",
    Kind.WIDE: "tab:red",
    Kind.PLAIN: "tab:blue",
    Kind.SEPARATED: "tab:green",
}
STYLES: Final = {Unit.NEURONS: "-", Unit.REROUTED: "--", Unit.DROPPED: ":"}
ROWS: Final = (
    ("benign", "held-out", 100.0, 10.0, "held-out benign answers, mean of topics: growth in %"),
    ("benign", "familiar", 100.0, 10.0, "familiar benign answers, mean of topics: growth in %"),
    ("worst", "familiar", 1.0, 0.3, "familiar benign topic that fares worst: growth in nats"),
)


def plot(report: dict[str, Any], path: Path) -> None:
    """report: what `benchmarks.ablation` writes as JSON"""
    figure = Figure(figsize=(12, 11), layout="constrained")
    versions = report["versions"]
    figure.suptitle(
        "Growth of the loss on held-out restricted answers, nats a token, against that on benign ones\n"
        f"{report['date']}, {report['hardware']}, torch {versions.get('torch')}; a line for each seed",
        fontsize=10,
    )
    methods = (*map(str, Method), RANDOM)
    grid = figure.subplots(len(ROWS), len(methods), squeeze=False, sharey=True, sharex="row")
    for row, (value, side, scale, most, label) in zip(grid, ROWS, strict=True):
        for axes, method in zip(row, methods, strict=True):
            for curve in report["curves"]:
                if not curve["method"].startswith(method):
                    continue
                axes.plot(
                    [scale * each for each in curve[value][side]],
                    curve["target"],
                    STYLES[Unit(curve["unit"])],
                    color=COLOURS[Kind(curve["model"])],
                    linewidth=0.6 if method == RANDOM else 1.2,
                    label=f"{curve['model']}: {curve['unit']}",
                )
            axes.set_title(method, fontsize=9)
            axes.set_xlim(-0.03 * most, most)
            axes.set_xlabel(label, fontsize=8)
            axes.tick_params(labelsize=8)
            axes.grid(color="0.92")
    grid[0, 0].set_ylim(bottom=-0.1)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
