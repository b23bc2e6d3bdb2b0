"""Logs with a chain, made and checked by hand."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from guard.events.log.anchor import Anchor
from guard.events.log.chain import Head, chained, new_log
from guard.events.log.chained import ChainedLog
from guard.events.log.check import LogCheck, Report
from guard.events.log.file import LogLimits
from guard.events.log.key import SealingKey, make_key_files, read_key, verification_of


def record(number: int, padding: int = 0) -> bytes:
    return b'{"decision_id":"%d","text":"%s"}\n' % (number, b"x" * padding)


def no_fault(error: Exception) -> NoReturn:
    raise AssertionError(error)


def open_log(path: Path, key: Path | None = None, *, keep: int = 900, **limits: object) -> ChainedLog:
    return ChainedLog(path, LogLimits(keep=keep, **limits), key, no_fault)  # type: ignore[arg-type]


def make_key(path: Path) -> SealingKey:
    """For a server; what was the first key is no longer beside it."""
    make_key_files(path)
    first = read_key(verification_of(path))
    verification_of(path).unlink()
    return first


def lines_of(count: int, key: SealingKey | None = None, head: Head | None = None) -> list[bytes]:
    """As a server writes them. key: the first"""
    head = head or (new_log() if key is None else key.head)
    lines = []
    for number in range(count):
        seal = None if key is None else key.behind(head).seal
        line, head = chained(record(number, number % 7), head, seal=seal)
        lines.append(line)
    return lines


def check(
    *files: Sequence[bytes], key: SealingKey | None = None, anchor: Anchor | None = None
) -> Report:
    """files: their lines, the oldest first"""
    log = LogCheck(key, anchor)
    for number, lines in enumerate(files):
        log.read(f"file-{number}", io.BytesIO(b"".join(lines)))
    return log.report()


def older_first(path: Path) -> list[Path]:
    older = sorted(path.parent.glob(f"{path.name}.*"), key=lambda one: -int(one.suffix[1:]))
    return [*older, *([path] if path.exists() else [])]


def check_files(path: Path, key: SealingKey | None = None, anchor: Anchor | None = None) -> Report:
    return check(*([one.read_bytes()] for one in older_first(path)), key=key, anchor=anchor)


def told(report: Report) -> list[str]:
    return [f"{one.place} {one.kind}" for one in report.findings]
