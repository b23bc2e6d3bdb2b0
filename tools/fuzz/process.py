"""A target in a process of its own, with a limit on its memory."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Final

from tools.fuzz.limits import Watchdog, limit_memory
from tools.fuzz.part import OpenTarget
from tools.fuzz.rounds import Counts, check_both_sides, run_for

TARGETS: Final = (
    "policies",
    "profile",
    "bundle",
    "trace",
    "importers",
    "keys",
    "log",
    "xargs",
    "admin",
)


def open_target(name: str) -> OpenTarget:
    """Imported when it is asked for: some need vLLM."""
    found: OpenTarget = importlib.import_module(f"tools.fuzz.{name}").parts
    return found


def holds(name: str, seconds: float) -> bool:
    """Whether nothing was found. The process prints what was, and what it counted."""
    # With an arena for each thread the limit would be on addresses that nobody uses.
    os.environ["MALLOC_ARENA_MAX"] = "2"
    process = multiprocessing.get_context("spawn").Process(target=_fuzz, args=(name, seconds))
    process.start()
    process.join()
    return process.exitcode == 0


def _fuzz(name: str, seconds: float) -> None:
    watchdog = Watchdog()
    with tempfile.TemporaryDirectory() as folder:
        parts = open_target(name)(Path(folder))
        limit_memory()
        begin = time.monotonic()
        counts = run_for(parts, Path(folder), seconds, watchdog.tell)
        watchdog.stop()
    _print(name, counts, time.monotonic() - begin)
    check_both_sides(counts, parts)


def _print(name: str, counts: Counts, took_s: float) -> None:
    print(f"{name}: {counts.total()} examples in {took_s:.0f} s", flush=True)
    by_part: dict[str, Counter[str]] = {}
    for (part, outcome), number in counts.items():
        by_part.setdefault(part, Counter())[outcome.word] += number
    for part, words in by_part.items():
        said = ", ".join(f"{number} {word}" for word, number in words.most_common())
        print(f"  {part}: {said}", flush=True)
