"""Byte strings that are almost valid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")

_ODD = (
    b"\0",
    b"\xff",
    b"\xff" * 8,
    b"\x7f\xff\xff\xff",
    b"\n",
    b'"',
    b"{",
    b"[" * 3000,
    b"9" * 400,
    b"-1",
)


class Edit(NamedTuple):
    """place: share of the way through the sample; copied: place and number of bytes to insert of it"""

    place: float
    removed: int
    inserted: bytes
    copied: tuple[float, int]


def edits(words: Sequence[bytes] = ()) -> st.SearchStrategy[Edit]:
    """words: of the format, some of which are put in"""
    odd = st.sampled_from([*_ODD, *words])
    return st.builds(
        Edit,
        st.floats(0, 1),
        st.sampled_from([0, 1, 1, 2, 4, 16, 300]),
        st.one_of(st.just(b""), st.binary(min_size=1, max_size=4), odd),
        st.tuples(st.floats(0, 1), st.sampled_from([0, 0, 0, 1, 8, 64])),
    )


def edited(sample: bytes, changes: Sequence[Edit]) -> bytes:
    content = bytearray(sample)
    for edit in changes:
        place = int(edit.place * len(content))
        start = int(edit.copied[0] * len(sample))
        content[place : place + edit.removed] = edit.inserted + sample[start : start + edit.copied[1]]
    return bytes(content)


def mutated(
    samples: Sequence[bytes], words: Sequence[bytes] = (), most: int = 3
) -> st.SearchStrategy[bytes]:
    """The samples, with some edits or none."""
    return st.builds(edited, st.sampled_from(samples), st.lists(edits(words), max_size=most))


def mostly(valid: st.SearchStrategy[T], other: st.SearchStrategy[T]) -> st.SearchStrategy[T]:
    """One of sixteen is the other."""
    return st.integers(0, 15).flatmap(lambda number: other if number == 15 else valid)


JSON_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from([10**400, 2**63, -(2**63) - 1, 2**31, -1, 0, "", "\ud800", "\x1b[2J", "0", "1-9"]),
)
JSON = st.recursive(
    JSON_SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
