"""The decision log: one JSON object a line, written by a thread of its own."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from guard.events.log.chained import ChainedLog
from guard.events.log.file import LogFile, LogLimits
from guard.events.message import Decision

logger = logging.getLogger(__name__)

MAX_QUEUED_LINES = 10_000
"""Lines that may wait for the disk; more are dropped, and `on_drop` is told."""

CLOSE_SECONDS = 5.0
SYNC_SECONDS = 1.0
"""How old what is not on the disk may be, with `sync: second`."""


def _warn(error: Exception) -> None:
    logger.warning("MoE Guard: %s", error)


class DecisionLog:
    """Appends whole lines, so that several API servers can share a file. Readable by its owner only.

    on_drop: called with how many lines were lost, whether to a full queue or to a failing disk
    on_write: called with how many bytes the file got
    on_fault: called with what shows that somebody changed the file, or that its key cannot be kept
    chain: whether each line is chained to the one before it, see `guard.events.log.chain`
    key: file of the key that seals the chain, which is changed with each line

    Raises DecisionLogError if the file cannot be opened, LogKeyError if the key cannot be used.
    """

    def __init__(
        self,
        path: Path,
        on_drop: Callable[[int], None],
        limits: LogLimits | None = None,
        on_write: Callable[[int], None] = lambda count: None,
        on_fault: Callable[[Exception], None] = _warn,
        *,
        chain: bool = True,
        key: Path | None = None,
    ) -> None:
        self._on_drop = on_drop
        self._on_write = on_write
        self._encoder = msgspec.json.Encoder()
        limits = limits or LogLimits()
        self._sync = limits.sync
        self._file = ChainedLog(path, limits, key, on_fault) if chain else LogFile(path, limits)
        self._unsynced = 0  # lines
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
        synced_at = time.monotonic()
        while True:
            left = synced_at + SYNC_SECONDS - time.monotonic()
            waits = self._sync == "second" and self._unsynced > 0
            try:
                line = self._lines.get(timeout=max(left, 0.001) if waits else None)
            except queue.Empty:
                line = b""
            if line is None:
                break
            if line:
                self._write(line)
            if self._is_due(synced_at):
                self._to_disk()
                synced_at = time.monotonic()
        if self._sync != "never":
            self._to_disk()
        self._file.close()

    def _write(self, line: bytes) -> None:
        try:
            done = self._file.append(line)
        except OSError:
            self._on_drop(1)
            return
        self._on_write(done.num_bytes)
        if done.is_whole:
            self._unsynced += 1
        else:
            self._on_drop(1)

    def _is_due(self, synced_at: float) -> bool:
        match self._sync:
            case "always":
                return self._unsynced > 0
            case "second":
                return self._unsynced > 0 and time.monotonic() - synced_at >= SYNC_SECONDS
            case _:
                return False

    def _to_disk(self) -> None:
        """Lines that the disk did not confirm count as lost, though they may be there."""
        lines, self._unsynced = self._unsynced, 0
        try:
            self._file.sync()
        except OSError:
            self._on_drop(lines)
