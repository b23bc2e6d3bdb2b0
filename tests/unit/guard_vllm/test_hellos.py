"""What a front end must hear before it serves: every engine of its own, all under the same policies."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest
from guard_vllm import client
from guard_vllm.settings import Settings
from prometheus_client import CollectorRegistry

from guard.errors import NotLiveError
from guard.events.bus import EventBus
from guard.events.message import Hello, encode

HELLO = Hello(
    engine=0,
    revision="r",
    policies=(),
    rules=(),
    sets=(),
    masked_experts={},
    blind_layers=0,
    live=True,
)


@pytest.fixture(autouse=True)
def in_a_program_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_buses", [])
    monkeypatch.setattr(client, "_receive_messages", lambda: None)
    monkeypatch.setattr(client, "REGISTRY", CollectorRegistry())


def open_bus() -> EventBus:
    return client.open_bus(Settings(policies="nowhere"), "tiny")


def test_that_an_earlier_engine_was_guarded_says_nothing_of_the_next() -> None:
    first = open_bus()
    client.deliver(encode(HELLO))
    client.require_hellos(first, 1, timeout_s=0)
    second = open_bus()
    with pytest.raises(NotLiveError):
        client.require_hellos(second, 1, timeout_s=0)
    client.deliver(encode(HELLO))
    client.require_hellos(second, 1, timeout_s=0)


def test_every_engine_of_a_client_must_greet() -> None:
    bus = open_bus()
    two = client.num_engines(SimpleNamespace(engine_ranks_managed=[0, 1]))
    client.deliver(encode(HELLO))
    with pytest.raises(NotLiveError, match=r"of 2 engines not all .* did: 0"):
        client.require_hellos(bus, two, timeout_s=0)
    client.deliver(encode(msgspec.structs.replace(HELLO, engine=1)))
    client.require_hellos(bus, two, timeout_s=0)


def test_an_engine_in_the_programs_own_process_is_one() -> None:
    assert client.num_engines(SimpleNamespace()) == 1


def test_engines_of_different_policies_do_not_serve() -> None:
    bus = open_bus()
    client.deliver(encode(HELLO))
    client.deliver(encode(msgspec.structs.replace(HELLO, engine=1, revision="s")))
    with pytest.raises(NotLiveError, match="engine 1 has policy revision s, but engine 0 has r"):
        client.require_hellos(bus, 2, timeout_s=0)
