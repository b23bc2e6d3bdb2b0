"""Decisions become spans, in the API server that has the request and under what called it."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from guard_vllm import tracing
from guard_vllm.tracing import DecisionSpans, trace_decisions
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from guard.events.bus import EventBus
from guard.events.message import EvidenceFacts, News, encode
from guard.events.metrics import GuardMetrics
from tests.unit.events.reports import decision

TRACE_ID, CALLER = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
HEADERS = {"traceparent": f"00-{TRACE_ID:032x}-{CALLER:016x}-01"}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Any:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider.get_tracer("test")


def request(req_id: str, headers: dict[str, str] | None = None) -> Any:
    return SimpleNamespace(request_id=f"{req_id}-01234567", trace_headers=headers)


def one(exporter: InMemorySpanExporter) -> ReadableSpan:
    [span] = exporter.get_finished_spans()
    return span


def test_a_decision_is_a_span_under_what_called_the_server(
    exporter: InMemorySpanExporter, tracer: Any
) -> None:
    spans = DecisionSpans(tracer)
    spans.note(request("cmpl-a", HEADERS))
    evidence = (EvidenceFacts("rate", 0.5, 0.25), EvidenceFacts("probe", None, 0.9))
    made = msgspec.structs.replace(
        decision("cmpl-a"), time="2026-11-30T10:00:00.250+00:00", evidence=evidence
    )

    spans.offer(made)

    span = one(exporter)
    assert span.name == "moe_guard.decision"
    assert span.context is not None
    assert span.parent is not None
    assert (span.context.trace_id, span.parent.span_id) == (TRACE_ID, CALLER)
    at = datetime(2026, 11, 30, 10, 0, 0, 250_000, tzinfo=UTC).timestamp()
    assert span.start_time == span.end_time == int(at * 1e9)
    assert span.attributes is not None
    assert span.attributes["gen_ai.request.id"] == "cmpl-a"
    for name in ("policy", "rule", "action", "mode", "severity", "phase", "outcome", "revision"):
        assert span.attributes[f"moe_guard.{name}"] == getattr(made, name)
    assert span.attributes["moe_guard.conditions"] == ("rate", "probe")
    assert span.attributes["moe_guard.thresholds"] == (0.25, 0.9)
    values: Any = span.attributes["moe_guard.values"]
    assert values[0] == 0.5
    assert math.isnan(values[1])


def test_a_request_that_nobody_traced_has_a_span_without_a_parent(
    exporter: InMemorySpanExporter, tracer: Any
) -> None:
    spans = DecisionSpans(tracer)
    spans.note(request("cmpl-a"))
    spans.offer(decision("cmpl-a"))
    assert one(exporter).parent is None


def test_the_request_of_another_api_server_has_its_span_there(
    exporter: InMemorySpanExporter, tracer: Any
) -> None:
    DecisionSpans(tracer).offer(decision("cmpl-a"))
    assert exporter.get_finished_spans() == ()


def test_of_requests_long_ago_nothing_is_kept(
    exporter: InMemorySpanExporter, tracer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "MAX_REQUESTS", 2)
    spans = DecisionSpans(tracer)
    for req_id in ("a", "b", "c"):
        spans.note(request(req_id))
    for req_id in ("a", "b", "c"):
        spans.offer(decision(req_id))
    ids = [span.attributes["gen_ai.request.id"] for span in exporter.get_finished_spans()]  # type: ignore[index]
    assert ids == ["b", "c"]


def test_an_engines_requests_are_noted_until_it_is_shut_down(
    exporter: InMemorySpanExporter, tracer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opentelemetry.trace.get_tracer", lambda name: tracer)
    added: list[Any] = []
    engine = SimpleNamespace(
        output_processor=SimpleNamespace(add_request=lambda request, *args: added.append(request)),
        shutdown=lambda: None,
    )
    bus = EventBus(GuardMetrics("m", CollectorRegistry()), "m")

    for _ in range(2):
        trace_decisions(engine, bus)
    asked = request("cmpl-a", HEADERS)
    engine.output_processor.add_request(asked, "prompt")
    bus.receive(encode(News(0, [decision("cmpl-a")])))
    for _ in range(2):
        engine.shutdown()
    bus.receive(encode(News(0, [decision("cmpl-a")])))

    assert added == [asked]
    assert one(exporter).attributes is not None
    assert bus.on_decision == []
