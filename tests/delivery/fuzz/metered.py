"""A file of meters, and valid requests of what it names: the inputs' second corpus."""

from __future__ import annotations

from typing import Any, Final

import yaml
from google.protobuf.message import Message
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tallymark_collector.metering import parse_rules
from tests.delivery.fuzz.corpus import NOW, Sample
from tests.support.messages import otlp_json
from tests.support.telemetry import histogram, histogram_point, metrics_of
from tests.support.usage import SECOND, key_values, number, sum_metric

FILE: Final = """
meters:
  gateway.requests:
    unit: "{request}"
    sources:
      - {tenants: globex, metric: "http.*.duration", quantity: count, account: {attribute: key.id, strip_prefix: k}}
      - metric: http.server.request.duration
        resource: {service.name: [kong, "nginx-*"]}
        where:
          http.route: {not: [/health, "/ready*"]}
          http.response.status_code: {from: 200, to: 499}
        quantity: count
        account: {attribute: key.id, map: {k1: paul, k2: anne, probe: probe.file}}
        dimensions: [http.route, {resource: cloud.region}]
  gateway.milliseconds:
    unit: ms
    sources:
      - {metric: http.server.request.duration, quantity: sum, source_unit: s, factor: 1000,
         account: [key.id, {resource: customer.id}]}
  egress:
    unit: MBy
    sources:
      - {metric: "*.bytes.sent", quantity: value, factor: 1/1000000, account: key.id, dimensions: [http.route]}
  seats:
    unit: "{seat}"
    aggregation: level
    sources:
      - {metric: "portal.seats*", quantity: value, account: key.id, dimensions: {kind: seat.kind}}
  storage:
    unit: GBy
    aggregation: level
    sources:
      - {metric: bucket.size, quantity: value, source_unit: By, factor: 1/1000000000,
         account: {attribute: bucket, map: {b-17: acme}}}
  ingress.requests:
    unit: "{request}"
    sources:
      - span: "*"
        kind: server
        scope: "gate*"
        where: {http.response.status_code: {to: 499}}
        account: [key.id, {resource: customer.id}]
        dimensions: {http.request.method: http.method}
        spans_are_complete: true
  ingress.seconds:
    unit: s
    sources:
      - {span: "GET *", quantity: duration, status: [unset, ok], account: key.id, sampled: allow}
  llm.tokens:
    unit: "{token}"
    sources:
      - {span: "chat ?*", kind: [client, internal], where: {gen_ai.usage.output_tokens: {present: true}},
         quantity: {attribute: gen_ai.usage.output_tokens}, account: {resource: customer.id}, spans_are_complete: true}
"""
RULES: Final = parse_rules(FILE)
METERS: Final[dict[str, Any]] = yaml.load(FILE, yaml.BaseLoader)["meters"]
"""The file as a person would read it."""
TENANTS: Final = ("default", "globex")

KONG: Final = {"service.name": "kong", "service.instance.id": "one", "cloud.region": "eu", "customer.id": "big"}


def metered_corpus(now_ns: int = NOW) -> list[Sample]:
    """Requests of the minute before `now_ns`, most of which is usage by the file."""
    begin = now_ns - 60 * SECOND
    found: list[tuple[str, Message]] = [("metrics", message) for message in _metrics(begin)]
    found += [("traces", message) for message in _traces(begin)]
    return [
        Sample(signal, message, message.SerializeToString(deterministic=True), otlp_json(message))
        for signal, message in found
    ]


def _metrics(begin: int) -> list[Message]:
    end = begin + 10 * SECOND
    one = {"key.id": "k1", "http.route": "/a", "http.response.status_code": 200}
    two = {"key.id": "k2", "http.route": "/readyz", "http.response.status_code": 404.0}
    nobody = {"http.route": "/b", "http.response.status_code": "503"}
    deltas = histogram([histogram_point(begin, end, count, 0.25 * count, of) for count, of in ((3, one), (1, two))])
    more = histogram([histogram_point(end, end + 5, 7, None, one), histogram_point(end, end + 5, 2, 1e-9, nobody)])
    totals = histogram(
        [histogram_point(begin, begin + second * SECOND, second, second / 8, one) for second in (10, 20, 30)],
        temporality=2,
    )
    exponential = Metric(name="http.client.duration", unit="s")
    exponential.exponential_histogram.aggregation_temporality = 1
    exponential.exponential_histogram.data_points.add(
        start_time_unix_nano=begin, time_unix_nano=end, count=4, sum=1.5, attributes=key_values(one)
    )
    summary = Metric(name="http.server.request.duration", unit="s")
    summary.summary.data_points.add(
        start_time_unix_nano=begin, time_unix_nano=end, count=9, sum=2.25, attributes=key_values({"key.id": "k2"})
    )
    sent = sum_metric([number(begin, end, 2**40, one), number(begin, end, 0.5, two)], "nic.bytes.sent", "By")
    falling = [number(begin, begin + second * SECOND, 7 - second, one) for second in (3, 9)]
    seats = sum_metric(falling, "portal.seats", "{seat}", temporality=2, monotonic=False)
    sizes = Metric(name="bucket.size", unit="By")
    sizes.gauge.data_points.extend(number(0, end, size, {"bucket": name}) for size, name in ((5e9, "b-17"), (1, "b-2")))
    gone = number(begin, end, 0, one)
    gone.flags = 1
    other = sum_metric([number(begin, end, 1, {"x": 1})], "queue.length", "1")
    return [
        metrics_of(KONG, deltas, more),
        metrics_of({**KONG, "service.instance.id": "two"}, totals, summary, exponential),
        metrics_of({"service.name": "nginx-7"}, sent, deltas, other),
        metrics_of({"service.name": "portal"}, seats, sizes, sum_metric([gone], "a.bytes.sent", "By")),
    ]


def _traces(begin: int) -> list[Message]:
    served = _span(1, begin, "GET /a", 2, {"key.id": "k1", "http.response.status_code": 200, "http.method": "GET"})
    failed = _span(2, begin, "POST /a", 2, {"key.id": "k2", "http.response.status_code": 503})
    failed.status.code = 2
    sampled = _span(3, begin, "GET /b", 2, {"key.id": "k1", "http.response.status_code": 204})
    sampled.trace_state = "x=1,ot=th:8"
    unsampled = _span(4, begin, "chat large", 3, {"gen_ai.usage.output_tokens": 17, "key.id": "k9"})
    unsampled.flags = 0x100
    chats = [
        _span(5 + place, begin, "chat small", 3, {"gen_ai.usage.output_tokens": tokens})
        for place, tokens in enumerate((250, 0.5, "12.25", -1, True))
    ]
    ours = _span(20, begin, "GET /ours", 2, {"tallymark.account.id": "acme", "tallymark.meter.ingress.requests": 2})
    return [
        _request(KONG, "gateway", served, failed, sampled),
        _request({"service.name": "bot", "customer.id": "acme"}, "llm", *chats, unsampled),
        _request(KONG, "gate.two", ours, _span(21, begin, "internal", 1, {})),
    ]


def _request(resource: dict[str, object], scope: str, *spans: Span) -> ExportTraceServiceRequest:
    whole = ExportTraceServiceRequest()
    outer = whole.resource_spans.add()
    outer.resource.attributes.extend(key_values(resource))
    inner = outer.scope_spans.add(spans=spans)
    inner.scope.name = scope
    return whole


def _span(place: int, begin: int, name: str, kind: int, attributes: dict[str, object]) -> Span:
    return Span(
        trace_id=place.to_bytes(16, "big"),
        span_id=place.to_bytes(8, "big"),
        name=name,
        kind=kind,  # type: ignore[arg-type]
        start_time_unix_nano=begin,
        end_time_unix_nano=begin + place * SECOND // 4,
        attributes=key_values(attributes),
    )
