"""The decision log's file, with each line in the chain of `chain`, and sealed where there is a key.

Processes that share a file carry on one chain: who finds the file longer than it left it reads the last
line of the chain, over rotations too. What only somebody else can have done (lines are gone, another
log's stand there) is told, and the chain goes on as it was, so that `moe-guard log verify` shows it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from guard.errors import GuardError
from guard.events.log.chain import MAX_LINE_BYTES, Head, Link, chained, new_log
from guard.events.log.file import Appended, DecisionLogError, LogFile, LogLimits
from guard.events.log.loose import is_json
from guard.events.log.sealer import Sealer
from guard.events.log.tail import Tail, read_tail


class LogChangedError(GuardError):
    """The decision log is not as it was written; `moe-guard log verify` says where."""


class _Place(NamedTuple):
    """Where a file ends."""

    device: int
    inode: int
    size: int


class ChainedLog:
    """Used by one thread.

    key: the file of the key that seals it, changed with each line
    on_fault: told of a log that somebody changed, and of a key that cannot be kept

    Raises DecisionLogError if the file cannot be opened or holds another log, LogKeyError.
    """

    def __init__(
        self, path: Path, limits: LogLimits, key: Path | None, on_fault: Callable[[Exception], None]
    ) -> None:
        self._path = path
        self._waits_for_disk = limits.sync == "always"
        self._on_fault = on_fault
        self._head: Head | None = None
        self._behind = b""  # what stands behind the last line of the chain
        self._behind_before = b""  # of it, what stands in files that were left
        self._left: _Place | None = None  # the file's end, as this process last saw it
        self._sealer = None if key is None else Sealer(key, on_fault)
        self._file = LogFile(path, limits, self._leave)
        try:
            self._begin()
        except OSError as error:
            self.close()
            raise DecisionLogError(
                f"the decision log {path} cannot be read: {error.strerror}; choose a file that the "
                "server's user may read and write"
            ) from error
        except DecisionLogError:
            self.close()
            raise

    def append(self, line: bytes) -> Appended:
        """line: a JSON object with fields, and its end. Raises OSError."""
        with self._file.held():
            linked, head = self._linked(line)
            while self._file.is_full_for(linked):
                self._file.rotate()
                linked, head = self._linked(line)
            done = self._file.write(linked)
            if done.is_whole:
                self._note_written(head)
        return done

    def sync(self) -> None:
        """Wait until the disk has it. Raises OSError."""
        self._file.sync()
        if self._sealer is not None:
            self._sealer.sync()

    def close(self) -> None:
        self._file.close()
        if self._sealer is not None:
            self._sealer.close()

    def _linked(self, line: bytes) -> tuple[bytes, Head]:
        head = self._look()
        seal = None if self._sealer is None else self._sealer.seal
        return chained(line, head, self._behind, seal)

    def _note_written(self, head: Head) -> None:
        self._head, self._behind, self._behind_before = head, b"", b""
        if self._left is not None and self._file.is_regular:
            end = os.lseek(self._file.fd, 0, os.SEEK_CUR)  # of what this process appended
            self._left = self._left._replace(size=end)
        if self._sealer is not None:
            try:
                if self._waits_for_disk:
                    self._file.sync()  # a key on the disk is of a line on the disk
            finally:
                self._sealer.go_on(head)

    def _begin(self) -> None:
        if self._sealer is not None and not self._file.is_shared:
            raise DecisionLogError(
                f"the decision log {self._path} cannot be sealed: it is no regular file, or its file "
                "system knows no locks; choose another file, or leave the key out"
            )
        with self._file.held():
            self._refuse_to_begin(self._last_line())
            self._look()

    def _refuse_to_begin(self, last: Tail) -> None:
        if self._sealer is None:
            if last.link is not None and last.link.seal is not None:
                raise DecisionLogError(
                    f"the decision log {self._path} is sealed: start with its key, or move it away"
                )
            return
        if last.link is not None:
            is_own = last.link.log == self._sealer.head.log
        else:  # there is nothing, or what a crash left of the first line
            is_own = self._sealer.head.n > 0 or not any(map(is_json, last.behind.splitlines()))
        if not is_own:
            raise DecisionLogError(
                f"the decision log {self._path} holds lines that its key did not seal; move it and "
                "what was rotated of it away, or choose another file: a key is of one log, from its "
                "first line on"
            )

    def _look(self) -> Head:
        """What the next line goes behind. Takes note of what others did since this process wrote."""
        place = _place(self._file.fd)
        if place == self._left and self._head is not None:
            return self._head
        self._read_key()
        here = self._tail_here()
        behind = here.behind
        if behind and not behind.endswith(b"\n"):
            behind += b"\n"  # as it will be once this process has written
        is_told = False
        if here.link is None:
            self._behind = self._behind_older() + behind
        else:
            self._behind = behind
            if not self._takes(here):
                self._tell_of(here.link)
                is_told = True
        if self._left is not None and not is_told:
            is_same_file = place[:2] == self._left[:2]
            if is_same_file and place.size < self._left.size:
                self._tell("is shorter than this process left it: lines were cut off")
        self._left = place
        self._head = self._head or new_log()
        return self._head

    def _leave(self, fd: int) -> None:
        """What others wrote, at the end of a file that has lost its name."""
        place = _place(fd)
        if place == self._left and not self._behind:
            return
        self._read_key()
        tail = read_tail(fd)
        if tail.link is None:
            self._behind_before += tail.behind
        elif self._takes(tail):
            self._behind_before = tail.behind
        self._left = place

    def _read_key(self) -> None:
        if self._sealer is not None:
            self._sealer.read()
            self._head = self._sealer.head

    def _takes(self, tail: Tail) -> bool:
        """Whether the chain goes on from a line: the last one known, or one that came behind it."""
        link, own = tail.link, self._head
        assert link is not None, "asked only of a line"
        if self._sealer is not None:
            is_next = link.head == own or self._sealer.catch_up(tail.line, link)
        else:
            is_first = own is None or own.n == 0
            is_later = own is not None and link.log == own.log and link.n > own.n
            is_next = is_first or is_later or link.head == own
        if is_next:
            self._head = link.head
        return is_next

    def _tell_of(self, link: Link) -> None:
        """A last line that the chain does not go on from."""
        own = self._head
        assert own is not None, "then any line is one to go on from"
        if link.log != own.log:
            self._tell(f"ends in a line of another log, {link.log}")
            if self._sealer is None:
                self._head = link.head  # or writers of two logs would go on refusing each other's
        elif link.n > own.n:
            self._tell(f"ends in line n={link.n}, which its key did not seal")
        else:
            self._tell(f"ends in line n={link.n}, but n={own.n} was written, and is gone")

    def _tell(self, what: str) -> None:
        self._on_fault(
            LogChangedError(
                f"the decision log {self._path} {what}; `moe-guard log verify {self._path}` shows it"
            )
        )

    def _behind_older(self) -> bytes:
        """What stands behind the last line of the chain ahead of a file that has none."""
        older = self._older_tail()
        if older.link is not None:
            return older.behind if self._takes(older) else self._behind_before
        has_none = self._head is None or self._head.n == 0
        return older.behind if has_none and older.behind else self._behind_before

    def _last_line(self) -> Tail:
        here = self._tail_here()
        return here if here.link is not None or here.behind else self._older_tail()

    def _tail_here(self) -> Tail:
        return read_tail(self._file.fd) if self._file.is_regular else Tail(b"", None, b"")

    def _older_tail(self) -> Tail:
        """Of the rotated files, as if they were one."""
        behind = b""
        for path in self._file.older():
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                tail = read_tail(fd)
            finally:
                os.close(fd)
            behind = tail.behind + behind
            if tail.link is not None or len(behind) > MAX_LINE_BYTES:
                return tail._replace(behind=behind)
        return Tail(b"", None, behind)


def _place(fd: int) -> _Place:
    status = os.fstat(fd)
    return _Place(status.st_dev, status.st_ino, status.st_size)
