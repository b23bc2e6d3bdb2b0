"""The decision log: one JSON object a line, written by a thread of its own."""

from __future__ import annotations

import atexit
import os
import queue
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from guard.errors import GuardError
from guard.events.message import Decision

MAX_QUEUED_LINES = 10_000
"""Lines that may wait for the disk; more are dropped, and `on_drop` is told."""

CLOSE_SECONDS = 5.0


class DecisionLogError(GuardError):
    """The decision log cannot be written."""


class DecisionLog:
    """Appends whole lines, so that several API servers can share a file. Readable by its owner only.

    on_drop: called with how many lines were lost, whether to a full queue or to a failing disk

    Raises DecisionLogError if the file cannot be opened.
    """

    def __init__(self, path: Path, on_drop: Callable[[int], None]) -> None:
        self._on_drop = on_drop
        self._encoder = msgspec.json.Encoder()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                os.fchmod(self._fd, 0o600)  # an older file may be open to others
        except OSError as error:
            raise DecisionLogError(
                f"the decision log {path} cannot be opened: {error.strerror}; choose a file that "
                "the server's user may write"
            ) from error
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_QUEUED_LINES)
        self._thread = threading.Thread(
            target=self._write_lines, name="moe-guard-decision-log", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)

    def write(self, decision: Decision) -> None:
        """Queue a line; never waits."""
        try:
            if not self._thread.is_alive():
                raise queue.Full  # closed: nobody empties it any more
            self._lines.put_nowait(self._encoder.encode(decision) + b"\n")
        except queue.Full:
            self._on_drop(1)

    def close(self) -> None:
        """Write what is queued, then stop; a disk that hangs is not waited for longer than this."""
        if self._thread.is_alive():
            try:
                self._lines.put(None, timeout=CLOSE_SECONDS)
            except queue.Full:
                self._on_drop(self._lines.qsize())
                return
            self._thread.join(timeout=CLOSE_SECONDS)

    def _write_lines(self) -> None:
        torn = b""
        while (line := self._lines.get()) is not None:
            try:
                whole = os.write(self._fd, torn + line) == len(torn + line)
            except OSError:
                self._on_drop(1)
                continue
            torn = b"" if whole else b"\n"  # so that a line cut short spoils no other
            if not whole:
                self._on_drop(1)
        os.close(self._fd)
