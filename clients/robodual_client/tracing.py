"""OpenTelemetry traces (extra `telemetry`), sent to a collector over OTLP."""

from __future__ import annotations

import re
import time
from typing import Any, Mapping

EXPORT = 2.0  # seconds for one export: closing must not wait longer for a collector that is gone
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_NANO = 1_000_000_000


class Tracer:
    """The spans of one process, exported in the background. OTEL_TRACES_SAMPLER and its like apply."""

    def __init__(self, endpoint: str, service: str) -> None:
        """`endpoint` is an OTLP/HTTP collector's, as "http://127.0.0.1:4318".

        Raises ValueError if it is no URL, or if OpenTelemetry is not installed.
        """
        if not re.match(r"https?://[^/]", endpoint):
            raise ValueError(f"traces must be the URL of an OTLP/HTTP collector, http://HOST:4318, got {endpoint!r}")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ValueError("traces need OpenTelemetry: install the extra `telemetry`") from error
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=EXPORT)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("robodual")

    def begin(self, name: str, attributes: Mapping[str, Any], parent: str | None = None) -> Span:
        """A span that begins now. `parent` is the traceparent of the request that caused it, which is ignored if it is
        malformed; None for whatever span this thread is in.
        """
        return Span(self._tracer, self._tracer.start_span(name, _context(parent), attributes=attributes))

    def close(self) -> None:
        """Exports what is left."""
        self._provider.shutdown()


class Span:
    """An open span. For one thread at a time."""

    def __init__(self, tracer: Any, span: Any) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def trace_id(self) -> str:
        return f"{self._span.get_span_context().trace_id:032x}"

    @property
    def traceparent(self) -> str:
        """What a request carries to the service that answers it."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def note(self, **attributes: Any) -> None:
        self._span.set_attributes(attributes)

    def stage(self, name: str, seconds: float, ago: float = 0.0) -> None:
        """A span below this one that took so many seconds and ended `ago`."""
        from opentelemetry import trace

        end = time.time_ns() - int(ago * _NANO)
        start = end - int(seconds * _NANO)
        self._tracer.start_span(name, trace.set_span_in_context(self._span), start_time=start).end(end)

    def end(self, error: BaseException | None = None) -> None:
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"[:500]))
        self._span.end()


def _context(parent: str | None) -> Any:
    """OpenTelemetry's context for a traceparent; None for this thread's own."""
    if parent is None:
        return None
    from opentelemetry import trace
    from opentelemetry.context import Context

    found = _TRACEPARENT.fullmatch(parent)
    if found is None:
        return Context()
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    remote = trace.SpanContext(trace_id, span_id, True, trace.TraceFlags(flags))
    return trace.set_span_in_context(trace.NonRecordingSpan(remote), Context())
