"""A program that starts one engine after another: each must show its own guard."""

from __future__ import annotations

import pytest
from guard_vllm import client
from guard_vllm.settings import Settings
from prometheus_client import CollectorRegistry

from guard.errors import NotLiveError
from guard.events.message import Hello, encode

pytestmark = pytest.mark.vllm


def test_that_an_earlier_engine_was_guarded_says_nothing_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "_buses", [])
    monkeypatch.setattr(client, "_receive_messages", lambda: None)
    monkeypatch.setattr(client, "REGISTRY", CollectorRegistry())
    settings = Settings(policies="nowhere")
    hello = Hello(
        engine=0,
        revision="r",
        policies=(),
        rules=(),
        sets=(),
        masked_experts={},
        blind_layers=0,
        live=True,
    )
    first = client.open_bus(settings, "tiny")
    client.deliver(encode(hello))
    client.require_hello(first, timeout_s=0)
    second = client.open_bus(settings, "tiny")
    with pytest.raises(NotLiveError):
        client.require_hello(second, timeout_s=0)
    client.deliver(encode(hello))
    client.require_hello(second, timeout_s=0)
