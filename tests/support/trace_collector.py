"""A collector of OpenTelemetry traces over HTTP: what a server exports, span by span."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class TraceCollector:
    """Listens from `with` on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector._take(body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: a test's output is its own."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def spans(self, trace_id: str) -> list[Any]:
        """Of a trace, as the protocol has them."""
        with self._lock:
            return [span for span in self._spans if span.trace_id.hex() == trace_id]

    def __enter__(self) -> TraceCollector:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _take(self, body: bytes) -> None:
        exported = ExportTraceServiceRequest.FromString(body)
        with self._lock:
            for resource in exported.resource_spans:
                for scope in resource.scope_spans:
                    self._spans.extend(scope.spans)


def attributes(span: Any) -> dict[str, str]:
    """Those that are text."""
    return {one.key: one.value.string_value for one in span.attributes}
