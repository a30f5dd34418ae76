"""The example service's own spans: a few of every hundred calls, sent to the same collector.

Usage that is recorded while a span is open is written onto it, and becomes the evidence in `tallymark.usage_calls`.
A service with OpenTelemetry's instrumentation has such spans already and needs none of this.
"""

from __future__ import annotations

from typing import Final

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.trace import SpanKind

from tallymark.integrations.asgi import App, Receive, Scope, Send

SAMPLED: Final = 0.02
"""Of the calls. What is billed does not depend on it: metrics are counted, spans are sampled."""


def make_tracer_provider(service: str, endpoint: str | None) -> TracerProvider:
    """Spans of this process; without an endpoint they go nowhere."""
    provider = TracerProvider(sampler=TraceIdRatioBased(SAMPLED), resource=Resource.create({"service.name": service}))
    if endpoint is not None:
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class TracingMiddleware:
    """A span around every HTTP request."""

    def __init__(self, app: App, provider: TracerProvider) -> None:
        self.app = app
        self._tracer = provider.get_tracer("tallymark.demo")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with self._tracer.start_as_current_span(scope["method"], kind=SpanKind.SERVER) as span:
            try:
                await self.app(scope, receive, send)
            finally:
                if span.is_recording() and (route := getattr(scope.get("route"), "path", None)):
                    span.update_name(f"{scope['method']} {route}")
