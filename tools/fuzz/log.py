"""Decision logs as `moe-guard log verify` reads them: damaged bytes, and whole lines where they do not
belong.

No log is an error: a report says what is wrong with it. Against the head that was kept elsewhere, a
report without a fault means that every line from the first one there is as it was written.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

from hypothesis import strategies as st

from guard.events.log.anchor import Anchor
from guard.events.log.chain import NO_HASH, Head, chained
from guard.events.log.check import LogCheck, Report
from guard.events.log.findings import MAX_FINDINGS
from guard.events.log.key import SealingKey
from tools.fuzz.mutation import Edit, edited, edits
from tools.fuzz.part import Outcome, Part, Parts

NUM_LINES: Final = 8
FAULTS: Final = Outcome(False, "faults")

_KEY: Final = SealingKey(Head("ab" * 16, 0, NO_HASH), bytes(range(32)))
_OTHER: Final = SealingKey(Head("cd" * 16, 0, NO_HASH), bytes(32))


def lines_of(key: SealingKey, *, is_sealed: bool) -> tuple[bytes, ...]:
    """As a server writes them."""
    head, lines = key.head, []
    for number in range(NUM_LINES):
        decision = {
            "decision_id": str(number),
            "text": "x" * (number % 5),
            "evidence": [{"value": 0.5}],
        }
        record = json.dumps(decision, separators=(",", ":")).encode() + b"\n"
        line, head = chained(record, head, seal=key.behind(head).seal if is_sealed else None)
        lines.append(line)
    return tuple(lines)


class Change(NamedTuple):
    """Of whole lines, by their numbers. line: what is put in"""

    what: Literal["drop", "swap", "repeat", "put", "cut", "edit"]
    place: int
    other: int
    line: bytes
    edit: Edit


def changed(lines: Sequence[bytes], changes: Sequence[Change]) -> bytes:
    made = list(lines)
    for change in changes:
        if not made:
            break
        place, other = change.place % len(made), change.other % len(made)
        match change.what:
            case "drop":
                del made[place : place + 1 + change.other % 3]
            case "swap":
                made[place], made[other] = made[other], made[place]
            case "repeat":
                made.insert(place, made[other])
            case "put":
                made.insert(place, change.line)
            case "cut":
                made[place] = made[place][: len(made[place]) * change.other // NUM_LINES]
            case "edit":
                made[place] = edited(made[place], [change.edit])
    return b"".join(made)


def _changes(others: Sequence[bytes]) -> st.SearchStrategy[list[Change]]:
    odd = [
        b"\n",
        b"{}\n",
        b"\0" * 40 + b"\n",
        b"x" * 5000 + b"\n",
        b'{"a":1}\n',
        b'{"a":"\xff"}\n',
        DEEP,
    ]
    change = st.builds(
        Change,
        st.sampled_from(["drop", "swap", "repeat", "put", "cut", "edit"]),
        st.integers(0, NUM_LINES - 1),
        st.integers(0, NUM_LINES - 1),
        st.one_of(st.sampled_from([*others, *odd]), st.binary(max_size=20)),
        edits(
            [
                b'"n":',
                b'"torn":"' + b"0" * 64 + b'",',
                b',"chain":{"log":"',
                b'"}}\n',
                b"999999999999999",
            ]
        ),
    )
    return st.lists(change, max_size=3)


DEEP: Final = b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}\n"


def parts(_: Path) -> Parts:
    made = {}
    for is_sealed in (False, True):
        lines = lines_of(_KEY, is_sealed=is_sealed)
        others = lines_of(_OTHER, is_sealed=not is_sealed)
        key = _KEY if is_sealed else None
        name = "sealed" if is_sealed else "chained"
        made[f"{name}, kept head"] = Part(
            _changes([*lines, *others]), _reader(lines, key, _head(lines)), ()
        )
        made[f"{name}, no head"] = Part(_changes(others), _reader(lines, key, None), ())
    return made


def _head(lines: Sequence[bytes]) -> Anchor:
    place = json.loads(lines[-1])["chain"]
    return Anchor(place["n"], place["hash"])


def _reader(
    lines: Sequence[bytes], key: SealingKey | None, anchor: Anchor | None
) -> Callable[[list[Change]], Outcome | None]:
    def read(changes: list[Change]) -> Outcome | None:
        content = changed(lines, changes)
        # In two files, as after a rotation.
        middle = content.find(b"\n", len(content) // 2) + 1
        check = LogCheck(key, anchor)
        check.read("log.1", io.BytesIO(content[:middle]))
        check.read("log", io.BytesIO(content[middle:]))
        report = check.report()
        _check_words(report)
        if report.num_faults:
            return FAULTS
        if anchor is not None and report.first_n:
            kept = [line for line in (*content.splitlines(keepends=True), b"") if line in lines]
            if content and not content.endswith(b"\n") and content.splitlines()[-1] + b"\n" in lines:
                kept.append(content.splitlines()[-1] + b"\n")  # it lacks nothing but its end
            assert kept == list(lines[report.first_n - 1 :]), "it says that all is as it was"
            assert report.num_good == len(kept)
        return None

    return read


def _check_words(report: Report) -> None:
    assert len(report.findings) <= MAX_FINDINGS
    assert report.num_faults + report.num_notices >= len(report.findings)
    for finding in report.findings:
        assert finding.message.strip()
        str(finding).encode()
        assert finding.place.line >= 1
