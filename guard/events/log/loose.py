"""Lines of a decision log without a place in its chain: cut short, put in, or older than the chain."""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

import msgspec

from guard.events.log.findings import MAX_FINDINGS, Place


class Loose(NamedTuple):
    """Such lines of one kind, one behind the other.

    is_whole: each is JSON, so no crash cut it short
    is_start: each is how a line of a chain may begin
    """

    first: Place
    num_lines: int
    is_whole: bool
    is_start: bool


class LooseLines:
    """Those between two lines of a chain."""

    def __init__(self) -> None:
        self.runs: list[Loose] = []
        self._digest = hashlib.sha256()

    def take(self, line: bytes, place: Place) -> None:
        self.take_more(line)
        is_whole, is_start = _kind_of(line)
        last = self.runs[-1] if self.runs else None
        if last is not None and (
            (last.is_whole, last.is_start, last.first.file_no) == (is_whole, is_start, place.file_no)
            or len(self.runs) >= MAX_FINDINGS
        ):
            self.runs[-1] = last._replace(num_lines=last.num_lines + 1)
        else:
            self.runs.append(Loose(place, 1, is_whole, is_start))

    def take_more(self, part: bytes) -> None:
        """Of a line that is too long to be kept."""
        self._digest.update(part)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _kind_of(line: bytes) -> tuple[bool, bool]:
    body = line.removesuffix(b"\n").rstrip(b"\0")  # a power cut may leave zeros at the end
    if not body:
        return False, len(line) > 1
    return (True, False) if is_json(body) else (False, _is_start(body))


def is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _is_start(body: bytes) -> bool:
    if not body.startswith(b"{") or not _lacks_its_end(body):
        return False
    _, chain, place = body.rpartition(b',"chain":{')
    return not chain or any(_begins_like(place, one) for one in _PLACES)


def _lacks_its_end(body: bytes) -> bool:
    """Whether it is JSON as far as it goes. A number may be cut where only a digit can follow."""
    return any(_is_truncated(body + more) for more in (b"", b"0"))


def _is_truncated(body: bytes) -> bool:
    try:
        msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        return "truncated" in str(error)
    except RecursionError:
        return False
    return False


# `x` stands for a hex digit, `9` for a decimal one.
_HASH: Final = f'"{"x" * 64}"'
_PLACES: Final = tuple(
    f'"log":"{"x" * 32}","n":{"9" * digits},"prev":{_HASH}{torn},"hash":{_HASH}{seal}}}}}'.encode()
    for digits in range(1, 16)
    for torn in ("", f',"torn":{_HASH}')
    for seal in ("", f',"seal":{_HASH}')
)
_STANDS_FOR: Final = {ord("x"): b"0123456789abcdef", ord("9"): b"0123456789"}


def _begins_like(place: bytes, whole: bytes) -> bool:
    return all(
        byte in _STANDS_FOR.get(shape, bytes((shape,)))
        for byte, shape in zip(place, whole, strict=False)
    )
