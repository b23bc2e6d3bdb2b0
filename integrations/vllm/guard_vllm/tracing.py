"""Decisions as OpenTelemetry spans, where vLLM traces requests (`--otlp-traces-endpoint`).

vLLM makes and ends a request's own span when its last output has left the engine, which is ahead of
what the guard says of that step. So a decision is a span of its own, with the parent of the request's:
what called the server. Both have the request's id.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from datetime import datetime
from math import nan
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from guard.events.bus import EventBus
from guard.events.message import Decision
from guard_vllm.engine_core import external_request_id
from guard_vllm.steps import wrap

logger = logging.getLogger(__name__)

SPAN: Final = "moe_guard.decision"
REQUEST_ID: Final = "gen_ai.request.id"  # as vLLM's own span has it
MAX_REQUESTS: Final = 10_000
"""Of this API server's whose parents are known; of older ones decisions have none."""

_TRACED: Final = "_moe_guard_traced"


class DecisionSpans:
    """Of one API server: each makes spans of its own requests' decisions, and no other does."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer
        self._lock = threading.Lock()
        self._headers: OrderedDict[str, Mapping[str, str]] = OrderedDict()

    def note(self, request: Any) -> None:
        """An `EngineCoreRequest` of this server."""
        with self._lock:
            self._headers[external_request_id(request.request_id)] = request.trace_headers or {}
            if len(self._headers) > MAX_REQUESTS:
                self._headers.popitem(last=False)

    def offer(self, decision: Decision) -> None:
        with self._lock:
            headers = self._headers.get(decision.request_id)
        if headers is None:
            return
        at_ns = int(datetime.fromisoformat(decision.time).timestamp() * 1e9)
        span = self._tracer.start_span(
            SPAN,
            context=TraceContextTextMapPropagator().extract(headers),
            attributes=_attributes(decision),
            start_time=at_ns,
        )
        span.end(at_ns)


def _attributes(decision: Decision) -> dict[str, Any]:
    own = {
        name: getattr(decision, name)
        for name in (
            *("decision_id", "revision", "policy", "rule", "mode", "action", "severity"),
            *("phase", "position", "unseen_tokens", "exempt", "outcome"),
        )
    }
    values = [nan if one.value is None else one.value for one in decision.evidence]
    return {
        REQUEST_ID: decision.request_id,
        **{f"moe_guard.{name}": value for name, value in own.items()},
        "moe_guard.conditions": [one.condition for one in decision.evidence],
        "moe_guard.values": values,
        "moe_guard.thresholds": [one.threshold for one in decision.evidence],
    }


def trace_decisions(engine: Any, bus: EventBus) -> None:
    """Through the exporter that vLLM has set up, until the engine is shut down."""
    if getattr(engine, _TRACED, False):
        return
    setattr(engine, _TRACED, True)
    spans = DecisionSpans(trace.get_tracer("moe_guard"))

    def add_request(stock: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        spans.note(request)
        return stock(request, *args, **kwargs)

    def shutdown(stock: Any, *args: Any, **kwargs: Any) -> Any:
        if spans.offer in bus.on_decision:  # vLLM shuts an engine down more than once
            bus.on_decision.remove(spans.offer)
        return stock(*args, **kwargs)

    wrap(engine.output_processor, "add_request", add_request)
    wrap(engine, "shutdown", shutdown)
    bus.on_decision.append(spans.offer)
    logger.info("MoE Guard makes a span of each decision")
