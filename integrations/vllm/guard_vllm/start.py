"""What happens in the process that starts a server, and in its API servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from guard.policy.load import load_policies
from guard.program.compile import compile_policies
from guard.program.configuration import topology_from_config
from guard_vllm.client import open_bus, require_hello
from guard_vllm.host import check_host
from guard_vllm.settings import Settings


def resolve(config: Any, settings: Settings) -> Settings:
    """Check all that can be checked before a model is loaded.

    Raises PolicyError for policies that are wrong or do not fit the model, UnsupportedHostError for
    a server that cannot be guarded.
    """
    check_host(config)
    policies = load_policies(settings.policies)
    topology = topology_from_config(config.model_config.hf_config.to_dict())
    program = compile_policies(policies, topology)
    return settings.resolved(mask_words=program.masks.num_words)


def open_front_end(config: Any, settings: Settings) -> Callable[[Any], None]:
    """Prepare this process to receive the guard's messages and to show what it did to clients.

    Returns what is to be called once the engine's client is up: it waits for the engine's word.
    """
    served = config.model_config.served_model_name
    bus = open_bus(settings, served[0] if isinstance(served, list) else served)

    def greet(engine: Any) -> None:
        require_hello(bus)

    return greet
