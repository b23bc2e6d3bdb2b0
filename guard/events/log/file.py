"""A file of whole lines that several processes append to, and that any of them rotates.

Who writes holds the lock (flock) of the file that has the name, so a line is neither torn nor lost: a
process that comes to the lock of a file that was rotated meanwhile sees by its inode that the name is
another's, and opens that one. A file that somebody else moved away is opened anew in the same way.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from guard.errors import GuardError
from guard.failures import Stage
from guard.fault_injection import strikes

logger = logging.getLogger(__name__)

SYNC: Final = ("never", "second", "always")
KEEP: Final = 5
_PRIVATE: Final = 0o600


class DecisionLogError(GuardError):
    """The decision log cannot be written."""


@dataclass(frozen=True, slots=True)
class LogLimits:
    """max_bytes: a file that would grow beyond it is rotated (one line may be longer); None: never
    keep: so many older files, FILE.1 the youngest; what is older goes
    sync: when the disk is waited for: never, once a second, or after every line
    """

    max_bytes: int | None = None
    keep: int = KEEP
    sync: str = SYNC[0]


class Appended(NamedTuple):
    """num_bytes: how many of the line got there; all, unless the disk is full"""

    num_bytes: int
    is_whole: bool


class LogFile:
    """Used by one thread. Raises DecisionLogError if the file cannot be opened.

    on_leave: called with a file that lost its name, under its lock, before it is closed
    """

    def __init__(
        self, path: Path, limits: LogLimits, on_leave: Callable[[int], None] = lambda fd: None
    ) -> None:
        self._path = path
        self._limits = limits
        self._on_leave = on_leave
        self._cannot_rotate = False
        self._locks = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = self._opened()
            self.is_regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            self._locks = self.is_regular and self._can_lock()
            with self.held():
                self._mend()
        except OSError as error:
            raise DecisionLogError(
                f"the decision log {path} cannot be opened: {error.strerror}; choose a file that "
                "the server's user may write"
            ) from error
        if limits.max_bytes is not None and not self._locks:
            logger.warning(
                "MoE Guard does not rotate the decision log %s: it is no regular file, or its file "
                "system knows no locks",
                path,
            )

    def append(self, line: bytes) -> Appended:
        """Raises OSError."""
        with self.held():
            while self.is_full_for(line):
                self.rotate()
            return self.write(line)

    @property
    def fd(self) -> int:
        return self._fd

    @property
    def is_shared(self) -> bool:
        """Whether it has a lock that keeps processes apart."""
        return self._locks

    def older(self) -> Iterator[Path]:
        """The rotated files that there are, the youngest first."""
        return (Path(name) for name in self._older_names() if os.path.exists(name))

    def write(self, line: bytes) -> Appended:
        """With the lock held. Raises OSError."""
        end = self._open_end()
        if strikes(Stage.DECISION_LOG):
            raise OSError(errno.ENOSPC, "no space left, injected by a drill")
        num_bytes = max(os.write(self._fd, end + line) - len(end), 0)
        return Appended(num_bytes, num_bytes == len(line))

    def rotate(self) -> None:
        """With the lock held, of another file then; with a line in it if others were faster."""
        self._mend()
        self._rotate()
        self._lock_current()

    def is_full_for(self, line: bytes) -> bool:
        limit = self._limits.max_bytes
        if limit is None or not self._locks or self._cannot_rotate:
            return False
        size = os.fstat(self._fd).st_size
        return size > 0 and size + len(line) > limit

    def sync(self) -> None:
        """Wait until the disk has it. Raises OSError."""
        if self.is_regular:
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _opened(self) -> int:
        # To read, too: whether the last line was ended is seen by its last byte. A pipe has none.
        try:
            is_regular = stat.S_ISREG(os.stat(self._path).st_mode)
        except FileNotFoundError:
            is_regular = True
        way = os.O_RDWR if is_regular else os.O_WRONLY
        fd = os.open(self._path, way | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, _PRIVATE)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.fchmod(fd, _PRIVATE)  # an older file may be open to others
        return fd

    def _can_lock(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except OSError:  # such as Lustre without its option for it
            return False
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock of the file that has the name."""
        if not self._locks:
            yield
            return
        try:
            self._lock_current()
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _lock_current(self) -> None:
        while True:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            own = os.fstat(self._fd)
            try:
                named = os.stat(self._path)
            except FileNotFoundError:
                named = None
            if named is not None and (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino):
                return
            self._reopen()

    def _reopen(self) -> None:
        fresh = self._opened()
        try:
            self._on_leave(self._fd)
            if self._limits.sync != SYNC[0]:
                os.fsync(self._fd)
        finally:
            os.close(self._fd)
            self._fd = fresh

    def _rotate(self) -> None:
        """FILE becomes FILE.1, FILE.1 becomes FILE.2, and so on up to the first number that is free."""
        names = self._older_names()
        free = next((n for n, name in enumerate(names) if not os.path.exists(name)), len(names) - 1)
        try:
            for number in range(free, 0, -1):
                os.replace(names[number - 1], names[number])
            os.replace(self._path, names[0])
        except FileNotFoundError:
            return  # somebody moved it: it is opened anew
        except OSError as error:
            self._cannot_rotate = True  # it grows on: nothing is lost
            logger.error(
                "MoE Guard cannot rotate the decision log %s (%s); it grows until the server is "
                "restarted with a folder that it may write",
                *(self._path, error.strerror),
            )

    def _older_names(self) -> list[str]:
        return [f"{self._path}.{number}" for number in range(1, self._limits.keep + 1)]

    def _mend(self) -> None:
        """End a last line that a crash cut short."""
        if end := self._open_end():
            os.write(self._fd, end)

    def _open_end(self) -> bytes:
        """What ends the file's last line, if nothing does."""
        if not self.is_regular:
            return b""
        size = os.fstat(self._fd).st_size
        return b"" if size == 0 or os.pread(self._fd, 1, size - 1) == b"\n" else b"\n"
