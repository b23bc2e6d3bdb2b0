"""Seals the lines of a decision log, with a key that all processes that write it share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from guard.events.log.chain import Head, Link
from guard.events.log.key import MAX_STEPS, KeyFile, LogKeyError


class Sealer:
    """The key is changed when a line is in the log, so a crash between the two leaves it one behind,
    and a power cut any number. What the log holds then proves how far to go on. Used with the log's
    lock held.

    on_fault: told of a key that cannot be read or kept; the one in memory goes on

    Raises LogKeyError.
    """

    def __init__(self, path: Path, on_fault: Callable[[Exception], None]) -> None:
        self._file = KeyFile(path)
        self._key = self._file.read()
        self._on_fault = on_fault

    @property
    def head(self) -> Head:
        """The last line that was sealed."""
        return self._key.head

    def seal(self, line_ahead: bytes) -> str:
        return self._key.seal(line_ahead)

    def read(self) -> None:
        """Take what another process made of the key, if one did."""
        try:
            found = self._file.read()
        except (OSError, LogKeyError) as error:
            self._on_fault(error)
            return
        if found.head.log == self._key.head.log and found.head.n > self._key.head.n:
            self._key = found

    def catch_up(self, line: bytes, link: Link) -> bool:
        """Go on behind a line that a later key sealed; False where none did."""
        own = self._key.head
        if link.log != own.log or not own.n < link.n <= own.n + MAX_STEPS:
            return False
        then = self._key.behind(own._replace(n=link.n - 1))
        if not then.made(line, link):
            return False
        self._key = then
        self.go_on(link.head)
        return True

    def go_on(self, head: Head) -> None:
        """The line is written: from now on there is only the key for the next one."""
        self._key = self._key.behind(head)
        try:
            self._file.write(self._key)
        except OSError as error:
            self._on_fault(error)

    def sync(self) -> None:
        """Raises OSError."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()
