"""Requests cut in parts: together they hold what the whole did, in its order, each thing where it was inside."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tallymark import conventions
from tallymark_collector.forwarding import splitting
from tallymark_collector.forwarding.splitting import Parts, halves
from tests.support.messages import messages
from tests.support.usage import BASE, SECOND, number, sum_metric

KINDS: dict[str, type[Any]] = {
    "metrics": ExportMetricsServiceRequest,
    "traces": ExportTraceServiceRequest,
    "logs": ExportLogsServiceRequest,
}
LEVELS = {
    "metrics": ("resource_metrics", "scope_metrics", "metrics"),
    "traces": ("resource_spans", "scope_spans", "spans"),
    "logs": ("resource_logs", "scope_logs", "log_records"),
}


def things(signal: str, request: Message, around: tuple[bytes, ...] = (), depth: int = 0) -> list[tuple[bytes, ...]]:
    """Each point, span and record with what it is inside of, and whatever is empty."""
    if depth == len(LEVELS[signal]):
        return points(request, around) if signal == "metrics" else [(*around, whole(request))]
    name = LEVELS[signal][depth]
    outside = type(request).FromString(request.SerializeToString())
    outside.ClearField(name)
    around = (*around, whole(outside))
    inside = getattr(request, name)
    return [thing for each in inside for thing in things(signal, each, around, depth + 1)] or [around]


def points(metric: Any, around: tuple[bytes, ...]) -> list[tuple[bytes, ...]]:
    kind = metric.WhichOneof("data")
    outside = Metric.FromString(metric.SerializeToString())
    if kind is None:
        return [(*around, whole(outside))]
    found = list(getattr(metric, kind).data_points)
    getattr(outside, kind).ClearField("data_points")
    return [(*around, whole(outside), whole(point)) for point in found] or [(*around, whole(outside))]


def whole(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def all_parts(signal: str, body: bytes) -> list[bytes]:
    """A request cut until nothing can be cut any more."""
    found = halves(signal, body)
    return [body] if found is None else [part for half in found for part in all_parts(signal, half)]


def check(signal: str, body: bytes) -> list[bytes]:
    kind, parts = KINDS[signal], all_parts(signal, body)
    found = [things(signal, kind.FromString(part)) for part in parts]
    assert [thing for part in found for thing in part] == things(signal, kind.FromString(body))
    assert all(len(part) == 1 for part in found)
    return parts


@pytest.mark.parametrize("signal", KINDS)
@given(data=st.data())
def test_any_request_comes_apart_into_single_things(signal: str, data: st.DataObject) -> None:
    check(signal, data.draw(messages(KINDS[signal])).SerializeToString())


@pytest.mark.parametrize("kind", ["gauge", "sum", "histogram", "exponential_histogram", "summary"])
def test_points_of_every_type_of_metric_keep_what_their_metric_says(kind: str) -> None:
    request = ExportMetricsServiceRequest()
    scope = request.resource_metrics.add(schema_url="r").scope_metrics.add(schema_url="s")
    scope.scope.name = "x" * 200  # a length of two bytes
    metric = scope.metrics.add(name="m", unit="By")
    data = getattr(metric, kind)
    for i in range(300):
        data.data_points.add(time_unix_nano=i + 1)
    if kind not in ("gauge", "summary"):
        data.aggregation_temporality = 1
    body = request.SerializeToString()
    assert len(check("metrics", body)) == 300
    first, second = halves("metrics", body) or (b"", b"")
    assert len(first) + len(second) < 1.2 * len(body)
    for half in (first, second):
        [[found]] = [[m for s in r.scope_metrics for m in s.metrics] for r in things_of(half)]
        assert len(getattr(found, kind).data_points) == 150


def things_of(body: bytes) -> list[Any]:
    return list(ExportMetricsServiceRequest.FromString(body).resource_metrics)


def test_what_nobody_here_knows_goes_along() -> None:
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add()
    for i in range(3):
        spans.spans.add(name=str(i))
    unknown = b"\xfa\x3f\x03new"  # field 1023
    body = request.SerializeToString() + unknown
    parts = all_parts("traces", body)
    assert len(parts) == 3
    assert all(part.endswith(unknown) for part in parts)


@pytest.mark.parametrize("signal", KINDS)
@pytest.mark.parametrize("body", [b"", b"\x0a\x00", b"\x0b\x0c", b"\x0a\x05", b"\xff" * 20, b"\x08\x01\x08\x02"])
def test_what_holds_nothing_or_is_no_message_cannot_be_cut(signal: str, body: bytes) -> None:
    assert halves(signal, body) is None


def test_a_metric_with_two_types_of_data_is_left_whole() -> None:
    """Of which the last counts: halves of one would bring back the other."""
    gauge, total = Metric(name="m"), Metric()
    for i in range(2):
        gauge.gauge.data_points.add(time_unix_nano=i + 1)
        total.sum.data_points.add(time_unix_nano=i + 1)
    inside = gauge.SerializeToString() + total.SerializeToString()
    scope = b"\x12%c" % len(inside) + inside
    resource = b"\x12%c" % len(scope) + scope
    assert halves("metrics", b"\x0a%c" % len(resource) + resource) is None


def test_the_parts_of_a_control_total_stay_together() -> None:
    request = ExportMetricsServiceRequest()
    scope = request.resource_metrics.add().scope_metrics.add()
    numbers = [number(BASE, BASE + SECOND, i, {conventions.CONTROL_PART: i}) for i in range(4)]
    scope.metrics.append(sum_metric(numbers, conventions.CONTROL_TOTAL))
    scope.metrics.append(sum_metric(numbers))
    parts = [ExportMetricsServiceRequest.FromString(part) for part in all_parts("metrics", request.SerializeToString())]
    sizes = [len(part.resource_metrics[0].scope_metrics[0].metrics[0].sum.data_points) for part in parts]
    assert sizes == [4, 1, 1, 1, 1]


def test_parts_come_in_order_and_what_was_too_large_is_not_asked_for_again() -> None:
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add()
    for i in range(8):
        spans.spans.add(name=str(i))
    parts = Parts("traces", request.SerializeToString())
    assert not parts.is_too_large
    assert [parts.split() for _ in range(3)] == [True] * 3
    sent = []
    while (part := parts.next) is not None:
        if parts.is_too_large and parts.split():
            continue
        sent.append(
            [span.name for span in ExportTraceServiceRequest.FromString(part).resource_spans[0].scope_spans[0].spans]
        )
        parts.done()
    assert sent == [[str(i)] for i in range(8)]


def test_a_request_that_is_all_head_is_not_written_again_for_each_of_its_points(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(splitting, "MAX_REPEATED", 10_000)
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add(schema_url="x" * 4000).scope_spans.add()
    for i in range(1000):
        spans.spans.add(name=str(i))
    parts = Parts("traces", request.SerializeToString())
    assert [parts.split() for _ in range(4)] == [True, True, False, False]
