"""OpenTelemetry's own exporters over HTTP, against a real collector: totals and spans as the program counted them."""

from __future__ import annotations

import random
from collections import Counter

import psycopg
import pytest
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import Counter as OtelCounter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from tests.support.collector import Collector, running


def provider(port: int, temporality: AggregationTemporality, compression: Compression) -> MeterProvider:
    exporter = OTLPMetricExporter(
        f"http://127.0.0.1:{port}/v1/metrics",
        compression=compression,
        timeout=60,  # after that the increases are lost
        preferred_temporality={OtelCounter: temporality},
    )
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=1e9)  # only where it is told to
    resource = Resource({"service.name": "shop", "service.instance.id": temporality.name})
    return MeterProvider([reader], resource=resource, shutdown_on_exit=False)


@pytest.mark.parametrize("compression", [Compression.NoCompression, Compression.Gzip])
def test_what_was_counted_is_billed(dsn: str, compression: Compression) -> None:
    rng, expected = random.Random(5), Counter[tuple[str, str]]()
    with running(dsn) as collector:
        for temporality in (AggregationTemporality.DELTA, AggregationTemporality.CUMULATIVE):
            metrics = provider(collector.http_port, temporality, compression)
            counter = metrics.get_meter("shop").create_counter("api.requests", "{request}")
            for interval in range(4):
                for _ in range(50):
                    account, quantity = f"account-{rng.randrange(7)}", rng.randint(1, 9)
                    counter.add(quantity, {"tallymark.account.id": account, "http.route": "/search"})
                    expected[account, temporality.name] += quantity
                if interval == 2:
                    restarted(collector)
                metrics.force_flush(60_000)
            metrics.shutdown()
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        rows = connection.execute("SELECT account, sum(quantity) FROM usage_hourly GROUP BY 1").fetchall()
        assert connection.execute("SELECT count(*) FROM usage_quarantine").fetchone() == (0,)
    by_account: Counter[str] = Counter()
    for (account, _), quantity in expected.items():
        by_account[account] += quantity
    assert dict(rows) == by_account


def restarted(collector: Collector) -> None:
    """The exporter's kept connection is gone then, and the new collector knows no stream."""
    collector.kill()
    collector.start()


def test_spans_are_evidence(dsn: str) -> None:
    with running(dsn) as collector:
        traces = TracerProvider(resource=Resource({"service.name": "shop"}), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(
            f"http://127.0.0.1:{collector.http_port}/v1/traces", compression=Compression.Gzip, timeout=60
        )
        traces.add_span_processor(SimpleSpanProcessor(exporter))
        ids = set()
        for quantity in range(1, 6):
            usage = {"tallymark.account.id": "acme", "tallymark.meter.api.requests": quantity}
            with traces.get_tracer("shop").start_as_current_span("GET /search", attributes=usage) as span:
                ids.add((span.get_span_context().trace_id.to_bytes(16, "big"), quantity))
        traces.shutdown()
    with psycopg.connect(dsn) as connection:
        rows = connection.execute("SELECT trace_id, quantity FROM tallymark.usage_evidence").fetchall()
    assert set(rows) == ids
