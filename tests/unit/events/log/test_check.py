"""What was done to a log is found, where it was done; and a log that nobody touched is good."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.events.log import check as log_check
from guard.events.log import findings, seals
from guard.events.log.anchor import Anchor
from guard.events.log.chain import NO_HASH, chained, link_of, new_log
from guard.events.log.key import SealingKey
from tests.unit.events.log.chains import check, lines_of, record, told

KEY = SealingKey.new()
PLAIN, SEALED, OTHER = lines_of(8), lines_of(8, KEY), lines_of(8)
KEYS = pytest.mark.parametrize("key", [None, KEY], ids=["plain", "sealed"])


def head_of(line: bytes) -> Anchor:
    link = link_of(line)
    assert link is not None
    return Anchor(link.n, link.hash)


def whole(key: SealingKey | None) -> list[bytes]:
    return list(PLAIN if key is None else SEALED)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 30),
    cuts=st.lists(st.integers(0, 30), max_size=5),
    dropped=st.integers(0, 30),
    is_sealed=st.booleans(),
)
def test_a_clean_log_in_any_number_of_files_is_good(
    count: int, cuts: list[int], dropped: int, is_sealed: bool
) -> None:
    """dropped: so many of its lines were rotated away"""
    key = KEY if is_sealed else None
    lines = lines_of(count, key)
    bounds = [0, *sorted(min(cut, count) for cut in cuts), count]
    files = [lines[first:last] for first, last in pairwise(bounds)]
    kept = [
        [line for line in file if head_of(line).n > dropped]
        for file in files
    ]  # fmt: skip
    report = check(*kept, key=key, anchor=head_of(lines[-1]) if count > dropped else None)

    assert report.num_faults == 0
    assert report.num_good == max(count - dropped, 0)
    if count > dropped:
        assert (report.first_n, report.last_n) == (dropped + 1, count)
        assert report.head is not None
        assert report.head[1:] == head_of(lines[-1])
    begins_later = [one.kind for one in report.findings] == ["begins-later"]
    assert begins_later == (0 < dropped < count)


def flipped(lines: list[bytes], at: int, with_: int) -> list[bytes]:
    content = bytearray(b"".join(lines))
    content[at % len(content)] ^= 1 + with_ % 255
    return [bytes(content)]


def byte_gone(lines: list[bytes], at: int, _: int) -> list[bytes]:
    content = b"".join(lines)
    at %= len(content) - 1  # the last line's end is no loss
    return [content[:at] + content[at + 1 :]]


def byte_put_in(lines: list[bytes], at: int, with_: int) -> list[bytes]:
    content = b"".join(lines)
    at %= len(content)
    return [content[:at] + bytes((with_ % 256,)) + content[at:]]


def line_gone(lines: list[bytes], at: int, _: int) -> list[bytes]:
    at %= len(lines)
    return lines[:at] + lines[at + 1 :]


def lines_swapped(lines: list[bytes], at: int, with_: int) -> list[bytes]:
    first, second = at % len(lines), (at + 1 + with_ % (len(lines) - 1)) % len(lines)
    swapped = list(lines)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    return swapped


def line_again(lines: list[bytes], at: int, with_: int) -> list[bytes]:
    to = with_ % (len(lines) + 1)
    return [*lines[:to], lines[at % len(lines)], *lines[to:]]


def line_put_in(lines: list[bytes], at: int, with_: int) -> list[bytes]:
    new = [record(9), b"\n", b"{\n", b"\x00\xff\n", OTHER[at % 8], b"x" * 3000 + b"\n"][with_ % 6]
    at %= len(lines)
    return [*lines[:at], new, *lines[at:]]


def spliced(lines: list[bytes], at: int, with_: int) -> list[bytes]:
    return [*lines[: 1 + at % 7], *OTHER[with_ % 8 :]]


def written_anew(lines: list[bytes], at: int, _: int) -> list[bytes]:
    """By somebody who knows the chain's rule, but for the lines behind it."""
    at %= len(lines) - 1
    link = link_of(lines[at])
    assert link is not None
    ahead = link.head._replace(n=link.n - 1, hash=link.prev)
    return [*lines[:at], chained(record(99), ahead)[0], *lines[at + 1 :]]


Change = Callable[[list[bytes], int, int], list[bytes]]
CHANGES: list[Change] = [
    flipped, byte_gone, byte_put_in, line_gone, lines_swapped, line_again, line_put_in, spliced,
    written_anew,
]  # fmt: skip


@KEYS
@pytest.mark.parametrize("change", CHANGES)
@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 1 << 20), with_=st.integers(0, 1 << 20))
def test_any_change_to_a_log_whose_head_is_known_is_a_fault_or_its_first_line_is_gone(
    change: Change, key: SealingKey | None, at: int, with_: int
) -> None:
    lines = whole(key)
    changed = change(lines, at, with_)

    if b"".join(changed) != b"".join(lines):
        report = check(changed, key=key, anchor=head_of(lines[-1]))
        assert report.num_faults > 0 or (changed == lines[1:] and report.first_n == 2)


@KEYS
@pytest.mark.parametrize("change", CHANGES)
@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 1 << 20), with_=st.integers(0, 1 << 20))
def test_without_a_known_head_only_what_looks_like_an_older_or_a_cut_log_is_none(
    change: Change, key: SealingKey | None, at: int, with_: int
) -> None:
    lines = whole(key)
    changed = b"".join(change(lines, at, with_))
    report = check([changed], key=key)

    if report.num_faults == 0:
        kept = [one for one in changed.splitlines(keepends=True) if link_of(one)]
        assert kept in ([*lines[1:]], [*lines[:-1]], lines)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([*PLAIN[:2], PLAIN[2].replace(b"xx", b"xy"), *PLAIN[3:]], ["file-0:3 changed"]),
        ([*PLAIN[:2], PLAIN[2].replace(b"xx", b"x"), *PLAIN[3:]], ["file-0:3 changed"]),
        ([*PLAIN[:2], *PLAIN[5:]], ["file-0:3 missing"]),
        ([*PLAIN[:2], PLAIN[3], PLAIN[2], *PLAIN[4:]], ["file-0:4 order"]),
        ([*PLAIN[:3], *PLAIN[2:]], ["file-0:4 repeated"]),
        ([*PLAIN[:3], *OTHER[3:]], ["file-0:4 spliced"]),
        ([*PLAIN[:3], OTHER[0], *PLAIN[3:]], ["file-0:4 spliced", "file-0:5 spliced"]),
        ([*PLAIN[:3], record(5), record(6), *PLAIN[3:]], ["file-0:4 unchained"]),
        ([*PLAIN[:3], b"{\n", *PLAIN[3:]], ["file-0:4 inserted"]),
        (
            [*PLAIN[:3], b'{"a":' + b"[" * 9000 + b"]" * 9000 + b"}\n", *PLAIN[3:]],
            ["file-0:4 inserted"],
        ),
        ([*PLAIN[:3], b"{", *PLAIN[3:]], ["file-0:4 changed"]),
        ([*PLAIN[:3], PLAIN[3][:-1], *PLAIN[4:]], ["file-0:4 changed", "file-0:5 missing"]),
        ([*PLAIN[:3], PLAIN[3][1:], *PLAIN[4:]], ["file-0:4 inserted", "file-0:5 missing"]),
        ([*PLAIN, record(7)], ["file-0:9 unchained"]),
        ([*PLAIN, b"what is this\n"], ["file-0:9 inserted"]),
        (written_anew(PLAIN, 3, 0), ["file-0:5 replaced"]),
        ([record(1), record(2)], ["file-0:1 unchained"]),
        ([chained(record(1), new_log()._replace(hash="1" * 64))[0]], ["file-0:1 replaced"]),
    ],
)
def test_a_fault_is_named_by_what_was_done_and_where(lines: list[bytes], found: list[str]) -> None:
    report = check(lines)

    assert told(report) == found
    assert report.num_faults == len(found)


def test_places_are_those_of_the_files_that_were_read() -> None:
    report = check(PLAIN[:3], PLAIN[4:6], [*PLAIN[6:7], b"{}\n"])

    assert [str(one) for one in report.findings] == [
        "file-1:1: line n=4 is missing ahead of this one",
        "file-2:2: has no place in the chain: written without, or put in",
    ]
    assert report.num_good == 6


@pytest.mark.parametrize("cut", [1, 5, 20, 100, len(PLAIN[-1]) - 2])
def test_a_last_line_that_is_cut_short_is_a_notice_and_with_a_known_head_a_fault(cut: int) -> None:
    lines = [*PLAIN[:-1], PLAIN[-1][:cut]]

    assert told(check(lines)) == ["file-0:8 torn"]
    assert check(lines).num_faults == 0
    assert check(lines).num_good == 7
    assert told(check(lines, anchor=head_of(PLAIN[-1]))) == ["file-0:8 head", "file-0:8 torn"]


def test_every_line_that_a_crash_can_leave_at_the_end_is_a_notice() -> None:
    for lines, key in ((PLAIN, None), (SEALED, KEY)):
        for length in range(1, len(lines[-1])):
            assert told(check([*lines[:-1], lines[-1][:length]], key=key)) == ["file-0:8 torn"], length
    assert told(check([*PLAIN, b'{"a":"b\0\0\0\0'])) == ["file-0:9 torn"]
    assert told(check([*PLAIN, b"\0\0\0\0\n"])) == ["file-0:9 torn"]


@KEYS
def test_a_damaged_last_line_is_not_taken_for_one_that_is_cut_short(key: SealingKey | None) -> None:
    lines = whole(key)
    for at in range(len(lines[-1])):
        damaged = bytearray(lines[-1])
        damaged[at] ^= 4
        assert check([*lines[:-1], bytes(damaged)], key=key).num_faults > 0, bytes(damaged)


def test_a_line_that_was_cut_and_repaired_is_a_notice_only_where_the_next_line_knows_it() -> None:
    link = link_of(PLAIN[2])
    assert link is not None
    torn = b'{"decision_id":"4","te\n'
    line, head = chained(record(4), link.head, torn)
    behind = lines_of(2, head=head)
    good = [*PLAIN[:3], torn, line, *behind]

    assert told(check(good)) == ["file-0:4 torn"]
    assert check(good).num_good == 6
    assert told(check([*PLAIN[:3], torn.replace(b"4", b"5"), line])) == ["file-0:4 inserted"]
    assert told(check([*PLAIN[:3], torn, torn, line])) == ["file-0:4 inserted"]
    assert told(check([*PLAIN[:3], line])) == ["file-0:4 missing"]
    assert told(check([line, *behind])) == ["file-0:1 begins-later"]  # it may be in a file that is gone


@pytest.mark.parametrize(
    ("lines", "anchor", "found"),
    [
        (PLAIN, head_of(PLAIN[0]), []),
        (PLAIN, head_of(PLAIN[-1]), []),
        (PLAIN[:5], head_of(PLAIN[5]), ["file-0:5 head"]),
        ([], head_of(PLAIN[5]), ["file-0:1 head"]),
        (PLAIN, head_of(OTHER[4]), ["file-0:5 head"]),
        (PLAIN[4:], head_of(PLAIN[3]), ["file-0:1 begins-later"]),
        (PLAIN[4:], head_of(OTHER[3]), ["file-0:1 begins-later", "file-0:4 head"]),
        (PLAIN[4:], head_of(PLAIN[2]), ["file-0:1 begins-later", "file-0:4 not-compared"]),
        ([*PLAIN[:3], *PLAIN[4:]], head_of(PLAIN[3]), ["file-0:4 missing", "file-0:7 head"]),
    ],
)
def test_a_log_holds_a_head_that_was_kept_elsewhere_or_begins_behind_it(
    lines: list[bytes], anchor: Anchor, found: list[str]
) -> None:
    assert told(check(lines, anchor=anchor)) == found


def test_who_has_no_key_forges_no_seal() -> None:
    """Nor does who has a later one."""
    link = link_of(SEALED[3])
    assert link is not None
    ahead = link.head._replace(n=link.n - 1, hash=link.prev)
    later = KEY.behind(link.head)
    forged = chained(record(99), ahead, seal=later.seal)[0]
    unsealed = chained(record(99), ahead)[0]

    assert told(check([*SEALED[:3], forged], key=KEY)) == ["file-0:4 forged"]
    assert told(check([*SEALED[:3], unsealed], key=KEY)) == ["file-0:4 unsealed"]
    assert told(check(OTHER, key=KEY)) == ["file-0:1 forged"]
    assert check(OTHER, key=KEY).num_good == 0
    rewritten = lines_of(8, head=KEY.head)
    assert check(rewritten, key=KEY).num_faults == 8
    assert check(rewritten).num_faults == 0, "a chain without a key can be written anew"


def test_a_line_behind_a_gap_is_still_proved_by_its_seal() -> None:
    lines = [*SEALED[:2], *SEALED[5:]]

    assert told(check(lines, key=KEY)) == ["file-0:3 missing"]
    lines[2] = lines[2].replace(b'"decision_id":"5"', b'"decision_id":"6"')
    assert check(lines, key=KEY).num_faults == 2


def test_a_sealed_log_is_checked_without_its_key_as_one_that_has_none() -> None:
    assert told(check(SEALED)) == ["file-0:1 sealed"]
    assert check(SEALED).num_faults == 0
    assert check(SEALED).num_good == 8


def test_a_number_out_of_all_reason_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seals, "MAX_KEY_STEPS", 100)
    far = KEY.head._replace(n=10**14)
    line, _ = chained(record(1), far, seal=KEY.seal)

    assert told(check([*SEALED, line], key=KEY)) == ["file-0:9 forged", "file-0:9 missing"]


def test_a_line_longer_than_any_decision_is_a_fault_and_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log_check, "MAX_LINE_BYTES", 1000)
    long = b"{" + b"x" * 5000 + b"\n"

    assert told(check([*PLAIN[:3], long, *PLAIN[3:]])) == ["file-0:4 inserted", "file-0:4 too-long"]
    assert check([*PLAIN[:3], long, *PLAIN[3:]]).num_good == 8
    assert check([*PLAIN[:3], long[:-1]]).num_faults == 2


def test_of_many_faults_all_are_counted_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "MAX_FINDINGS", 5)
    monkeypatch.setattr(log_check, "MAX_FINDINGS", 5)
    lines = lines_of(60)[::3]
    report = check(lines)

    assert len(report.findings) == 5
    assert report.num_faults == 19
    assert report.num_good == 20


def test_an_empty_log_is_good_and_has_no_head() -> None:
    assert check([]) == ((), 0, 0, 0, 0, 0, None)
    assert NO_HASH == "0" * 64
