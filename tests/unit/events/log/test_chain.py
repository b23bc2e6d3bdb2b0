"""The chain's bytes, as docs/events.md promises them to readers in other languages."""

from __future__ import annotations

import hashlib
import hmac
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.events.log.chain import NO_HASH, Head, chained, link_of, new_log
from guard.events.log.key import SealingKey
from tests.unit.events.log.chains import lines_of, record

LOG = "0123456789abcdef" * 2


def test_a_line_is_written_so_for_good() -> None:
    line, head = chained(b'{"a":"b"}\n', Head(LOG, 0, NO_HASH))

    assert line == (
        b'{"a":"b","chain":{"log":"0123456789abcdef0123456789abcdef","n":1,"prev":"'
        + b"0" * 64
        + b'","hash":"49826b6a74d82a0c039bb766c48e578b55f4a7fa518e7d522381c47a73c62a83"}}\n'
    )
    assert head == Head(LOG, 1, line[-68:-4].decode())


def test_a_reader_needs_the_bytes_ahead_of_the_hash_and_no_more() -> None:
    previous = "0" * 64
    for number, line in enumerate(lines_of(5), start=1):
        ahead, digest = line[:-68], line[-68:-4].decode()
        said = json.loads(line)["chain"]

        assert line[-4:] == b'"}}\n'
        assert hashlib.sha256(ahead).hexdigest() == digest == said["hash"]
        assert (said["n"], said["prev"]) == (number, previous)
        previous = digest


def test_a_reader_makes_keys_one_after_another_from_the_first() -> None:
    first = SealingKey.new()
    key = first.key
    for line in lines_of(5, first):
        assert hmac.digest(key, line[:-68], "sha256").hex().encode() == line[-68:-4]
        ahead, _, rest = line.rpartition(b'","seal":"')
        assert len(rest) == 68
        assert hashlib.sha256(ahead[:-64]).hexdigest().encode() == ahead[-64:]
        key = hmac.digest(key, b"next key", "sha256")


def test_what_was_torn_is_hashed_into_the_line_behind_it() -> None:
    torn = b'{"cut\n'
    line, _ = chained(record(1), new_log(), torn)

    assert json.loads(line)["chain"]["torn"] == hashlib.sha256(torn).hexdigest()
    link = link_of(line)
    assert link is not None
    assert link.torn == hashlib.sha256(torn).hexdigest()


@given(text=st.text(max_size=60), n=st.integers(0, 10**14), sealed=st.booleans(), torn=st.binary())
def test_a_place_is_read_as_it_was_written_whatever_the_line_says(
    text: str, n: int, sealed: bool, torn: bytes
) -> None:
    ahead = Head(LOG, n, "f" * 64)
    seal = SealingKey.new().seal if sealed else None
    line, head = chained(json.dumps({"a": text}).encode() + b"\n", ahead, torn, seal)

    link = link_of(line)
    assert link is not None
    assert (link.head, link.prev) == (head, "f" * 64)
    assert (link.seal is not None, link.torn is not None) == (sealed, bool(torn))
    assert json.loads(line)["a"] == text


@pytest.mark.parametrize(
    "wrong",
    [
        lambda line: line[:-1],
        lambda line: line + b"\n",
        lambda line: b" " + line,
        lambda line: line.replace(b'"n":1', b'"n":01'),
        lambda line: line.replace(b'"n":1', b'"n": 1'),
        lambda line: line.replace(b'"n":1', b'"n":' + b"9" * 16),
        lambda line: line[:-5] + b'F"}}\n',
        lambda line: line.replace(b"hash", b"hush"),
    ],
)
def test_what_is_written_otherwise_has_no_place(wrong: object) -> None:
    (line,) = lines_of(1)
    assert link_of(line) is not None
    assert link_of(wrong(line)) is None  # type: ignore[operator]
