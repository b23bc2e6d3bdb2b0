"""Whether a decision log is as it was written: reads its lines once, in order, and keeps none."""

from __future__ import annotations

from typing import BinaryIO, NamedTuple

from guard.events.log.anchor import Anchor, Anchoring
from guard.events.log.chain import MAX_LINE_BYTES, NO_HASH, Head, Link, link_of, sha256
from guard.events.log.findings import MAX_FINDINGS, Findings, Kind, LogFinding, Place
from guard.events.log.key import SealingKey
from guard.events.log.loose import Loose, LooseLines
from guard.events.log.seals import Seals


class Report(NamedTuple):
    """findings: by place, `MAX_FINDINGS` at most
    num_good: lines that are as they were written, and where they were
    first_n: 0 where no line has a place in a chain
    head: to keep elsewhere; None where the last line is not good
    """

    findings: tuple[LogFinding, ...]
    num_faults: int
    num_notices: int
    num_good: int
    first_n: int
    last_n: int
    head: Head | None


class _Gap(NamedTuple):
    """Numbers that are missing ahead of a place, unless they come behind it."""

    first: int
    last: int
    place: Place


class LogCheck:
    """Takes files, the oldest first; `report` ends it.

    key: the first of a sealed log; or seals are not looked at
    anchor: what the log must hold, or begin behind
    """

    def __init__(self, key: SealingKey | None = None, anchor: Anchor | None = None) -> None:
        self._findings = Findings()
        self._num_good = 0
        self._num_files = 0
        self._loose = LooseLines()
        self._first: Link | None = None
        self._place = Place(0, 1, "")  # of the line that is being read
        self._log = ""  # that lines are of now
        self._heads: dict[str, Head] = {}  # by log; a hash is "" behind a line that was changed
        self._gaps: dict[str, list[_Gap]] = {}  # by log
        self._seals = Seals(key, self._findings)
        self._anchor = None if anchor is None else Anchoring(anchor)

    def read(self, name: str, file: BinaryIO) -> None:
        """Raises OSError."""
        number = 0
        self._place = Place(self._num_files, 1, name)
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            self._place = Place(self._num_files, number, name)
            is_ended = line.endswith(b"\n")
            if not is_ended and len(line) == MAX_LINE_BYTES:
                self._skip(line, file)
                continue
            whole = line if is_ended else line + b"\n"
            link = link_of(whole)
            if link is None:
                self._loose.take(line, self._place)
                continue
            if not is_ended:
                self._find(Kind.TORN, "lacks nothing but its end")
            self._take(whole, link)
        self._num_files += 1

    def report(self) -> Report:
        for run in self._loose.runs:  # no line behind them says what they are
            self._find_loose(run, is_cut=run.is_start)
        for gaps in self._gaps.values():
            for gap in gaps:
                self._find_missing(gap)
        last = self._heads.get(self._log)
        if self._anchor is not None:
            self._anchor.compare(self._first, last, self._place, self._findings)
        return Report(
            findings=self._findings.by_place(),
            num_faults=self._findings.num_faults,
            num_notices=self._findings.num_notices,
            num_good=self._num_good,
            first_n=0 if self._first is None else self._first.n,
            last_n=0 if last is None else last.n,
            head=last if last is not None and last.hash else None,
        )

    def _find(self, kind: Kind, message: str) -> None:
        self._findings.add(self._place, kind, message)

    def _skip(self, start: bytes, file: BinaryIO) -> None:
        self._find(Kind.TOO_LONG, f"is longer than {MAX_LINE_BYTES >> 20} MiB, as no decision is")
        self._loose.take(start, self._place)
        while part := file.readline(MAX_LINE_BYTES):
            self._loose.take_more(part)
            if part.endswith(b"\n"):
                return

    def _take(self, line: bytes, link: Link) -> None:
        self._close_loose(link)
        if sha256(line[: link.hashed]) != link.hash:
            self._find(Kind.CHANGED, "was changed: its hash is of other bytes")
            self._pass_changed(link)
            return
        if self._anchor is not None:
            self._anchor.meet(link, self._place)
        num_faults = self._findings.num_faults
        head = self._head_ahead_of(link)
        is_in_place = self._findings.num_faults == num_faults
        if link.n <= head.n:
            self._find_late(link)
            return
        if link.n > head.n + 1:
            self._open_gap(link.log, _Gap(head.n + 1, link.n - 1, self._place))
        elif head.hash not in ("", link.prev):
            self._find(Kind.REPLACED, f"n={link.n} was not written behind this line n={head.n}")
            is_in_place = False
        self._heads[link.log] = link.head
        is_sealed = self._seals.holds(line, link, self._place)
        self._num_good += is_in_place and is_sealed

    def _head_ahead_of(self, link: Link) -> Head:
        """The last line of its log; of a log that is new here, what the line itself says."""
        if self._first is None:
            self._first = link
            self._log = link.log
            if link.n > 1:
                self._find(Kind.BEGINS_LATER, f"begins with n={link.n}: what was before is not here")
        if link.log != self._log:
            what = "goes on" if link.log in self._heads else "begins"
            self._find(Kind.SPLICED, f"another log {what} here, {link.log} behind {self._log}")
            self._log = link.log
        known = self._heads.get(link.log)
        if known is not None:
            return known
        if len(self._heads) >= MAX_FINDINGS:
            del self._heads[next(iter(self._heads))]
        if link.n == 1 and link.prev != NO_HASH:
            self._find(Kind.REPLACED, "says n=1, and was written behind another line")
        return Head(link.log, link.n - 1, link.prev)

    def _pass_changed(self, link: Link) -> None:
        """What such a line says of its place is not believed: it is taken for the one expected."""
        if self._first is None:
            self._first = link
            self._log = link.log
            self._heads[link.log] = link.head._replace(hash="")
        else:
            head = self._heads[self._log]
            self._heads[self._log] = Head(head.log, head.n + 1, "")

    def _find_late(self, link: Link) -> None:
        gaps = self._gaps.get(link.log, [])
        for number, gap in enumerate(gaps):
            if gap.first <= link.n <= gap.last:
                rest = (gap._replace(last=link.n - 1), gap._replace(first=link.n + 1))
                gaps[number : number + 1] = [one for one in rest if one.first <= one.last]
                last = self._heads[link.log].n
                self._find(Kind.ORDER, f"n={link.n} stands behind n={last}: the order was changed")
                return
        self._find(Kind.REPEATED, f"n={link.n} stands here again")

    def _open_gap(self, log: str, gap: _Gap) -> None:
        gaps = self._gaps.setdefault(log, [])
        if len(gaps) < MAX_FINDINGS:
            gaps.append(gap)
        else:
            self._find_missing(gap)

    def _find_missing(self, gap: _Gap) -> None:
        if gap.first == gap.last:
            what = f"line n={gap.first} is"
        else:
            what = f"lines n={gap.first} to n={gap.last} are"
        self._findings.add(gap.place, Kind.MISSING, f"{what} missing ahead of this one")

    def _close_loose(self, link: Link) -> None:
        """The lines without a place ahead of one that has its own, and says whether it knows them."""
        if not self._loose.runs:
            if link.torn is not None and self._first is not None:
                self._find(
                    Kind.MISSING, "ahead of this one stood a line that was cut short; it is gone"
                )
            return
        is_known = link.torn == self._loose.hexdigest()
        for run in self._loose.runs:
            self._find_loose(run, is_cut=is_known)
        self._loose = LooseLines()

    def _find_loose(self, run: Loose, *, is_cut: bool) -> None:
        more = "" if run.num_lines == 1 else f"and {run.num_lines - 1} more: "
        if run.is_whole:
            kind, what = Kind.UNCHAINED, "has no place in the chain: written without, or put in"
        elif is_cut:
            kind, what = Kind.TORN, "was cut short, as by a crash"
        else:
            kind, what = Kind.INSERTED, "is no line of the log: changed, or put in"
        self._findings.add(run.first, kind, more + what)
