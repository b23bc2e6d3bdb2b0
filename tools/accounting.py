"""What the ways by which a server tells of its decisions say, to be compared to the last one.

A way is a counter of (policy, rule, action, mode, severity, phase).
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

Key = tuple[str, ...]
KEYS = ("policy", "rule", "action", "mode", "severity", "phase")


def series(address: str, name: str, *keys: str) -> Counter[Key]:
    """The samples of a metric by some of their labels, summed over the others."""
    found: Counter[Key] = Counter()
    text = httpx.get(f"{address}/metrics", timeout=30).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                found[tuple(sample.labels[key] for key in keys)] += int(sample.value)
    return found


def counted(address: str) -> Counter[Key]:
    """Decisions on `/metrics`."""
    return +series(address, "moe_guard_decisions_total", *KEYS)


def by_key(decisions: Iterable[Mapping[str, Any]]) -> Counter[Key]:
    return Counter(tuple(str(decision[key]) for key in KEYS) for decision in decisions)


def logged(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class Listener:
    """A client of the stream of events, in a thread of its own, from `with` on.

    Each of them makes a connection of its own, which any of the API servers may take.
    """

    def __init__(self, address: str, key: str) -> None:
        self._url = f"{address}/guard/v1/events/stream"
        self._headers = {"Authorization": f"Bearer {key}"}
        self._lock = threading.Lock()
        self._decisions: list[dict[str, Any]] = []
        self._open = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self.fault: str | None = None

    def __enter__(self) -> Listener:
        self._thread.start()
        if not self._open.wait(30) or self.fault is not None:
            raise RuntimeError(f"the stream did not open: {self.fault}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()  # seen with the next event or heartbeat

    @property
    def decisions(self) -> list[dict[str, Any]]:
        with self._lock:
            return list(self._decisions)

    def _listen(self) -> None:
        try:
            with httpx.stream("GET", self._url, headers=self._headers, timeout=60) as answer:
                answer.raise_for_status()
                for line in answer.iter_lines():
                    self._open.set()
                    if self._done.is_set():
                        return
                    self._take(line)
        except httpx.HTTPError as error:
            self.fault = repr(error)
            self._open.set()

    def _take(self, line: str) -> None:
        if line.startswith("event: dropped"):
            self.fault = "events were dropped"
        if line.startswith("data: ") and "decision_id" in line:
            with self._lock:
                self._decisions.append(json.loads(line.removeprefix("data: ")))
