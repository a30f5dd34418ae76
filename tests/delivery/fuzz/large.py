"""Resources and scopes about as large as they may be, with usage beside them, some of it refused: just below the limits
all is taken apart, just above them what is usage is one item, and of too much that is refused nothing is kept.

What has to become of each is known from how it was made.
"""

from __future__ import annotations

import json
import random
from typing import Any, Final

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tallymark_collector import wire
from tallymark_collector.processors import described, set_aside
from tests.delivery.fuzz.mutation import Input, Sent
from tests.support.telemetry import histogram, histogram_point
from tests.support.usage import SECOND, key_values, number, sum_metric

EDGES: Final = ("attributes", "characters", "bytes", "nesting", "nesting, larger", "values")
MANY: Final = (0, 1, 40, 300)
"""Refused points beside it."""
MOST_BYTES: Final = 2**18
"""Of copies that are kept of what is large, where it is not a flood of them."""
FLOODS: Final = (0.9, 1.1)
"""Of what may be kept of one request: under it and over it."""
FLOODED: Final = 0.02
"""Of large inputs: what they take of time and memory is most of it."""
_REDACTED: Final = "process.command_line"
"""Whose value is never stored, so that only the size of what was sent counts."""


def large_input(seed: int, place: int, now_ns: int) -> Input:
    """The input of that number."""
    rng = random.Random(f"{seed}/{place}/large")
    what, edge = rng.choice(("resource", "scope")), rng.choice(EDGES)
    step = rng.choice((-1, 0, 1))
    by_file = rng.random() < 0.5
    signal = rng.choice(("metrics", "traces"))
    good, bad = rng.choice((0, 1, 5)), rng.choice(MANY)
    if rng.random() < FLOODED:
        return flood(place, now_ns, rng.choice(FLOODS))
    resource = _resource(place)
    scope = InstrumentationScope(name="tallymark" if signal == "metrics" and not by_file else "gateway")
    _fill(resource if what == "resource" else scope, edge, step)
    if step <= 0:
        bad = min(bad, MOST_BYTES // (resource.ByteSize() + scope.ByteSize()))
    message = (_metrics if signal == "metrics" else _traces)(resource, scope, good, bad, place, now_ns, by_file)
    sent = _sent(edge, step, what, signal, good, bad, by_file)
    name = f"large {what}: {edge} {step:+}"
    return Input(place, signal, "protobuf", message.SerializeToString(), name, by_file, sent)


def flood(place: int, now_ns: int, share: float) -> Input:
    """Refused points beside a resource of the largest size: all that may be kept of one request, times `share`."""
    resource, scope = _resource(place), InstrumentationScope(name="tallymark")
    _fill(resource, "bytes", 0)
    bad = round(share * set_aside.MAX_BYTES / resource.ByteSize())
    message = _metrics(resource, scope, 1, bad, place, now_ns, by_file=False)
    sent = Sent(0, 0, 0, 0, 0, True) if share > 1 else Sent(1, 0, bad, bad, 1, False)
    return Input(place, "metrics", "protobuf", message.SerializeToString(), f"flood: {share}", False, sent)


def _resource(place: int) -> Resource:
    return Resource(attributes=key_values({"service.name": "kong", "service.instance.id": f"large.{place}"}))


def _fill(large: Any, edge: str, step: int) -> None:
    """Brings it to the limit, and so much beyond."""
    match edge:
        case "attributes":
            for at in range(described.MAX_ATTRIBUTES + step - len(large.attributes)):
                large.attributes.add(key=f"a{at}").value.int_value = at
        case "characters":
            stored: dict[str, object] = {item.key: item.value.string_value for item in large.attributes}
            stored |= {"label": {"a": ["ä" * 1000], "b": 1}, "text": ""}
            beside = len(json.dumps(stored, ensure_ascii=False, separators=(",", ":")))
            beside += len(getattr(large, "name", ""))
            inner = large.attributes.add(key="label").value.kvlist_value.values
            inner.add(key="a").value.array_value.values.add(string_value="ä" * 1000)
            inner.add(key="b").value.int_value = 1
            large.attributes.add(key="text").value.string_value = "x" * (described.MAX_STORED + step - beside)
        case "bytes":
            text = large.attributes.add(key=_REDACTED).value
            _pad(large, text, described.MAX_BYTES + step)
        case "nesting" | "nesting, larger":
            value = AnyValue(string_value="x")
            for _ in range(wire.MAX_DEPTH + step):
                outer = AnyValue()
                outer.array_value.values.add().CopyFrom(value)
                value = outer
            large.attributes.append(KeyValue(key="deep", value=value))
            text = large.attributes.add(key="text").value
            _pad(large, text, described.MAX_UNREADABLE + (edge != "nesting"))
        case "values":
            values = large.attributes.add(key="process.command_args").value.array_value.values
            for _ in range(wire.MAX_VALUES + step):
                values.add().bool_value = True


def _pad(large: Any, text: AnyValue, size: int) -> None:
    """Makes the message exactly so large."""
    text.string_value = "x" * (size - large.ByteSize() - 16)
    text.string_value += "x" * (size - large.ByteSize())
    while large.ByteSize() > size:
        text.string_value = text.string_value[:-1]
    assert large.ByteSize() == size, "a length in front of it took another byte"


def _metrics(
    resource: Resource, scope: InstrumentationScope, good: int, bad: int, place: int, now_ns: int, by_file: bool
) -> ExportMetricsServiceRequest:
    begin = now_ns - 60 * SECOND
    whole = ExportMetricsServiceRequest()
    outer = whole.resource_metrics.add(resource=resource)
    inner = outer.scope_metrics.add(scope=scope)
    if not good + bad:
        pass
    elif by_file:
        known = {"key.id": "k1", "http.response.status_code": 200}
        points = [histogram_point(begin, begin + SECOND + at, 2, 0.5, known) for at in range(good)]
        points += [
            histogram_point(begin, begin + SECOND + at, 2, 0.5, {"http.response.status_code": 200, "n": at})
            for at in range(bad)
        ]
        inner.metrics.append(histogram(points))
    else:
        named: dict[str, object] = {"tallymark.account.id": "large"}
        numbers = [number(begin, begin + SECOND + at, 3, named) for at in range(good)]
        numbers += [number(begin, begin + SECOND + at, -1, named) for at in range(bad)]
        inner.metrics.append(sum_metric(numbers))
    # What is nobody's usage is passed over, whatever it stands beside.
    other = outer.scope_metrics.add(scope=InstrumentationScope(name="other"))
    other.metrics.append(sum_metric([number(begin, begin + SECOND, place, {"x": 1})], "queue.length"))
    return whole


def _traces(
    resource: Resource, scope: InstrumentationScope, good: int, bad: int, place: int, now_ns: int, by_file: bool
) -> ExportTraceServiceRequest:
    begin = now_ns - 60 * SECOND
    whole = ExportTraceServiceRequest()
    outer = whole.resource_spans.add(resource=resource)
    if by_file:
        fine, wrong = {"key.id": "k1", "http.response.status_code": 200}, {"http.response.status_code": 200}
    else:
        fine, wrong = ({"tallymark.account.id": "large", "tallymark.meter.api": value} for value in (1, -1))
    spans = [
        Span(
            trace_id=(place + 1).to_bytes(16, "big"),
            span_id=(at + 1).to_bytes(8, "big"),
            name="ingress",
            kind=2,  # type: ignore[arg-type]
            start_time_unix_nano=begin,
            end_time_unix_nano=begin + SECOND,
            attributes=key_values(fine if at < good else wrong),  # type: ignore[arg-type]
        )
        for at in range(good + bad)
    ]
    spans.append(Span(name="nothing", start_time_unix_nano=begin, end_time_unix_nano=begin + 1))
    outer.scope_spans.add(scope=scope, spans=spans)
    return whole


def _sent(edge: str, step: int, what: str, signal: str, good: int, bad: int, by_file: bool) -> Sent:
    """What has to become of it."""
    usage = good + bad
    meters = 2 if by_file and signal == "metrics" else 1  # one histogram is two meters
    if step > 0 and edge == "nesting" and not (what == "scope" and signal == "traces" and not by_file):
        # It is small and cannot be read, so each point is refused. Nothing is known of the service then.
        if by_file and signal == "metrics":
            return Sent(0, 0, usage, usage, 1, False)
        return Sent(0, 0, usage, usage, 1, False) if not by_file else Sent(0, 0, 0, 0, usage + 1, False)
    if step > 0 and edge != "nesting":
        # Where the file takes every span, it takes what is large with any name.
        beside = int(signal == "traces" and by_file)
        kept = usage + beside
        return Sent(0, 0, kept, int(kept > 0), 1 - beside, False)
    evidence = good if signal == "traces" else 0
    points = good * meters if by_file or signal == "metrics" else 0
    return Sent(points, evidence, bad, bad * meters, 1, False)
