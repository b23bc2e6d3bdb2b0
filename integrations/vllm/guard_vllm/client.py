"""The guard in API servers and in programs with an offline engine: receives messages, serves events."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from vllm.v1.engine import core_client

from guard.errors import NotLiveError
from guard.events.bus import EventBus
from guard.events.message import Decision
from guard.events.metrics import GuardMetrics
from guard_vllm.compat import seam
from guard_vllm.settings import Settings

logger = logging.getLogger(__name__)

MESSAGE_CALL_ID = -7_100
"""vLLM's own notifications have -1 and the like; calls count up from 0."""

HELLO_TIMEOUT_S = 30.0

_buses: list[EventBus] = []
_metrics: dict[str, GuardMetrics] = {}


def deliver(data: bytes) -> None:
    """A message from an engine reached this process."""
    for bus in _buses:
        bus.receive(data)


def open_bus(settings: Settings, model: str) -> EventBus:
    """This process's bus; one, however many engines a program starts after one another."""
    if not _buses:
        _receive_messages()
        path = None if settings.decision_log is None else Path(settings.decision_log)
        metrics = GuardMetrics(model, REGISTRY)
        key = None if settings.decision_log_key is None else Path(settings.decision_log_key)
        chain = settings.decision_log_chain
        _buses.append(EventBus(metrics, model, path, settings.log_limits, log_chain=chain, log_key=key))
    bus = _buses[0]
    bus.expect_hellos()
    return bus


def decisions() -> list[Decision]:
    """The latest decisions that reached this process, oldest first; for the offline `LLM`."""
    return [decision for bus in _buses for decision in bus.decisions]


def num_engines(engine_client: Any) -> int:
    """With how many engines vLLM's client speaks: several under data parallelism."""
    ranks = getattr(engine_client, "engine_ranks_managed", None)
    return 1 if ranks is None else len(ranks)  # an engine core in this very process has no ranks


def require_hellos(bus: EventBus, num_engines: int, timeout_s: float = HELLO_TIMEOUT_S) -> None:
    """Raises NotLiveError where not every engine says that its guard is up, with the same policies.

    vLLM only logs a plugin that fails to import, so an engine process can come up without one.
    """
    hellos = bus.wait_for_hellos(num_engines, timeout_s)
    if len(hellos) < num_engines:
        up = ", ".join(str(hello.engine) for hello in hellos) or "none"
        raise NotLiveError(
            f"of {num_engines} engines not all said that MoE Guard is live in them (these did: {up}); "
            "look for 'Failed to load plugin' in the others' logs, and mend the installation"
        )
    first = hellos[0]
    for hello in hellos[1:]:
        if hello.revision != first.revision:
            raise NotLiveError(
                f"engine {hello.engine} has policy revision {hello.revision}, but engine "
                f"{first.engine} has {first.revision}; give every engine the same policy files, then "
                "start again"
            )


def _receive_messages() -> None:
    stock = seam(core_client, "_process_utility_output")

    def process_utility_output(output: Any, utility_results: Any) -> None:
        if output.call_id == MESSAGE_CALL_ID:
            deliver(output.result.result)
            return
        stock(output, utility_results)

    core_client._process_utility_output = process_utility_output
