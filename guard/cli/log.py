"""`moe-guard log`: a key that seals the decision log, and whether a log is as it was written."""

from __future__ import annotations

import json
import os
import re
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn

import typer

from guard.cli.output import err, fail, out
from guard.errors import GuardError
from guard.events.log.anchor import Anchor
from guard.events.log.check import LogCheck, Report
from guard.events.log.findings import MAX_FINDINGS
from guard.events.log.key import SealingKey, make_key_files, read_key, verification_of

log = typer.Typer(help="Seal and verify decision logs.", no_args_is_help=True)


class Format(StrEnum):
    TEXT = "text"
    JSON = "json"


@log.command()
def key(
    file: Annotated[Path, typer.Argument(help="What `serve --decision-log-key` is to take.")],
) -> None:
    """Make the key that seals a new decision log.

    FILE is for the server, FILE.verify to verify with. The server changes FILE with each line, so that
    who takes it cannot forge what was written before. Take FILE.verify off the server before its first
    line: who has it can forge every line.
    """
    try:
        make_key_files(file)
    except GuardError as error:
        fail(error)
    _say(f"{file}: for serve --decision-log-key; the server must be able to write it")
    _say(f"{verification_of(file)}: for `moe-guard log verify --key`; take it off the server now")


@log.command()
def verify(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="A log, which is read with its rotated files (FILE.1, FILE.2, …); or several files, "
            "the oldest first, which are read as they are."
        ),
    ],
    key_file: Annotated[
        Path | None, typer.Option("--key", help="FILE.verify, to check the seals of a sealed log.")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="N:HASH",
            help="A head that was kept elsewhere: the log must hold it. Shows an end that was cut off.",
        ),
    ] = None,
    output: Annotated[
        Format, typer.Option("--format", help="How to print what was found.")
    ] = Format.TEXT,
) -> None:
    """Check that a decision log is as it was written.

    Prints file:line: message for each fault, and the head, to be kept where nobody can write who can
    write the log. Exits with 1 where there are faults, with 2 where it cannot check.
    """
    check = LogCheck(_first_key(key_file), None if head is None else _anchor(head))
    with ExitStack() as opened:
        try:
            for path, file in _open_all(files, opened):
                check.read(str(path), file)
        except OSError as error:
            _refuse(f"{error.filename or 'the log'} cannot be read: {error.strerror}")
    report = check.report()
    (_print_json if output is Format.JSON else _print_text)(report)
    if report.num_faults:
        raise typer.Exit(1)


def _open_all(files: list[Path], opened: ExitStack) -> list[tuple[Path, BinaryIO]]:
    """The oldest first. All are opened before one is read, so that a rotation meanwhile hides none."""
    if len(files) > 1:
        return [(path, opened.enter_context(path.open("rb"))) for path in files]
    found: list[tuple[Path, BinaryIO]] = []
    seen = set()
    for path in (files[0], *_rotated(files[0])):
        file = opened.enter_context(path.open("rb"))
        status = os.fstat(file.fileno())
        if (place := (status.st_dev, status.st_ino)) not in seen:  # rotated since it was opened
            seen.add(place)
            found.append((path, file))
    return found[::-1]


def _rotated(path: Path) -> list[Path]:
    """The youngest first."""
    numbered = re.compile(re.escape(path.name) + r"\.([1-9][0-9]{0,5})")
    numbers = [
        int(match[1]) for one in path.parent.iterdir() if (match := numbered.fullmatch(one.name))
    ]
    return [path.with_name(f"{path.name}.{number}") for number in sorted(numbers)]


def _first_key(path: Path | None) -> SealingKey | None:
    if path is None:
        return None
    try:
        found = read_key(path)
    except GuardError as error:
        _refuse(error)
    if found.head.n > 0:
        _refuse(
            f"{path} is the server's key, which is at n={found.head.n}: it can verify nothing before. "
            "Give the file that ended in .verify when it was made"
        )
    return found


def _anchor(text: str) -> Anchor:
    match = re.fullmatch(r"([1-9][0-9]{0,14}):([0-9a-f]{64})", text)
    if match is None:
        _refuse(f"--head {text}: write N:HASH, as `moe-guard log verify` prints it")
    return Anchor(int(match[1]), match[2])


def _refuse(error: GuardError | str) -> NoReturn:
    err.print(str(error), soft_wrap=True, markup=False)
    raise typer.Exit(2)


def _print_text(report: Report) -> None:
    for finding in report.findings:
        _say(str(finding))
    left_out = report.num_faults + report.num_notices - len(report.findings)
    if left_out:
        _say(f"and {left_out} more: the first {MAX_FINDINGS} are shown")
    numbers = f", n={report.first_n} to n={report.last_n}" if report.first_n else ""
    _say(f"{_count(report.num_good, 'good line')}{numbers}; {_count(report.num_faults, 'fault')}")
    if report.head is not None:
        _say(f"head: {report.head.n}:{report.head.hash}")


def _print_json(report: Report) -> None:
    head = report.head
    document: dict[str, Any] = {
        "ok": report.num_faults == 0,
        "good_lines": report.num_good,
        "faults": report.num_faults,
        "notices": report.num_notices,
        "first_n": report.first_n,
        "last_n": report.last_n,
        "log": None if head is None else head.log,
        "head": None if head is None else f"{head.n}:{head.hash}",
        "findings": [
            {
                "file": finding.place.file,
                "line": finding.place.line,
                "severity": "error" if finding.is_fault else "notice",
                "code": finding.kind.value,
                "message": finding.message,
            }
            for finding in report.findings
        ],
    }
    out.print_json(json.dumps(document))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _say(text: str) -> None:
    out.print(text, soft_wrap=True, markup=False, highlight=False)
