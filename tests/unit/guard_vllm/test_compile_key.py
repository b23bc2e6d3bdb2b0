"""A graph compiled without the guard is never run with it, nor the reverse: vLLM's compile key.

Content of the policies is not in the key: it is in buffers that the graph reads, not in the graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from guard_vllm.settings import CONFIG_KEY, FORMAT, POLICIES_VARIABLE, Settings
from vllm.config import VllmConfig

ARMED = Settings(policies="policies").resolved(mask_words=1)


def key(settings: Settings | None) -> Any:
    section = {} if settings is None else {CONFIG_KEY: settings.as_section()}
    return VllmConfig(additional_config=section).compute_hash()


def test_servers_whose_graphs_differ_have_different_keys() -> None:
    servers = [
        None,
        ARMED,
        ARMED.resolved(mask_words=2),
        replace(ARMED, format=FORMAT + 1),
        replace(ARMED, kernels="C++"),
        replace(ARMED, observe_only=True).resolved(mask_words=1),
    ]
    keys = [key(settings) for settings in servers]
    assert len(set(keys)) == len(servers)


def test_servers_whose_graphs_are_the_same_share_a_key() -> None:
    assert key(ARMED) == key(Settings(policies="policies").resolved(mask_words=1))


def test_policies_named_by_the_environment_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POLICIES_VARIABLE, "policies")
    settings = Settings.of({})
    assert settings is not None
    assert key(settings.resolved(mask_words=1)) == key(ARMED) != key(None)
