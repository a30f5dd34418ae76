"""Resources and scopes, of which each stream and each item in quarantine has a copy: decoded once, and bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValueList
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tallymark_collector import wire
from tallymark_collector.errors import TooLarge
from tallymark_collector.metering import Metering, parse_rules
from tallymark_collector.model import Reason, attributes_json
from tallymark_collector.processors import decoding, described, set_aside, spans
from tallymark_collector.processors.decoding import Decoded, decode_metrics, decoding_metrics
from tallymark_collector.processors.spans import DecodedSpans, decode_spans, decoding_spans
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import MAX_ATTRIBUTES, TimeLimits
from tallymark_collector.wire import MAX_VALUES
from tests.support.telemetry import span, spans_of
from tests.support.usage import BASE, SECOND, key_values, number, sum_metric

NOW = BASE + 60 * SECOND
ACME = {"tallymark.account.id": "acme"}
SHOP = {"service.name": "shop", "service.instance.id": "one"}
USAGE = {**ACME, "tallymark.meter.api.requests": 1}
RULES = parse_rules(
    "meters: {m: {unit: '1', sources: [{metric: theirs, account: tenant, quantity: value},"
    " {span: 'GET *', account: tenant, spans_are_complete: true}]}}"
)
LARGE: list[Any] = [
    pytest.param({**SHOP, "label": "x" * (described.MAX_STORED + 1)}, "32,8", id="stored"),
    pytest.param({**SHOP, "process.command_line": "x" * described.MAX_BYTES}, "262,2", id="as it came"),
    pytest.param({**SHOP, **{f"a{i}": 1 for i in range(described.MAX_ATTRIBUTES)}}, "258 attributes", id="attributes"),
]


def message(resource: dict[str, object], *metrics: Metric, scope: dict[str, object] | None = None) -> bytes:
    request = ExportMetricsServiceRequest()
    within = request.resource_metrics.add()
    within.resource.attributes.extend(key_values(resource))
    scoped = within.scope_metrics.add(metrics=metrics)
    scoped.scope.name = "tallymark"
    scoped.scope.attributes.extend(key_values(scope or {}))
    return request.SerializeToString()


def decode(body: bytes, cache: StreamCache | None = None, metering: Metering | None = None) -> Decoded:
    return decode_metrics("default", body, cache or StreamCache(), TimeLimits(), NOW, metering)


def decode_traces(body: bytes, metering: Metering | None = None) -> DecodedSpans:
    return decode_spans("default", body, TimeLimits(), NOW, metering)


@pytest.mark.parametrize("in_scope", [False, True])
@pytest.mark.parametrize(("attributes", "said"), LARGE)
def test_usage_beside_a_large_resource_or_scope_is_kept_as_one(
    attributes: dict[str, object], said: str, in_scope: bool
) -> None:
    points = [number(BASE, NOW - i, 1, {**ACME, "n": i}) for i in range(700)]
    resource, scope = (SHOP, attributes) if in_scope else (attributes, None)
    body = message(resource, sum_metric(points[:500]), sum_metric(points[500:], "tokens"), scope=scope)
    found = decode(body)
    assert found.points == []
    [kept] = found.quarantined
    assert (kept.refusal.reason, kept.time_ns, found.rejected) == (Reason.RESOURCE_TOO_LARGE, NOW, 700)
    assert said in kept.refusal.detail
    assert ("scope" in kept.refusal.detail) is in_scope
    assert kept.payload == body, "whole, and once"
    assert [again.digest() for again in decode(kept.payload).quarantined] == [kept.digest()]


EMPTY: list[Any] = [
    pytest.param(AnyValue(string_value=""), id="empty texts"),
    pytest.param(AnyValue(array_value=ArrayValue()), id="empty arrays"),
    pytest.param(AnyValue(kvlist_value=KeyValueList()), id="empty maps"),
    pytest.param(AnyValue(), id="no values"),
    pytest.param(AnyValue(string_value="\x01"), id="texts that JSON has to escape"),
    pytest.param(AnyValue(bytes_value=b"12"), id="bytes, which become hexadecimal"),
]


@pytest.mark.parametrize("value", EMPTY)
def test_what_is_measured_is_what_is_stored(value: AnyValue) -> None:
    """Of each stream: values that hold nothing take room too."""
    request = ExportMetricsServiceRequest.FromString(message(SHOP, sum_metric([number(BASE, NOW, 1, ACME)])))
    [within] = request.resource_metrics
    within.resource.attributes.add(key="some").value.array_value.values.extend([value] * (described.MAX_STORED // 10))
    [point] = decode(request.SerializeToString()).points
    assert len(attributes_json(point.stream.resource)) <= described.MAX_STORED
    more = AnyValue(array_value=ArrayValue(values=[value] * 10_000))
    within.resource.attributes.add(key="more", value=more)
    within.resource.attributes.add(key="most", value=more)
    found = decode(request.SerializeToString())
    assert found.points == []
    [kept] = found.quarantined
    stored = attributes_json(wire.decode_resource(within.resource.SerializeToString()))
    assert f"{len(stored):,} characters, at most 32,768 are taken" in kept.refusal.detail


def test_a_long_command_line_is_not_stored_and_refuses_nothing() -> None:
    resource = {**SHOP, "process.command_args": "-cp " + "x.jar:" * 20_000}
    [point] = decode(message(resource, sum_metric([number(BASE, NOW, 1, ACME)]))).points
    assert dict(point.stream.resource) == {**SHOP, "process.command_args": "REDACTED"}


def test_what_is_nobodys_usage_is_passed_over_beside_whatever_resource() -> None:
    resource = {**SHOP, "label": "x" * 40_000}
    foreign = sum_metric([number(BASE, NOW, 1, {"tenant": "t"})], "theirs")
    request = ExportMetricsServiceRequest.FromString(message(resource, foreign))
    request.resource_metrics[0].scope_metrics[0].scope.name = "theirs"
    body = request.SerializeToString()
    found = decode(body)
    assert (found.quarantined, found.unmatched) == ([], 1)
    found = decode(body, metering=Metering(RULES))
    assert (len(found.quarantined), found.unmatched, found.rejected) == (1, 0, 1)
    others = parse_rules(
        "meters: {m: {unit: '1', sources: [{metric: theirs, account: tenant, quantity: value, tenants: other}]}}"
    )
    assert decode(body, metering=Metering(others)).unmatched == 1


@pytest.mark.parametrize("in_scope", [False, True])
@pytest.mark.parametrize(("attributes", "said"), LARGE)
def test_spans_beside_a_large_resource_or_scope_are_kept_as_one(
    attributes: dict[str, object], said: str, in_scope: bool
) -> None:
    request = spans_of(
        SHOP if in_scope else attributes,
        [span(1, USAGE, name="x"), span(2, USAGE, name="y"), span(3, {}, name="foreign"), span(4, {}, name="GET /")],
    )
    if in_scope:
        request.resource_spans[0].scope_spans[0].scope.attributes.extend(key_values(attributes))
    found = decode_traces(request.SerializeToString())
    assert (found.evidence, found.points, found.rejected, found.unmatched) == ([], [], 2, 2)
    [kept] = found.quarantined
    assert said in kept.refusal.detail
    payload = ExportTraceServiceRequest.FromString(kept.payload)
    assert [one.name for one in payload.resource_spans[0].scope_spans[0].spans] == ["x", "y"]
    assert decode_traces(request.SerializeToString(), Metering(RULES)).rejected == 3
    assert [again.digest() for again in decode_traces(kept.payload).quarantined] == [kept.digest()]


def test_streams_of_a_resource_share_what_is_decoded_of_it() -> None:
    cache = StreamCache()
    first, second = (
        decode(message(SHOP, sum_metric([number(BASE, NOW, 1, {**ACME, "n": n})])), cache).points[0].stream
        for n in (1, 2)
    )
    assert first.resource is second.resource


def test_streams_of_a_file_of_meters_share_it_too() -> None:
    """Also where something in it is redacted; and what is kept of spans' resources."""
    resource = {**SHOP, "process.command_line": "secret"}
    points = [number(BASE, NOW, 1, {"tenant": f"t{i}"}) for i in range(3)]
    request = ExportMetricsServiceRequest.FromString(message(resource, sum_metric(points, "theirs")))
    request.resource_metrics[0].scope_metrics[0].scope.name = "theirs"
    found = decode(request.SerializeToString(), metering=Metering(RULES)).points
    assert len({id(point.stream) for point in found}) == 3
    assert len({id(point.stream.resource) for point in found}) == 1
    traces = spans_of(resource, [span(n, {"tenant": f"t{n}"}, name="GET /") for n in (1, 2, 3)])
    found = decode_traces(traces.SerializeToString(), Metering(RULES)).points
    assert len({id(point.stream) for point in found}) == 3
    assert len({id(point.stream.resource) for point in found}) == 1


def test_spans_that_are_usage_share_a_copy_of_their_resource() -> None:
    body = spans_of(SHOP, [span(n, {"tenant": "acme"}, name="GET /") for n in (1, 2, 3)]).SerializeToString()
    found = decode_traces(body, Metering(RULES)).points
    assert len({id(point.span[0]) for point in found}) == 1
    assert sum(len(point.span[1]) for point in found) < len(body)


def test_what_cannot_be_billed_of_one_request_takes_no_more_than_a_limit() -> None:
    """Each point's item has its resource beside it: here 10 MiB would become 1 GiB."""
    resource = {**SHOP, "process.command_line": "x" * 200_000}
    points = [number(BASE, NOW, -1, {**ACME, "n": i}) for i in range(set_aside.MAX_BYTES // 200_000 + 1)]
    with pytest.raises(TooLarge, match=r"128 MiB, each point .* send fewer at once\. .*'api.requests'"):
        decode(message(resource, sum_metric(points)))
    found = decode(message(resource, sum_metric(points[: len(points) // 2])))
    assert len(found.quarantined) == found.rejected == len(points) // 2
    with pytest.raises(TooLarge):
        decode_traces(
            spans_of(
                resource, [span(i, {**USAGE, **ACME, "tallymark.meter.x": -1}) for i in range(700)]
            ).SerializeToString()
        )


def test_too_many_attributes_are_refused_and_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    whole = decoding.wire.decode_point_attributes
    monkeypatch.setattr(decoding.wire, "decode_point_attributes", lambda data: read.append(len(data)) or whole(data))
    many = {f"a{i}": i for i in range(MAX_ATTRIBUTES)}
    found = decode(message(SHOP, sum_metric([number(BASE, NOW, 1, {**ACME, **many}), number(BASE, NOW, 1, ACME)])))
    assert [item.refusal.detail for item in found.quarantined] == ["65 attributes, at most 64 are taken"]
    assert (len(found.points), max(read)) == (1, 1)


def test_an_attribute_of_too_many_values_is_refused() -> None:
    for values, points in ((MAX_VALUES, 1), (MAX_VALUES + 1, 0)):
        attribute = key_values({"x": 1})[0]
        nested = attribute.value.array_value.values
        for _ in range(values // 2):
            nested.add().array_value.values.add()
        if values % 2:
            nested.add()
        sent = number(BASE, NOW, 1, ACME)
        sent.attributes.append(attribute)
        found = decode(message(SHOP, sum_metric([sent, number(BASE, NOW, 2, ACME)])))
        # Of so many, the texts are too many for a dimension; what is measured here is the decoding.
        assert len(found.points) == 1
        assert ("holds more than 10,000 values" in found.quarantined[0].refusal.detail) is (points == 0)


def test_a_span_that_tells_too_many_meters_is_refused() -> None:
    """Each is a row with a copy of the span's other attributes."""
    meters = {f"tallymark.meter.m{i}": 1 for i in range(spans.MAX_METERS + 1)}
    found = decode_traces(spans_of(SHOP, [span(1, {**ACME, **meters}), span(2, USAGE)]).SerializeToString())
    assert [item.refusal.detail for item in found.quarantined] == ["65 meters at once, at most 64 are taken"]
    assert len(found.evidence) == 1


def test_a_large_resource_is_kept_once_for_all_of_its_scopes() -> None:
    resource = {**SHOP, "label": "x" * 40_000}
    request = ExportMetricsServiceRequest.FromString(message(resource, sum_metric([number(BASE, NOW, 1, ACME)])))
    [within] = request.resource_metrics
    for _ in range(20):
        within.scope_metrics.add().CopyFrom(within.scope_metrics[0])
    body = request.SerializeToString()
    [kept] = decode(body).quarantined
    assert kept.payload == body
    traces = spans_of(resource, [span(1, USAGE)])
    for number_ in range(2, 20):
        traces.resource_spans[0].scope_spans.add(spans=[span(number_, USAGE)])
    [kept] = decode_traces(traces.SerializeToString()).quarantined
    assert kept.payload == traces.SerializeToString()


def test_a_large_resource_that_cannot_be_read_is_kept_once_and_costs_nobody_else() -> None:
    attribute = key_values({"x": 1})[0]
    for _ in range(MAX_VALUES + 1):
        attribute.value.array_value.values.add(string_value="fifteen letters")
    request = ExportMetricsServiceRequest()
    bad = request.resource_metrics.add()
    bad.resource.attributes.append(attribute)
    bad.scope_metrics.add(metrics=[sum_metric([number(BASE, NOW, 1, {**ACME, "n": i}) for i in range(800)])])
    bad.scope_metrics[0].scope.name = "tallymark"
    request.MergeFromString(message(SHOP, sum_metric([number(BASE, NOW, 1, ACME)])))
    found = decode(request.SerializeToString())
    assert (len(found.points), len(found.quarantined), found.rejected) == (1, 1, 800)
    assert "cannot be read: an attribute holds more than 10,000 values" in found.quarantined[0].refusal.detail


def test_what_says_nothing_is_not_counted_as_refused() -> None:
    """A point that ends its stream, and what a later SDK may say of itself."""
    resource = {**SHOP, "label": "x" * 40_000}
    ended = number(BASE, NOW, 0, ACME)
    ended.flags = decoding.NO_RECORDED_VALUE
    gauge = Metric(name="seats")
    gauge.gauge.data_points.extend([ended, number(0, NOW, 3, ACME)])
    found = decode(message(resource, sum_metric([ended, ended, number(BASE, NOW, 1, ACME)]), gauge))
    assert (len(found.quarantined), found.rejected, found.unmatched) == (1, 2, 0)
    request = ExportMetricsServiceRequest.FromString(message(resource, sum_metric([ended], "tallymark.later")))
    request.resource_metrics[0].scope_metrics[0].scope.name = "tallymark.control"
    found = decode(request.SerializeToString())
    assert (len(found.quarantined), found.rejected, found.unmatched) == (0, 0, 1)


def test_usage_is_known_beside_a_scope_of_any_size() -> None:
    """By the scope's name: the points name no account."""
    scope = {"label": "x" * (described.MAX_BYTES + 1)}
    found = decode(message(SHOP, sum_metric([number(BASE, NOW, 1, {})]), scope=scope))
    assert (found.rejected, found.unmatched) == (1, 0)


def test_what_was_let_in_before_is_read_whatever_the_limits_are_now() -> None:
    resource = {**SHOP, "label": "x" * 40_000}
    cache = StreamCache(kept=True)
    assert len(decode(message(resource, sum_metric([number(BASE, NOW, 1, ACME)])), cache).points) == 1
    body = spans_of(resource, [span(1, USAGE)]).SerializeToString()
    assert len(decode_spans("default", body, TimeLimits(), NOW, kept=True).evidence) == 1


def test_scopes_beside_one_resource_cost_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resource of 30 KB and 20,000 scopes of two bytes decoded it 20,000 times, without a rest."""
    read = []
    whole = described.wire.decode_resource
    monkeypatch.setattr(described.wire, "decode_resource", lambda data: read.append(len(data)) or whole(data))
    resource = {**SHOP, "label": "x" * 30_000}
    request = ExportMetricsServiceRequest.FromString(message(resource, sum_metric([number(BASE, NOW, 1, ACME)])))
    traces = spans_of(resource, [span(1, USAGE)])
    for i in range(20_000):
        request.resource_metrics[0].scope_metrics.add()
        traces.resource_spans[0].scope_spans.add()
        if i % 100 == 0:
            request.resource_metrics[0].scope_metrics[-1].scope.name = f"scope {i}"
            request.resource_metrics[0].scope_metrics[-1].metrics.add().sum.data_points.add()
            traces.resource_spans[0].scope_spans[-1].scope.name = f"scope {i}"
            traces.resource_spans[0].scope_spans[-1].spans.add()
    body, metering = request.SerializeToString(), Metering(RULES)
    arguments = ("default", body, StreamCache(), TimeLimits(), NOW)
    assert rests(lambda to: decoding_metrics(*arguments, to, metering), Decoded()) >= 20_000 // decoding.PIECE
    body = traces.SerializeToString()
    assert rests(lambda to: decoding_spans("default", body, TimeLimits(), NOW, to, metering), DecodedSpans()) >= 70
    assert len(read) <= 4, "once for each reader: metrics, spans, and the file of meters for both"


def rests(work: Callable[[Any], Any], decoded: Any) -> int:
    """How often others have their turn, each time after a bounded number of items."""
    found, before = 0, 0
    for _ in work(decoded):
        found += 1
        now = len(decoded.points) + len(getattr(decoded, "evidence", ())) + len(decoded.quarantined)
        assert now - before <= 2 * max(spans.PIECE, decoding.SLOW_PIECE)
        before = now
    return found


def test_others_have_their_turn_while_new_streams_are_made() -> None:
    points = [number(BASE, NOW, 1 - 2 * (i % 2), {**ACME, "n": i}) for i in range(4000)]
    body = message(SHOP, sum_metric(points))
    made = rests(lambda to: decoding_metrics("default", body, StreamCache(), TimeLimits(), NOW, to), Decoded())
    assert made >= 4000 // decoding.SLOW_PIECE - 1


def test_others_have_their_turn_within_a_metric_that_a_file_names() -> None:
    points = [number(BASE, NOW, 1, {"tenant": "t", "n": i}) for i in range(4000)]
    request = ExportMetricsServiceRequest.FromString(message(SHOP, sum_metric(points, "theirs")))
    request.resource_metrics[0].scope_metrics[0].scope.name = "theirs"
    body, metering = request.SerializeToString(), Metering(RULES)
    made = rests(
        lambda to: decoding_metrics("default", body, StreamCache(), TimeLimits(), NOW, to, metering), Decoded()
    )
    assert made >= 4000 // 256 - 1


def test_others_have_their_turn_between_spans_and_large_resources() -> None:
    body = spans_of(SHOP, [span(i, USAGE) for i in range(2000)]).SerializeToString()
    made = rests(lambda to: decoding_spans("default", body, TimeLimits(), NOW, to), DecodedSpans())
    assert made >= 2000 // spans.PIECE - 1
    request = ExportMetricsServiceRequest()
    for i in range(100):
        part = message(
            {**SHOP, "n": i, "process.command_line": "x" * 100_000}, sum_metric([number(BASE, NOW, 1, ACME)])
        )
        request.MergeFromString(part)
    body = request.SerializeToString()
    decoded = Decoded()
    assert rests(lambda to: decoding_metrics("default", body, StreamCache(), TimeLimits(), NOW, to), decoded) >= 30
    assert len(decoded.points) == 100
