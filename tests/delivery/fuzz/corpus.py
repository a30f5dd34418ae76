"""Valid requests of every kind that the collector reads: what inputs are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tests.support.messages import otlp_json
from tests.support.usage import BASE, SECOND, key_values, number, request, sum_metric

NOW: Final = BASE + 60 * SECOND

MESSAGES: Final[dict[str, type[Message]]] = {
    "metrics": ExportMetricsServiceRequest,
    "traces": ExportTraceServiceRequest,
    "logs": ExportLogsServiceRequest,
}


class Sample(NamedTuple):
    """One valid request."""

    signal: str
    message: Message
    protobuf: bytes
    json: bytes


def corpus(now_ns: int = NOW) -> list[Sample]:
    """Requests of the minute before `now_ns`. Several share streams and identities, so that what is damaged meets what
    is not."""
    found: list[tuple[str, Message]] = [("metrics", message) for message in _metrics(now_ns - 60 * SECOND)]
    found += [("traces", message) for message in _traces(now_ns - 60 * SECOND)]
    found += [("logs", _logs(now_ns - 60 * SECOND))]
    return [
        Sample(signal, message, message.SerializeToString(deterministic=True), otlp_json(message))
        for signal, message in found
    ]


def _metrics(begin: int) -> Sequence[ExportMetricsServiceRequest]:
    end = begin + 10 * SECOND
    acme = {"tallymark.account.id": "acme", "http.route": "/search", "http.response.status_code": 200}
    globex = {"tallymark.account.id": "globex", "tallymark.plan": "pro", "error.type": "timeout", "x.cached": True}
    deltas = sum_metric([number(begin, end, 3, acme), number(begin, end, 0.1, globex)])
    later = sum_metric([number(end, end + 10 * SECOND, 2**53 + 1, acme), number(end, end + 7, 5e-324, acme)])
    cumulative = sum_metric(
        [number(begin, begin + second * SECOND, value, acme) for second, value in ((10, 4), (20, 7.25), (30, 9))],
        name="llm.tokens",
        unit="{token}",
        temporality=2,
    )
    unsaid = sum_metric([number(0, end, 100, globex), number(0, end + 5, 30, globex)], "egress", "By", temporality=2)
    resumed = sum_metric([number(end, end, 50, acme), number(end, end + 9, 58, acme)], "egress", "By", temporality=2)
    ended = number(begin, end, 0, acme)
    ended.flags = 1
    plain = request(deltas, later, producer="one")
    return [
        plain,
        request(cumulative, unsaid, producer="two", region="eu"),
        request(resumed, sum_metric([ended]), scope="a.service"),
        request(_histogram(end, acme), _gauge(end, acme), _exponential(end, acme), producer="three"),
        request(*_control(begin, end), scope="tallymark.control"),
        request(sum_metric([number(begin, end, 3, {"tallymark.account": "acme"})]), scope="tallymark.mirror"),
        request(
            sum_metric([number(begin, end, 1, {"http.route": "/x"})], monotonic=False), _gauge(end, {}), scope="foreign"
        ),
        _many(plain, request(sum_metric([_with_exemplar(begin, end, acme)]), producer="four")),
        request(sum_metric([_nested(begin, end)])),
    ]


def _many(*requests: ExportMetricsServiceRequest) -> ExportMetricsServiceRequest:
    whole = ExportMetricsServiceRequest()
    for one in requests:
        whole.MergeFrom(one)
    return whole


def _nested(begin: int, end: int) -> object:
    found = number(begin, end, 1, {"tallymark.account.id": 17, "x.bytes": b"\0\xff", "x.ratio": 0.5})
    some = KeyValue(key="x.list")
    some.value.array_value.values.add().int_value = 1
    some.value.array_value.values.add().kvlist_value.values.add(key="a").value.string_value = "ä\U0001f600"
    found.attributes.append(some)
    return found


def _with_exemplar(begin: int, end: int, attributes: dict[str, object]) -> object:
    found = number(begin, end, 12, attributes)
    found.exemplars.add(time_unix_nano=end, as_int=12, trace_id=b"t" * 16, span_id=b"s" * 8)
    return found


def _gauge(end: int, attributes: dict[str, object]) -> Metric:
    metric = Metric(name="load", unit="1")
    metric.gauge.data_points.append(number(0, end, 0.7, attributes))
    return metric


def _histogram(end: int, attributes: dict[str, object]) -> Metric:
    metric = Metric(name="latency", unit="s", description="how long")
    metric.histogram.aggregation_temporality = 1
    point = metric.histogram.data_points.add(time_unix_nano=end, count=3, sum=1.5, attributes=key_values(attributes))
    point.bucket_counts.extend([1, 2])
    point.explicit_bounds.append(0.5)
    return metric


def _exponential(end: int, attributes: dict[str, object]) -> Metric:
    metric = Metric(name="sizes", unit="By")
    point = metric.exponential_histogram.data_points.add(
        time_unix_nano=end, count=2, attributes=key_values(attributes), scale=3
    )
    point.positive.bucket_counts.extend([1, 1])
    summary = metric.metadata.add(key="m")
    summary.value.bool_value = True
    return metric


def _control(begin: int, end: int) -> list[Metric]:
    meter = {"tallymark.control.meter": "api.requests", "tallymark.control.unit": "{request}"}
    parts = [
        number(begin, end, value, {**meter, "tallymark.control.part": part, "tallymark.control.parts": 2})
        for part, value in enumerate((2**62, 0.5))
    ]
    more = number(begin, end + SECOND, 9, meter)
    return [
        sum_metric([*parts, more], "tallymark.control.total", "1", temporality=2),
        sum_metric([number(begin, end, 1, {})], "tallymark.control.closed", "1", temporality=2),
        sum_metric(
            [number(begin, end, 2, {**meter, "tallymark.control.account": "acme"})], "tallymark.control.evidence", "1"
        ),
    ]


def _traces(begin: int) -> list[ExportTraceServiceRequest]:
    one, two = ExportTraceServiceRequest(), ExportTraceServiceRequest()
    said = {"tallymark.account.id": "acme", "user.id": "u1", "tallymark.meter.llm.tokens": "12.5"}
    for whole, usage in ((one, {**said, "tallymark.meter.api.requests": 1}), (two, {})):
        resource = whole.resource_spans.add()
        resource.resource.attributes.extend(key_values({"service.name": "shop"}))
        span = resource.scope_spans.add().spans.add(
            trace_id=b"0123456789abcdef",
            span_id=b"01234567" if usage else b"76543210",
            name="GET /search",
            start_time_unix_nano=begin,
            end_time_unix_nano=begin + SECOND,
        )
        if usage:
            span.attributes.extend(key_values(usage))
            span.events.add(name="tallymark.usage").attributes.extend(key_values({**said, "tallymark.meter.a": 1}))
        event = span.events.add(name="tallymark.usage", time_unix_nano=begin)
        event.attributes.extend(
            key_values({"tallymark.account.id": "globex", "tallymark.meter.api.requests": 0.25, "http.route": "/a"})
        )
        span.events.add(name="other", time_unix_nano=begin).attributes.extend(key_values({"k": "v"}))
    return [one, two]


def _logs(begin: int) -> ExportLogsServiceRequest:
    whole = ExportLogsServiceRequest()
    record = whole.resource_logs.add().scope_logs.add().log_records.add(time_unix_nano=begin, severity_number=9)
    record.body.string_value = "a line"
    record.attributes.extend(key_values({"k": "v"}))
    return whole
