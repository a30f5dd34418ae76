"""Gauges and UpDownCounters as a file of meters reads them: levels, and never amounts."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint

from tallymark_collector.metering import Metering, Rules, parse_rules
from tallymark_collector.model import Point, Reason, Temporality
from tallymark_collector.processors.decoding import Decoded, decode_metrics
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits
from tallymark_collector.wire import encode_point
from tests.support.telemetry import histogram, histogram_point, metrics_of
from tests.support.usage import BASE, SECOND, number, sum_metric

NOW = BASE + 1000 * SECOND
POD = {"service.name": "portal", "service.instance.id": "one"}
ACME: dict[str, object] = {"org": "acme"}
KINDS = ("gauge", "updowncounter")


def rules(fields: str = "", unit: str = "'{seat}'", metric: str = "seats", aggregation: str = "level") -> Rules:
    source = f"{{metric: {metric}, quantity: value, account: org{fields}}}"
    return parse_rules(f"meters: {{m: {{unit: {unit}, aggregation: {aggregation}, sources: [{source}]}}}}")


def level(kind: str, *points: NumberDataPoint, name: str = "seats", unit: str = "{seat}") -> Metric:
    if kind == "updowncounter":
        return sum_metric(points, name, unit, temporality=2, monotonic=False)
    metric = Metric(name=name, unit=unit)
    metric.gauge.data_points.extend(points)
    return metric


def at(value: float, attributes: dict[str, object] | None = None, seconds: int = 10, start: int = 0) -> NumberDataPoint:
    return number(start, BASE + seconds * SECOND, value, ACME if attributes is None else attributes)


def decode(file: Rules, *metrics: Metric, resource: dict[str, object] | None = None) -> Decoded:
    return again(file, metrics_of(resource or POD, *metrics).SerializeToString())


def again(file: Rules, body: bytes) -> Decoded:
    return decode_metrics("default", body, StreamCache(), TimeLimits(), NOW, Metering(file))


def only(file: Rules, *metrics: Metric, **more: Any) -> Point:
    found = decode(file, *metrics, **more)
    assert not found.quarantined
    [point] = found.points
    return point


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("measured", "fields", "unit", "value"),
    [
        (7, "", "'{seat}'", "7"),
        (-3, "", "'{seat}'", "-3"),
        (0, "", "'{seat}'", "0"),
        (0.1, ", factor: 1/1000", "'{seat}'", "0.0001"),
        (2**62, ", factor: 1024, source_unit: '{seat}'", "By", "4722366482869645213696"),
    ],
)
def test_what_a_stream_stands_at(kind: str, measured: float, fields: str, unit: str, value: str) -> None:
    file = rules(fields, unit)
    point = only(file, level(kind, at(measured)))
    assert point.value == Decimal(value)
    assert (point.stream.temporality, point.metered) == (Temporality.LEVEL, True)
    assert (point.stream.series.account, point.stream.series.unit) == ("acme", unit.strip("'"))
    # Written for the quarantine, it is what was measured, and read again the same level.
    [back] = again(file, encode_point(point)).points
    assert (back.value, back.stream.id, back.time_ns) == (point.value, point.stream.id, point.time_ns)
    assert back.stream.source == point.stream.source


@pytest.mark.parametrize("kind", KINDS)
def test_streams_stay_apart_in_one_series_and_their_source_is_nobodys(kind: str) -> None:
    file = rules(", dimensions: [region]")
    pods = [at(n, {**ACME, "region": "eu", "pod": f"p{n}"}) for n in (1, 2)]
    first, second = decode(file, level(kind, *pods)).points
    assert first.stream.series == second.stream.series
    assert first.stream.id != second.stream.id
    assert first.stream.source is not None
    assert second.stream.source is not None
    assert first.stream.source.id != second.stream.source.id
    # Billed to somebody else, by another factor and other dimensions: another stream of the same source.
    moved = parse_rules(
        "meters: {m: {unit: '{seat}', aggregation: level, sources: [{metric: seats, quantity: value, factor: 2,"
        " account: {attribute: org, map: {acme: globex}}}]}}"
    )
    found = only(moved, level(kind, pods[0]))
    assert found.stream.series.account == "globex"
    assert found.stream.id != first.stream.id
    assert found.stream.source is not None
    assert (found.stream.source.id, found.stream.source.factor) == (first.stream.source.id, 2)
    # A gateway may add to the resource; another process is another source.
    decorated = only(file, level(kind, pods[0]), resource={**POD, "cloud.region": "eu"})
    assert decorated.stream.id == first.stream.id
    elsewhere = only(file, level(kind, pods[0]), resource={**POD, "service.instance.id": "two"})
    assert elsewhere.stream.source is not None
    assert elsewhere.stream.source.id != first.stream.source.id


def test_a_gauge_and_an_updowncounter_of_one_name_are_two_sources() -> None:
    found = [only(rules(), level(kind, at(1))).stream for kind in KINDS]
    assert len({stream.id for stream in found}) == 2
    assert len({stream.source for stream in found}) == 2


INCREASES = rules(aggregation="sum")
COUNTER = sum_metric([at(1)], "seats", "{seat}", temporality=2)
CHANGES = sum_metric([at(1)], "seats", "{seat}", temporality=1, monotonic=False)
UNSAID = sum_metric([at(1)], "seats", "{seat}", temporality=0, monotonic=False)
HISTOGRAM = histogram([histogram_point(BASE, NOW, 3, 1.5, ACME)], "seats", "{seat}", 1)


@pytest.mark.parametrize(
    ("file", "metric", "reason", "said"),
    [
        (rules(), COUNTER, Reason.TYPE_UNSUPPORTED, "a counter: what it has added up is no level; leave out"),
        (rules(), HISTOGRAM, Reason.TYPE_UNSUPPORTED, "a histogram, which stands at no level"),
        (rules(), CHANGES, Reason.TYPE_UNSUPPORTED, "came as changes, which tell no level unless all are there"),
        (rules(metric="'*'"), CHANGES, Reason.TYPE_UNSUPPORTED, "have it sent with cumulative temporality"),
        (rules(), UNSAID, Reason.TEMPORALITY_MISSING, "0 is neither delta nor cumulative"),
        *(
            (INCREASES, level(kind, at(1)), Reason.TYPE_UNSUPPORTED, f"is {what}: what it stands at is no amount")
            for kind, what in zip(KINDS, ("a gauge", "a sum that can fall (UpDownCounter)"), strict=True)
        ),
        (INCREASES, level("gauge", at(1)), Reason.TYPE_UNSUPPORTED, "say `aggregation: level` in a meter"),
        *(
            case
            for kind in KINDS
            for case in (
                (rules(), level(kind, at(1, {"x": 1})), Reason.ACCOUNT_MISSING, "looked at org"),
                (rules(), level(kind, at(1, {"org": True})), Reason.ATTRIBUTES_INVALID, "org must be"),
                (rules(), level(kind, at(float("nan"))), Reason.VALUE_NOT_FINITE, "nan"),
                (rules(), level(kind, at(float("-inf"))), Reason.VALUE_NOT_FINITE, "-inf"),
                (rules(), level(kind, at(-1e300)), Reason.VALUE_OUT_OF_RANGE, "more than 25 digits before"),
                (rules(), level(kind, at(1, seconds=100_000)), Reason.TIME_AHEAD, "past the allowed skew"),
                (rules(), level(kind, at(1, start=NOW)), Reason.TIME_REVERSED, "after it ends"),
                (rules(), level(kind, at(1), unit="By"), Reason.METER_INVALID, "say by which `factor`"),
                (
                    rules(", where: {x: y}"),
                    level(kind, at(1, {"otel.metric.overflow": True})),
                    Reason.ATTRIBUTE_OVERFLOW,
                    "cardinality limit",
                ),
            )
        ),
    ],
)
def test_what_is_kept_aside_and_why(file: Rules, metric: Metric, reason: Reason, said: str) -> None:
    found = decode(file, metric)
    assert (found.points, found.rejected) == ([], 1)
    [kept] = found.quarantined
    assert (kept.refusal.reason, kept.meter, kept.metered) == (reason, "m", True)
    assert said in kept.refusal.detail
    assert again(file, kept.payload).quarantined == [kept]
    assert metrics_of(POD, metric).SerializeToString() == kept.payload


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_has_no_value_harms_no_other(kind: str) -> None:
    ended = at(0)
    ended.flags = 1
    ended.ClearField("as_int")
    empty = at(0, seconds=11)
    empty.ClearField("as_int")
    found = decode(rules(), level(kind, ended, empty, at(4, seconds=12)))
    assert [(point.value, point.is_end) for point in found.points] == [(0, True), (4, False)]
    assert [kept.refusal.reason for kept in found.quarantined] == [Reason.VALUE_MISSING]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pattern_means_the_types_of_its_meter(kind: str) -> None:
    own = sum_metric([at(4, {"tallymark.account.id": "acme"})], "calls", "1", temporality=2)
    levels, amounts = rules(metric="'*'"), rules(metric="'*'", aggregation="sum")
    assert [(p.stream.series.meter, p.value) for p in decode(levels, level(kind, at(1)), own).points] == [
        ("m", 1),
        ("calls", 4),
    ]
    found = decode(amounts, level(kind, at(1)), sum_metric([at(2)], "calls", "1", temporality=2))
    assert [(p.value, p.stream.temporality) for p in found.points] == [(2, Temporality.CUMULATIVE)]
    assert (found.quarantined, found.foreign) == ([], {"seats": 1})


@pytest.mark.parametrize("kind", KINDS)
def test_since_where_and_no_base(kind: str) -> None:
    """A level from before `since` is nobody's, and nothing counts from it."""
    file = rules(", since: '2026-09-21T14:00:10Z', where: {plan: [pro, 'x*']}")
    since = file.meters["m"].sources[0].since
    assert since is not None
    points = [number(0, since + n, 5 + n, {**ACME, "plan": plan}) for n in (-1, 0, 1) for plan in ("pro", "free")]
    found = decode_metrics(
        "default",
        metrics_of(POD, level(kind, *points)).SerializeToString(),
        StreamCache(),
        TimeLimits(),
        since + SECOND,
        Metering(file),
    )
    assert [(p.value, p.is_base) for p in found.points] == [(6, False)]
    assert not found.quarantined
    nobody = decode(rules(", since: 2027-01-01"), level(kind, at(1, {"x": 1})))
    assert (nobody.points, nobody.quarantined) == ([], [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_gauge_that_names_its_account_needs_no_file_and_is_no_files(kind: str) -> None:
    own = level(kind, at(3, {"tallymark.account.id": "acme"}))
    [found] = decode(rules(metric="other"), own).points
    assert (found.stream.temporality, found.metered, found.stream.source) == (Temporality.LEVEL, False, None)
