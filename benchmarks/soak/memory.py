"""Memory of a server's processes over time, and whether it grows."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import psutil
from scipy.stats import theilslopes

_MIB: Final = 2**20
EVERY_S: Final = 5.0


@dataclass(slots=True)
class Memory:
    """Of all processes that this one started. rss_mib: by process, (seconds since the start, MiB)"""

    rss_mib: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def watch(self, done: threading.Event) -> None:
        """Until `done`."""
        begun = time.monotonic()
        while not done.wait(EVERY_S):
            seconds = time.monotonic() - begun
            for process in psutil.Process().children(recursive=True):
                try:
                    name, rss = _name(process), process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
                self.rss_mib.setdefault(name, []).append((seconds, rss / _MIB))


def _name(process: psutil.Process) -> str:
    """vLLM names its processes, `VLLM::EngineCore` and the like."""
    title = " ".join(process.cmdline()) or process.name()
    return f"{title.split()[0].rpartition('/')[2]} {process.pid}"


def slope_mib_per_minute(samples: Sequence[tuple[float, float]], after_s: float) -> float:
    """Theil-Sen: the median of the slopes of all pairs, so that single steps do not make it."""
    late = [(seconds, mib) for seconds, mib in samples if seconds >= after_s]
    if len(late) < 2:
        return float("nan")
    seconds, mib = zip(*late, strict=True)
    return float(theilslopes(mib, seconds)[0] * 60)
