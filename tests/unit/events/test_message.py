"""What travels between processes comes back as it was, and nothing else is taken."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.events.message import DecisionCount, Delta, decode, encode
from guard.failures import Stage
from tests.unit.events.reports import HELLO, decision

DELTA = Delta(
    3,
    "rev-1",
    decisions=[decision()],
    decision_counts=[DecisionCount(1, "audit", "prompt", 4)],
    outcomes={"passed": 2},
    tokens={"prompt": 5, "output": 1},
    selections=[1, 2],
    values=[(1, 0, [0.5, -1.0])],
    masked_requests={"p": 1},
    dropped={"decision_log": 1},
    failures={"evaluate": 2},
)


@pytest.mark.parametrize("message", [HELLO, DELTA, Delta(0, revision="rev-1")])
def test_a_message_comes_back_as_it_was(message: Delta) -> None:
    assert decode(encode(message)) == message


def test_stages_travel_as_their_words() -> None:
    decoded = decode(encode(Delta(0, revision="rev-1", failures={Stage.EVALUATE: 1})))

    assert isinstance(decoded, Delta)
    assert decoded.failures == {"evaluate": 1}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        encode(DELTA)[:-1],
        encode(DELTA) + b"\x00",
        msgspec.msgpack.encode({"type": "delta"}),
        msgspec.msgpack.encode({"type": "other", "engine": 0}),
        msgspec.msgpack.encode({"type": "delta", "engine": "0"}),
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(data)


@given(st.binary(max_size=64))
def test_no_bytes_do_worse_than_be_refused(data: bytes) -> None:
    try:
        decode(data)
    except msgspec.DecodeError:
        return
