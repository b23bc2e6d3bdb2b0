"""The memory of each process over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw(
    rss_mib: Mapping[str, Sequence[tuple[float, float]]], slopes: Mapping[str, float], file: Path
) -> None:
    """A panel for each process that has a slope, because their sizes differ by far."""
    figure = Figure(figsize=(8, 1.6 * len(slopes)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(slopes), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (name, slope) in zip(panels, slopes.items(), strict=True):
        seconds, mib = zip(*rss_mib[name], strict=True)
        panel.plot([one / 60 for one in seconds], mib, linewidth=1)
        panel.set_title(f"{name}: {slope:+.3f} MiB a minute behind the warm-up", fontsize=9)
        panel.set_ylabel("MiB")
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("minutes")
    figure.savefig(file, dpi=110)
