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
        _buses.append(EventBus(GuardMetrics(model, REGISTRY), model, path))
    bus = _buses[0]
    bus.expect_hello()
    return bus


def decisions() -> list[Decision]:
    """The latest decisions that reached this process, oldest first; for the offline `LLM`."""
    return [decision for bus in _buses for decision in bus.decisions]


def require_hello(bus: EventBus, timeout_s: float = HELLO_TIMEOUT_S) -> None:
    """Raises NotLiveError where the engine does not say that its guard is up.

    vLLM only logs a plugin that fails to import, so an engine process can come up without one.
    """
    if not bus.wait_for_hello(timeout_s):
        raise NotLiveError(
            "the engine did not say that MoE Guard is live in it; "
            "look for 'Failed to load plugin' in its log, and mend the installation"
        )


def _receive_messages() -> None:
    stock = seam(core_client, "_process_utility_output")

    def process_utility_output(output: Any, utility_results: Any) -> None:
        if output.call_id == MESSAGE_CALL_ID:
            deliver(output.result.result)
            return
        stock(output, utility_results)

    core_client._process_utility_output = process_utility_output
