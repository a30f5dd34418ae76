"""Records what the order on stdin says, with OpenTelemetry's SDK for Python, and prints its own tally as JSON.

The order is told in tests/interop/clients.py.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import sys
import time
from collections import Counter
from typing import Any

from opentelemetry.sdk.metrics import Counter as SdkCounter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, MetricExporter, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor


def exporters(order: dict[str, Any]) -> tuple[MetricExporter, Any]:
    """For metrics and for spans."""
    temporality = AggregationTemporality[order["temporality"].upper()]
    settings: dict[str, Any] = {"timeout": order["timeout_ms"] / 1000}
    if order["protocol"] == "grpc":
        import grpc

        settings["insecure"] = True
        settings["compression"] = {"none": grpc.Compression.NoCompression, "gzip": grpc.Compression.Gzip}[
            order["compression"]
        ]
        package, paths = "opentelemetry.exporter.otlp.proto.grpc", ("", "")
    else:
        http = importlib.import_module("opentelemetry.exporter.otlp.proto.http")
        settings["compression"] = http.Compression(order["compression"])
        package, paths = "opentelemetry.exporter.otlp.proto.http", ("/v1/metrics", "/v1/traces")
    metrics = importlib.import_module(f"{package}.metric_exporter").OTLPMetricExporter
    traces = importlib.import_module(f"{package}.trace_exporter").OTLPSpanExporter
    return (
        metrics(endpoint=order["endpoint"] + paths[0], preferred_temporality={SdkCounter: temporality}, **settings),
        traces(endpoint=order["endpoint"] + paths[1], **settings),
    )


def main() -> None:
    order = json.load(sys.stdin)
    metrics, traces = exporters(order)
    attributes = {"service.name": order["service"]}
    if order["instance"]:
        attributes["service.instance.id"] = order["instance"]
    resource = Resource.create(attributes)
    # Exported when a round is over: force_flush.
    reader = PeriodicExportingMetricReader(
        metrics, export_interval_millis=3_600_000, cardinality_limits={SdkCounter: order["cardinality"]}
    )
    meters = MeterProvider([reader], resource)
    tracers = TracerProvider(resource=resource)
    tracers.add_span_processor(SimpleSpanProcessor(traces))
    requests = meters.get_meter("shop").create_counter("interop.requests", "{request}")
    volume = meters.get_meter("shop").create_counter("interop.volume", "GBy")
    tracer = tracers.get_tracer("shop")
    tally: Counter[tuple[str, str, str]] = Counter()
    for each_round in order["rounds"]:
        for each in each_round:
            account, route, calls = each["account"], each["route"], each["calls"]
            named = {"tallymark.account.id": account, "http.route": route}
            for _ in range(calls):
                requests.add(1, named)
                tally["interop.requests", account, route] += 1000
            volume.add(each["volume_thousandths"] / 1000, named)
            tally["interop.volume", account, route] += each["volume_thousandths"]
            if order["spans"]:
                tracer.start_span("call", attributes={**named, "tallymark.meter.interop.requests": calls}).end()
                tally["span:interop.requests", account, ""] += calls * 1000
        meters.force_flush(60_000)
        time.sleep(order["pause_ms"] / 1000)
    meters.shutdown(60_000)
    tracers.shutdown()
    versions = {"sdk": importlib.metadata.version("opentelemetry-sdk"), "python": platform.python_version()}
    lines = [[*key, thousandths] for key, thousandths in tally.items()]
    print(json.dumps({"versions": versions, "tally": lines}))


if __name__ == "__main__":
    main()
