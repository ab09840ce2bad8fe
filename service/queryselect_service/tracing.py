"""OpenTelemetry's spans: one per RPC, and one in it per phase, made of what `Times` has noted once the RPC has ended.

Nothing is done for them before that, and nothing at all where traces are off. Needs the extra `tracing`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from queryselect_service.call import Call

#: The codes that are a server's failure, by OpenTelemetry's conventions for gRPC.
FAILURES = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")


class Tracing:
    """The traces of one server. Sampling, resource and headers follow OpenTelemetry's own variables (OTEL_…)."""

    def __init__(self, processor: SpanProcessor) -> None:
        given = OTELResourceDetector().detect().attributes
        here = {"service.name": "queryselect", "service.version": version("queryselect")}
        self._provider = TracerProvider(resource=Resource.create({**here, **given}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("queryselect_service", version("queryselect"))
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> Tracing:
        """Sends them to an address, in the background."""
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))

    def ended(
        self, method: str, call: Call, code: tuple[int, str], reason: str | None, metadata: Mapping[str, str]
    ) -> dict[str, str]:
        """Records an RPC; the ids of its trace and its span, where it is sampled. method: as in package.Service/Method.

        code: gRPC's, as a number and by name. A `traceparent` in the metadata that is none is ignored.
        """
        times, now = call.times, time.monotonic()
        to_clock = time.time_ns() - round(now * 1e9)  # what makes nanoseconds since 1970 of monotonic ones

        def clock(moment: float) -> int:
            return round(moment * 1e9) + to_clock

        service, _, name = method.partition("/")
        attributes: dict[str, str | int] = {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": name,
            "rpc.grpc.status_code": code[0],
            "queryselect.request_id": call.request_id,
        }
        if call.strategy:
            attributes["queryselect.strategy"] = call.strategy
        attributes.update({f"queryselect.{letter}": size for letter, size in call.sizes.items()})
        if call.uploaded:
            attributes["queryselect.upload_bytes"] = call.uploaded
        if call.fetched:
            attributes["queryselect.source_bytes"] = call.fetched
        if reason is not None:
            attributes["queryselect.reason"] = reason
        span = self._tracer.start_span(
            method,
            self._propagator.extract(metadata),
            SpanKind.SERVER,
            attributes,
            start_time=clock(times.started),
        )
        if not span.is_recording():
            return {}
        if code[1] in FAILURES:
            span.set_status(StatusCode.ERROR, code[1])
        within = set_span_in_context(span)
        for phase, (first, last) in times.spans.items():
            busy = {"queryselect.busy_seconds": times.seconds(phase)}
            self._tracer.start_span(phase, within, attributes=busy, start_time=clock(first)).end(clock(last))
        span.end(clock(now))
        found = span.get_span_context()
        return {"trace_id": f"{found.trace_id:032x}", "span_id": f"{found.span_id:016x}"}

    def close(self) -> None:
        """Sends what there is left, and no more."""
        self._provider.shutdown()
