"""Reads a decision log backwards, from its end to the last line of its chain."""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from guard.events.log.chain import MAX_LINE_BYTES, Link, link_of

_FIRST_BYTES: Final = 8 << 10


class Tail(NamedTuple):
    """line, link: the last line of the chain; None where a file has none
    behind: what stands behind it, or all of the file; empty where that is too much to be a torn line
    """

    line: bytes
    link: Link | None
    behind: bytes


def read_tail(fd: int) -> Tail:
    """A last line that lacks nothing but its end counts as ended. Raises OSError."""
    size = os.fstat(fd).st_size
    length = min(size, _FIRST_BYTES)
    while True:
        content = os.pread(fd, length, size - length)
        first = 0 if length == size else (content.find(b"\n") + 1 or length)  # behind a part of a line
        found = _last_link(content, first)
        if found is not None:
            return found
        if length == size:
            return Tail(b"", None, content)
        if length >= 2 * MAX_LINE_BYTES:
            return Tail(b"", None, b"")
        length = min(size, 8 * length)


def _last_link(content: bytes, first: int) -> Tail | None:
    end = len(content)
    while end > first:
        begin = content.rfind(b"\n", first, end - 1) + 1 or first
        line = content[begin:end].removesuffix(b"\n") + b"\n"
        if (link := link_of(line)) is not None:
            return Tail(line, link, content[end:])
        end = begin
    return None
