"""From OTLP bytes to points: what counts, what is kept aside and why, what is dropped, what is refused whole."""

from __future__ import annotations

import contextlib
import gc
import math
import tracemalloc
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint

from tallymark_collector.errors import MalformedRequest
from tallymark_collector.model import Reason, Temporality
from tallymark_collector.processors.decoding import PIECE, Decoded, decode_metrics, decoding_metrics
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import MAX_ATTRIBUTES, TimeLimits
from tests.support.usage import BASE, SECOND, number, request, sum_metric

NOW = BASE + 60 * SECOND
ACME = {"tallymark.account.id": "acme"}


def decode(
    message: ExportMetricsServiceRequest | bytes, cache: StreamCache | None = None, tenant: str = "default"
) -> Decoded:
    body = message if isinstance(message, bytes) else message.SerializeToString()
    return decode_metrics(tenant, body, cache or StreamCache(), TimeLimits(), NOW)


def one(value: float = 5, attributes: dict[str, object] | None = None, **times: int) -> ExportMetricsServiceRequest:
    start, end = times.get("start", BASE), times.get("end", BASE + 10 * SECOND)
    return request(sum_metric([number(start, end, value, ACME if attributes is None else attributes)]))


def test_a_point() -> None:
    [point] = decode(one(7, {**ACME, "http.route": "/a", "tallymark.plan": "pro"})).points
    assert (point.start_ns, point.time_ns, point.value) == (BASE, BASE + 10 * SECOND, Decimal(7))
    assert (point.stream.series.account, point.stream.series.meter) == ("acme", "api.requests")
    assert dict(point.stream.series.attributes) == {"http.route": "/a", "tallymark.plan": "pro"}
    assert point.stream.temporality is Temporality.DELTA


def test_a_double_is_its_shortest_decimal() -> None:
    [point] = decode(one(0.1)).points
    assert point.value == Decimal("0.1")


def identity(message: ExportMetricsServiceRequest, tenant: str = "default") -> object:
    [point] = decode(message, tenant=tenant).points
    return point.stream.id


def test_the_order_of_attributes_does_not_matter_to_a_stream() -> None:
    ab = one(attributes={**ACME, "a": 1, "b": 2})
    ba = one(attributes={"b": 2, **ACME, "a": 1})
    cache = StreamCache()
    assert decode(ab, cache).points[0].stream.id == decode(ba, cache).points[0].stream.id


def test_what_makes_another_stream() -> None:
    plain = [number(BASE, NOW, 1, ACME)]
    others = [
        request(sum_metric(plain)),
        request(sum_metric(plain), producer="two"),
        request(sum_metric(plain), **{"service.namespace": "eu"}),
        request(sum_metric(plain, name="other")),
        request(sum_metric(plain, unit="By")),
        request(sum_metric(plain, temporality=2)),
        request(sum_metric([number(BASE, NOW, 1, {**ACME, "x": 1})])),
        request(sum_metric([number(BASE, NOW, 1, {**ACME, "x": "1"})])),
        request(sum_metric([number(BASE, NOW, 1, {**ACME, "x": 1.0})])),
        request(sum_metric([number(BASE, NOW, 1, {**ACME, "x": True})])),
    ]
    identities = [identity(message) for message in others]
    identities += [identity(others[0], tenant="another"), identity(request(sum_metric(plain), scope="tallymark2"))]
    assert len(set(identities)) == len(identities)


def test_what_does_not() -> None:
    plain = [number(BASE, NOW, 1, ACME)]
    decorated = request(sum_metric(plain), **{"k8s.pod.name": "web-1"})
    described = request(sum_metric([number(BASE, NOW, 1.0, ACME)]))
    described.resource_metrics[0].scope_metrics[0].metrics[0].description = "said another way"
    assert identity(request(sum_metric(plain))) == identity(decorated) == identity(described)


def test_without_an_instance_the_whole_resource_identifies() -> None:
    one_pod, other_pod = (request(sum_metric([number(BASE, NOW, 1, ACME)]), pod=pod) for pod in ("1", "2"))
    for message in (one_pod, other_pod):
        del message.resource_metrics[0].resource.attributes[1]
    assert identity(one_pod) != identity(other_pod)


def test_identities_are_the_same_in_every_version() -> None:
    """A changed fingerprint would bill every retry across an upgrade twice: this value is never edited."""
    assert str(identity(one(attributes={**ACME, "http.route": "/a", "n": 5, "x": 0.5}))) == STABLE


STABLE = "28fbfcbd-c29f-9cda-f087-940b306a989f"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (one(attributes={}), Reason.ACCOUNT_MISSING),
        (one(attributes={"tallymark.account.id": ""}), Reason.ACCOUNT_MISSING),
        (one(attributes={"tallymark.account.id": True}), Reason.ATTRIBUTES_INVALID),
        (one(attributes={"tallymark.account.id": "x" * 257}), Reason.ATTRIBUTES_INVALID),
        (one(attributes={"tallymark.account.id": "a\0b"}), Reason.ATTRIBUTES_INVALID),
        (one(attributes={**ACME, "note": "a\0b"}), Reason.ATTRIBUTES_INVALID),
        (one(attributes={**ACME, "note": "x" * 5000}), Reason.ATTRIBUTES_INVALID),
        (one(attributes={**ACME, **{f"a{i}": 1 for i in range(MAX_ATTRIBUTES)}}), Reason.ATTRIBUTES_INVALID),
        (one(attributes={"otel.metric.overflow": True}), Reason.ATTRIBUTE_OVERFLOW),
        (one(math.nan), Reason.VALUE_NOT_FINITE),
        (one(math.inf), Reason.VALUE_NOT_FINITE),
        (one(-1), Reason.VALUE_NEGATIVE),
        (one(end=0, start=0), Reason.TIME_MISSING),
        (one(start=NOW, end=NOW - 1), Reason.TIME_REVERSED),
        (one(end=NOW + 3600 * SECOND), Reason.TIME_AHEAD),
        (one(end=2**64 - 1, start=2**64 - 1), Reason.TIME_AHEAD),
        (one(start=1, end=NOW - 500 * 86400 * SECOND), Reason.TIME_TOO_OLD),
        (request(sum_metric([number(BASE, NOW, 1, ACME)], temporality=0)), Reason.TEMPORALITY_MISSING),
        (request(sum_metric([number(BASE, NOW, 1, ACME)], monotonic=False)), Reason.TYPE_UNSUPPORTED),
        (request(sum_metric([number(BASE, NOW, 1, ACME)], name="")), Reason.METER_INVALID),
        (request(sum_metric([number(BASE, NOW, 1, ACME)], name="a\0b")), Reason.METER_INVALID),
        (request(sum_metric([number(BASE, NOW, 1, ACME)], unit="x" * 64)), Reason.METER_INVALID),
    ],
)
def test_a_point_that_cannot_be_billed_is_kept_whole_with_its_reason(
    message: ExportMetricsServiceRequest, reason: Reason
) -> None:
    decoded = decode(message)
    assert decoded.points == []
    assert decoded.rejected == 1
    [kept] = decoded.quarantined
    assert kept.refusal.reason is reason
    again = ExportMetricsServiceRequest.FromString(kept.payload)
    assert again.resource_metrics[0].resource == message.resource_metrics[0].resource
    assert again.resource_metrics[0].scope_metrics[0] == message.resource_metrics[0].scope_metrics[0]


def test_a_bad_point_does_not_harm_its_neighbours() -> None:
    points = [number(BASE, NOW, value, ACME) for value in (1, -1, 2)]
    decoded = decode(request(sum_metric(points)))
    assert [point.value for point in decoded.points] == [1, 2]
    assert decoded.rejected == 1


def test_a_point_without_a_value() -> None:
    message = one()
    message.resource_metrics[0].scope_metrics[0].metrics[0].sum.data_points[0].ClearField("as_int")
    assert decode(message).quarantined[0].refusal.reason is Reason.VALUE_MISSING


def test_a_point_that_says_it_holds_nothing_is_not_a_point() -> None:
    message = one()
    message.resource_metrics[0].scope_metrics[0].metrics[0].sum.data_points[0].flags = 1
    assert decode(message) == Decoded()


def test_foreign_telemetry_is_counted_and_dropped() -> None:
    cpu = Metric(name="cpu")
    cpu.gauge.data_points.add(as_double=1, time_unix_nano=NOW)
    decoded = decode(request(sum_metric([number(BASE, NOW, 1, {"a": 1})]), cpu, scope="runtime"))
    assert (decoded.unmatched, decoded.points, decoded.quarantined) == (2, [], [])


def test_a_foreign_counter_that_names_an_account_is_usage() -> None:
    metric = sum_metric([number(BASE, NOW, 1, ACME), number(BASE, NOW, 2, {})], name="jobs")
    decoded = decode(request(metric, scope="their.library"))
    assert [point.stream.series.meter for point in decoded.points] == ["jobs"]
    assert [kept.refusal.reason for kept in decoded.quarantined] == [Reason.ACCOUNT_MISSING]


@pytest.mark.parametrize("kind", ["histogram", "exponential_histogram", "summary"])
def test_a_metric_of_a_type_that_is_not_billed_is_kept_whole(kind: str) -> None:
    metric = Metric(name="latency")
    for _ in range(2):
        point = getattr(metric, kind).data_points.add(time_unix_nano=NOW)
        point.attributes.add(key="tallymark.account.id").value.string_value = "acme"
    decoded = decode(request(metric, scope="their.library"))
    assert decoded.rejected == 2
    [kept] = decoded.quarantined
    assert kept.refusal.reason is Reason.TYPE_UNSUPPORTED
    assert ExportMetricsServiceRequest.FromString(kept.payload).resource_metrics[0].scope_metrics[0].metrics == [metric]


def test_integer_accounts_are_their_digits() -> None:
    [point] = decode(one(attributes={"tallymark.account.id": 42})).points
    assert point.stream.series.account == "42"


def test_the_cache_forgets_without_changing_anything() -> None:
    cache = StreamCache(limit=3)
    messages = [one(attributes={"tallymark.account.id": f"a{i % 5}"}) for i in range(20)]
    for message in messages:
        assert identity(message) == decode(message, cache).points[0].stream.id


def test_the_cache_is_bounded_in_bytes_too() -> None:
    """A resource, scope or attribute may be as large as a request, and 200,000 of those are no bound."""
    cache = StreamCache(limit_bytes=1 << 20)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for i in range(40):
            long = f"{i}" + "x" * 50_000
            decode(request(sum_metric([number(BASE, NOW, 1, ACME)]), producer=long), cache)
            decode(request(sum_metric([number(BASE, NOW, 1, ACME)]), scope=f"tallymark.{long}"), cache)
            decode(one(attributes={**ACME, "dimension": long}), cache)
            decode(request(sum_metric([], name=long)), cache)
            assert cache.weight <= (1 << 20) + 9 * 50_200
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held < 2 << 20


def test_the_cache_is_bounded_whatever_differs() -> None:
    cache = StreamCache(limit=50)
    sizes = []
    for i in range(500):
        decode(request(sum_metric([], name=f"empty{i}")), cache)
        decode(request(sum_metric([number(BASE, NOW, 1, ACME)]), scope=f"tallymark.{i}"), cache)
        decode(request(sum_metric([number(BASE, NOW, 1, ACME)]), producer=str(i)), cache)
        sizes.append(cache.size)
    assert 40 < max(sizes) <= 50


@pytest.mark.parametrize("body", [b"\x0a\x05abc", b"\xff", b"not protobuf at all", b"\x0a\xff\xff\xff\xff\x0f"])
def test_malformed(body: bytes) -> None:
    with pytest.raises(MalformedRequest, match="not an OTLP ExportMetricsServiceRequest"):
        decode(body)


@pytest.mark.parametrize("part", [b"acme", b"tallymark.account.id", b"shop", b"tallymark"])
def test_what_is_malformed_inside_a_point_is_that_points_refusal(part: bytes) -> None:
    """The first attribute of the first point, its resource or its scope; the good point beside it is kept."""
    good = one(attributes={"tallymark.account.id": "globex"})
    broken = one().SerializeToString().replace(part, b"\xff" * len(part), 1)
    decoded = decode(broken + good.SerializeToString())
    assert [point.stream.series.account for point in decoded.points] == ["globex"]
    if part != b"tallymark":  # a scope that cannot be read still has a point that names an account
        assert [kept.refusal.reason for kept in decoded.quarantined] == [Reason.ATTRIBUTES_INVALID]
    assert decoded.rejected == 1


def test_attributes_nested_without_end_are_refused() -> None:
    message = one()
    value = message.resource_metrics[0].scope_metrics[0].metrics[0].sum.data_points[0].attributes.add(key="deep").value
    for _ in range(30):
        value = value.array_value.values.add()
    value.int_value = 1
    assert [kept.refusal.reason for kept in decode(message).quarantined] == [Reason.ATTRIBUTES_INVALID]


@pytest.mark.parametrize("value", [1e-31, 1e26, 5e-324, 1.7e308])
def test_quantities_that_could_not_be_priced_exactly_are_kept_aside(value: float) -> None:
    assert [kept.refusal.reason for kept in decode(one(value)).quarantined] == [Reason.VALUE_OUT_OF_RANGE]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_bytes_decode_or_are_malformed(data: st.DataObject) -> None:
    """No other exception, whatever arrives: random bytes, and requests with bytes changed."""
    body = bytearray(one(3, {**ACME, "n": 5, "x": 0.5, "route": "/a"}).SerializeToString())
    for position in data.draw(st.lists(st.integers(0, len(body) - 1), max_size=6)):
        body[position] = data.draw(st.integers(0, 255))
    for candidate in (bytes(body), data.draw(st.binary(max_size=60))):
        with contextlib.suppress(MalformedRequest):
            decode(candidate)


_numbers = st.builds(
    lambda start, end, value, attributes, flags, exemplar, later: (
        start,
        end,
        value,
        attributes,
        flags,
        exemplar,
        later,
    ),
    st.sampled_from([0, BASE, BASE + 1, NOW + 1]),
    st.sampled_from([0, BASE, NOW]),
    st.sampled_from([0, 1, 7, -1, 2**63 - 1, 0.5, -0.5, math.nan]),
    st.sampled_from(
        [{}, ACME, {"tallymark.account.id": "globex"}, {**ACME, "a": 1}, {"a": 1, **ACME}, {**ACME, "a": 2}]
    ),
    st.sampled_from([0, 0, 1, 2]),
    st.booleans(),
    st.sampled_from([b"", b"\x7a\x01x", b"\x31" + bytes(8)]),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(_numbers, min_size=1, max_size=30))
def test_a_cache_changes_nothing(drawn: list[tuple[int, int, float, dict[str, object], int, bool, bytes]]) -> None:
    """All points in one request, twice, with one cache, are what each of them is alone, with none: exemplars, flags,
    times and values that are missing or wrong, fields that nobody knows, fields given twice."""
    points = []
    for start, end, value, attributes, flags, exemplar, later in drawn:
        point = number(start, end, value, attributes)
        point.flags = flags
        if exemplar:
            point.exemplars.add(time_unix_nano=end, as_int=len(points))
        points.append(type(point).FromString(point.SerializeToString() + later))
    cache = StreamCache()

    def said(decoded: Decoded) -> list[object]:
        taken = [(p.stream.id, p.stream.series, p.start_ns, p.time_ns, str(p.value)) for p in decoded.points]
        return [*taken, *((q.refusal, q.account, q.time_ns) for q in decoded.quarantined)]

    alone = [item for point in points for item in said(decode(request(sum_metric([point]))))]
    for _ in range(2):
        together = said(decode(request(sum_metric(points)), cache))
        assert sorted(map(repr, together)) == sorted(map(repr, alone))


def test_exemplars_do_not_fill_the_cache() -> None:
    cache = StreamCache()
    sizes = set()
    for i in range(50):
        point = number(BASE, NOW, 5, ACME)
        point.exemplars.add(time_unix_nano=NOW, as_int=i)
        decode(request(sum_metric([point, number(BASE, NOW, 5, ACME)])), cache)
        sizes.add(cache.size)
    assert len(sizes) == 1


def test_a_large_request_is_decoded_in_pieces_and_others_in_between() -> None:
    """With one cache, which is small enough to be cleared in the middle of each."""
    points = [number(BASE, NOW - i, 1 + i, {**ACME, "n": i % 700}) for i in range(3 * PIECE)]
    bodies = [
        request(sum_metric(points)).SerializeToString(),
        request(*(sum_metric([point], name=f"m{i % 9}") for i, point in enumerate(points[::2]))).SerializeToString(),
    ]
    cache = StreamCache(limit=500)
    found = [Decoded() for _ in bodies]
    work = [
        decoding_metrics("default", body, cache, TimeLimits(), NOW, decoded)
        for body, decoded in zip(bodies, found, strict=True)
    ]
    rests = 0
    while work:
        for one in list(work):
            before = sum(len(decoded.points) for decoded in found)
            try:
                next(one)
            except StopIteration:
                work.remove(one)
            else:
                rests += 1
            assert sum(len(decoded.points) for decoded in found) - before <= 2 * PIECE
    assert rests >= 3
    for body, decoded in zip(bodies, found, strict=True):
        expected = decode(body).points
        assert [(p.stream.id, p[1:]) for p in decoded.points] == [(p.stream.id, p[1:]) for p in expected]
    assert cache.size <= 500 + 2 * 700, "what was cleared is dropped with the request that still held it"


def gauge(*points: NumberDataPoint, name: str = "seats") -> Metric:
    metric = Metric(name=name, unit="{seat}")
    metric.gauge.data_points.extend(points)
    return metric


def test_what_a_stream_stands_at_is_no_amount() -> None:
    """A gauge, and a running total that may fall; each is another stream than a counter of its name."""
    points = [number(BASE, NOW, -3, ACME)]
    decoded = decode(
        request(
            gauge(*points, name="seats"),
            sum_metric(points, "seats", "{seat}", temporality=2, monotonic=False),
            sum_metric([number(BASE, NOW, 3, ACME)], "seats", "{seat}", temporality=2),
            scope="their.library",
        )
    )
    assert decoded.quarantined == []
    assert [(p.stream.temporality, p.value) for p in decoded.points] == [
        (Temporality.LEVEL, -3),
        (Temporality.LEVEL, -3),
        (Temporality.CUMULATIVE, 3),
    ]
    assert len({p.stream.id for p in decoded.points}) == 3
    assert len({p.stream.series.id for p in decoded.points}) == 1


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        (number(0, NOW, 1, {}), Reason.ACCOUNT_MISSING),
        (number(0, NOW, float("nan"), ACME), Reason.VALUE_NOT_FINITE),
        (number(0, NOW, -1e26, ACME), Reason.VALUE_OUT_OF_RANGE),
        (number(0, 0, 1, ACME), Reason.TIME_MISSING),
        (number(0, NOW + 3600 * SECOND, 1, ACME), Reason.TIME_AHEAD),
    ],
)
def test_a_level_that_cannot_be_kept_is_in_quarantine_as_it_came(point: NumberDataPoint, reason: Reason) -> None:
    sent = gauge(point)
    decoded = decode(request(gauge(point, number(0, NOW, 2, ACME)), scope="their.library"))
    assert [p.value for p in decoded.points] == [2]
    [kept] = decoded.quarantined
    assert (kept.refusal.reason, kept.meter, decoded.rejected) == (reason, "seats", 1)
    payload = ExportMetricsServiceRequest.FromString(kept.payload)
    [came] = payload.resource_metrics[0].scope_metrics[0].metrics
    assert came == sent
