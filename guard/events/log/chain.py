"""What makes changes to the decision log show: each line ends in its place in a chain of hashes.

    {"decision_id":…,"model":"m","chain":{"log":"4f…","n":7,"prev":"c0…","hash":"9a…"}}

log: 128 random bits, in hex, of the log that the line belongs to
n: 1, 2, 3 …
prev: the hash of line n - 1; of the first line 64 zeros
torn: only behind a line that a crash cut short: SHA-256 of all bytes between line n - 1 and this one
hash: SHA-256 of the line's bytes up to and with the quote in front of this hash
seal: only in a log with a key: HMAC-SHA-256 of the line's bytes up to and with the quote in front of
    this seal; see `log_key`

These are the last bytes of a line, without spaces and in this order, so a reader in any language checks
bytes and never writes JSON anew.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable
from typing import Final, NamedTuple

MAX_LINE_BYTES: Final = 16 << 20
"""No decision comes near it."""

NO_HASH: Final = "0" * 64

_HEX: Final = rb'"([0-9a-f]{64})"'
_PLACE: Final = re.compile(
    rb',"chain":\{"log":"([0-9a-f]{32})","n":([1-9][0-9]{0,14}),"prev":'
    + _HEX
    + rb'(?:,"torn":'
    + _HEX
    + rb')?,"hash":'
    + _HEX
    + rb'(?:,"seal":'
    + _HEX
    + rb")?\}\}\n"
)
_MAX_PLACE_BYTES: Final = 420

MakeSeal = Callable[[bytes], str]
"""The seal of a line's bytes ahead of it."""


class Head(NamedTuple):
    """Where a chain has got to: its log, and number and hash of its last line."""

    log: str
    n: int
    hash: str


class Link(NamedTuple):
    """A line's place in the chain, as the line says it.

    hashed, sealed: so many of the line's bytes its hash and its seal are of
    """

    log: str
    n: int
    prev: str
    torn: str | None
    hash: str
    seal: str | None
    hashed: int
    sealed: int

    @property
    def head(self) -> Head:
        return Head(self.log, self.n, self.hash)


def new_log() -> Head:
    """Ahead of the first line of a log that there was not before."""
    return Head(secrets.token_hex(16), 0, NO_HASH)


def chained(
    record: bytes, head: Head, torn: bytes = b"", seal: MakeSeal | None = None
) -> tuple[bytes, Head]:
    """The line behind `head` for a line that has no place in the chain yet; and that place.

    torn: what stands between the two
    """
    torn_part = f',"torn":"{sha256(torn)}"' if torn else ""
    place = f',"chain":{{"log":"{head.log}","n":{head.n + 1},"prev":"{head.hash}"{torn_part},"hash":"'
    line = record.removesuffix(b"}\n") + place.encode()
    digest = sha256(line)
    line += digest.encode() + b'"'
    if seal is not None:
        line += b',"seal":"'
        line += seal(line).encode() + b'"'
    return line + b"}}\n", Head(head.log, head.n + 1, digest)


def link_of(line: bytes) -> Link | None:
    """None where a line, with its end, has no place in a chain."""
    match = _PLACE.search(line, max(0, len(line) - _MAX_PLACE_BYTES))
    if match is None or match.end() != len(line) or not line.startswith(b"{"):
        return None
    log, n, prev, torn, digest, seal = match.groups()
    return Link(
        log=log.decode(),
        n=int(n),
        prev=prev.decode(),
        torn=None if torn is None else torn.decode(),
        hash=digest.decode(),
        seal=None if seal is None else seal.decode(),
        hashed=match.start(5),
        sealed=match.start(6),
    )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
