"""Metrics as a file of meters reads them: which numbers, which identities, what is kept aside and why."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tallymark_collector.metering import Metering, Rules, parse_rules
from tallymark_collector.metering.unmatched import MAX_NAMES, OTHERS, Unmatched
from tallymark_collector.model import Point, Reason, Temporality
from tallymark_collector.processors.decoding import Decoded, decode_metrics
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.temporality import increases
from tallymark_collector.processors.validation import TimeLimits
from tallymark_collector.wire import encode_point
from tests.support.telemetry import histogram, histogram_point, metrics_of
from tests.support.usage import BASE, HOUR, SECOND, key_values, number, sum_metric

NOW = BASE + 1000 * SECOND
KONG = {"service.name": "kong", "service.instance.id": "one"}
ACME = {"consumer": "acme"}


def rules(fields: str, unit: str = '"1"', name: str = "m") -> Rules:
    return parse_rules(f"meters: {{{name}: {{unit: {unit}, sources: [{{account: consumer, {fields}}}]}}}}")


def decode(
    rules_: Rules, *metrics: Metric, resource: dict[str, object] | None = None, scope: str = "gateway"
) -> Decoded:
    message = metrics_of(resource or KONG, *metrics, scope=scope)
    return again(rules_, message)


def again(rules_: Rules, message: ExportMetricsServiceRequest | bytes) -> Decoded:
    body = message if isinstance(message, bytes) else message.SerializeToString()
    return decode_metrics("default", body, StreamCache(), TimeLimits(), NOW, Metering(rules_))


def counts(*points: Any, temporality: int = 1) -> Metric:
    return histogram(points, "h", "s", temporality)


def point(count: int = 3, total: float | None = 1.5, attributes: dict[str, object] | None = None, end: int = 10) -> Any:
    return histogram_point(BASE, BASE + end * SECOND, count, total, ACME if attributes is None else attributes)


COUNT = "metric: h, quantity: count"
BAD_TEXT = counts(point(attributes={**ACME, "x": "\0"}))


def test_the_count_of_both_kinds_of_histograms_and_of_summaries() -> None:
    exponential = Metric(name="h", unit="s")
    exponential.exponential_histogram.aggregation_temporality = 2  # type: ignore[assignment]
    exponential.exponential_histogram.data_points.add(
        start_time_unix_nano=BASE, time_unix_nano=NOW, count=2**63, sum=0.3, attributes=key_values(ACME)
    )
    summary = Metric(name="h", unit="s")
    summary.summary.data_points.add(
        start_time_unix_nano=BASE, time_unix_nano=NOW, count=7, sum=0.1, attributes=key_values(ACME)
    )
    found = decode(rules(COUNT), counts(point()), exponential, summary).points
    assert [p.value for p in found] == [3, 2**63, 7]
    assert [p.stream.temporality for p in found] == [Temporality.DELTA, Temporality.CUMULATIVE, Temporality.CUMULATIVE]
    sums = decode(rules("metric: h, quantity: sum", "s"), counts(point()), exponential, summary).points
    assert [p.value for p in sums] == [Decimal("1.5"), Decimal("0.3"), Decimal("0.1")]


def test_a_counter_and_an_exact_factor() -> None:
    counter = sum_metric([number(BASE, NOW, 0.1, ACME)], "bytes", "By")
    [found] = decode(rules("metric: bytes, quantity: value, factor: 1/1000", "kBy"), counter).points
    assert found.value == Decimal("0.0001")
    assert (found.stream.series.meter, found.stream.series.unit) == ("m", "kBy")


@pytest.mark.parametrize(("total", "seconds"), [(0.0, "0"), (5.0, "5e-30"), (20.0, "2e-29")])
def test_zeros_behind_the_point_are_no_digits(total: float, seconds: str) -> None:
    file = rules("metric: h, quantity: sum, factor: 0.000000000000000000000000000001", "Qs")
    [found] = decode(file, counts(point(total=total))).points
    assert found.value == Decimal(seconds)


def test_what_the_file_drops_is_still_in_the_identity() -> None:
    file = rules(f"{COUNT}, dimensions: [route]")
    a, b = ({**ACME, "route": "/a", "peer": peer} for peer in ("x", "y"))
    first, second = decode(file, counts(point(1, attributes=a), point(2, attributes=b))).points
    assert first.stream.series == second.stream.series
    assert first.stream.id != second.stream.id
    ordered = dict(reversed(a.items()))
    assert decode(file, counts(point(1, attributes=ordered))).points[0].stream.id == first.stream.id


def identity(rules_: Rules, metric: Metric, **more: Any) -> object:
    [found] = decode(rules_, metric, **more).points
    return found.stream.id


def test_what_makes_another_stream() -> None:
    file = rules("metric: '*', quantity: count")
    plain = counts(point())
    others = [
        identity(file, plain),
        identity(file, counts(point(), temporality=2)),
        identity(file, histogram([point()], "other", "s")),
        identity(file, histogram([point()], "h", "ms")),
        identity(file, counts(point(attributes={**ACME, "x": 1}))),
        identity(file, counts(point(attributes={**ACME, "x": "1"}))),
        identity(file, plain, scope="other"),
        identity(file, plain, resource={**KONG, "service.instance.id": "two"}),
        identity(rules("metric: '*', quantity: count", name="n"), plain),
        identity(rules("metric: '*', quantity: sum"), histogram([point()], "h", "1")),
    ]
    assert len(set(others)) == len(others)
    # A gateway on the way may add to the resource, and a change of the file must not count a retry again.
    assert identity(file, plain, resource={**KONG, "cloud.region": "eu"}) == others[0]
    assert identity(rules(f"{COUNT}, factor: 2, dimensions: [consumer]"), plain) == others[0]


def test_several_meters_count_one_histogram_and_a_meter_counts_it_once() -> None:
    file = parse_rules(
        """
meters:
  requests:
    unit: "{request}"
    sources:
      - {metric: h, quantity: count, account: consumer, where: {code: "200"}, dimensions: [code]}
      - {metric: "*", quantity: count, account: consumer}
  seconds: {unit: s, sources: [{metric: h, quantity: sum, account: consumer}]}
"""
    )
    found = decode(file, counts(point(attributes={**ACME, "code": 200}), point(4, attributes={**ACME, "code": 404})))
    said = [(p.stream.series.meter, p.value, dict(p.stream.series.attributes)) for p in found.points]
    assert said == [
        ("requests", 3, {"code": 200}),
        ("seconds", Decimal("1.5"), {}),
        ("requests", 4, {}),
        ("seconds", Decimal("1.5"), {}),
    ]
    assert len({p.stream.id for p in found.points}) == 4


@pytest.mark.parametrize(
    ("file", "metric", "reason", "said"),
    [
        (rules(COUNT), counts(point(attributes={"x": 1})), Reason.ACCOUNT_MISSING, "looked at consumer"),
        (rules(COUNT), counts(point(attributes={"consumer": True})), Reason.ATTRIBUTES_INVALID, "consumer must be"),
        (
            rules(f"{COUNT}, dimensions: [x]"),
            BAD_TEXT,
            Reason.ATTRIBUTES_INVALID,
            "NUL",
        ),
        (rules(COUNT), counts(point(), temporality=0), Reason.TEMPORALITY_MISSING, "neither delta nor"),
        (rules(COUNT), counts(point(end=100_000)), Reason.TIME_AHEAD, "past the allowed skew"),
        (rules("metric: h, quantity: sum", "s"), counts(point(total=None)), Reason.VALUE_MISSING, "no sum"),
        (rules("metric: h, quantity: sum", "s"), counts(point(total=float("nan"))), Reason.VALUE_NOT_FINITE, "nan"),
        (rules("metric: h, quantity: sum", "s"), counts(point(total=-1.0)), Reason.VALUE_NEGATIVE, "cannot be -1"),
        (rules("metric: h, quantity: sum", "ms"), counts(point()), Reason.METER_INVALID, "say by which `factor`"),
        (
            rules("metric: h, quantity: sum, source_unit: ms, factor: 1/1000", "s"),
            counts(point()),
            Reason.METER_INVALID,
            "`source_unit: ms`",
        ),
        (
            rules("metric: h, quantity: sum, factor: 0.0000001", "s"),
            counts(point(total=1e-30)),
            Reason.VALUE_OUT_OF_RANGE,
            "after the point",
        ),
        (
            rules(f"{COUNT}, where: {{x: y}}"),
            counts(point(attributes={"otel.metric.overflow": True})),
            Reason.ATTRIBUTE_OVERFLOW,
            "cardinality limit",
        ),
        (
            rules("metric: h, quantity: value"),
            counts(point()),
            Reason.TYPE_UNSUPPORTED,
            "a histogram, which has no value",
        ),
        (
            rules("metric: g, quantity: value"),
            sum_metric([number(BASE, NOW, 1, ACME)], "g", "1", monotonic=False),
            Reason.TYPE_UNSUPPORTED,
            "a sum that can fall",
        ),
    ],
)
def test_what_is_kept_aside_and_why(file: Rules, metric: Metric, reason: Reason, said: str) -> None:
    found = decode(file, metric)
    assert not found.points
    assert found.rejected == 1
    [kept] = found.quarantined
    assert kept.refusal.reason is reason
    assert said in kept.refusal.detail
    assert "meter m: " in kept.refusal.detail
    # It is whole: read again, it is the same refusal.
    assert again(file, kept.payload).quarantined == [kept]
    assert metrics_of(KONG, metric).SerializeToString() == kept.payload


def test_one_refused_point_harms_no_other_and_is_an_item_of_each_meter() -> None:
    file = parse_rules(
        """
meters:
  requests: {unit: "1", sources: [{metric: h, quantity: count, account: consumer}]}
  seconds: {unit: s, sources: [{metric: h, quantity: sum, account: consumer}]}
"""
    )
    found = decode(file, counts(point(attributes={"x": 1}), point()))
    assert len(found.points) == 2
    assert found.rejected == 1
    assert [(kept.meter, kept.metered) for kept in found.quarantined] == [("requests", True), ("seconds", True)]
    for kept in found.quarantined:
        assert kept.refusal.detail.startswith(f"meter {kept.meter}: nothing names the account")
    assert len({kept.payload for kept in found.quarantined}) == 1


@pytest.mark.parametrize("kind", ["histogram", "counter"])
def test_a_point_that_cannot_be_read_harms_no_other(kind: str) -> None:
    """Text that is not UTF-8, say, which a parser refuses with all that is around it."""
    who = [{**ACME, "x": text} for text in ("a", "BROKEN", "c")]
    if kind == "histogram":
        file, metric = rules(COUNT), counts(*(point(n + 1, attributes=one) for n, one in enumerate(who)))
    else:
        file = rules("metric: calls, quantity: value")
        metric = sum_metric([number(BASE, NOW, n + 1, one) for n, one in enumerate(who)], "calls", "1")
    body = metrics_of(KONG, metric).SerializeToString().replace(b"BROKEN", b"\xff\xfe....")
    found = again(file, body)
    assert sorted(p.value for p in found.points) == [1, 3]
    whole = decode(file, metric).points
    assert {p.stream.id for p in found.points} == {whole[0].stream.id, whole[2].stream.id}
    assert found.rejected == 1
    [kept] = found.quarantined
    assert kept.refusal.reason is Reason.ATTRIBUTES_INVALID
    assert b"\xff\xfe...." in kept.payload
    assert again(file, kept.payload).quarantined == [kept]


def test_a_pattern_means_its_own_type_alone_and_leaves_the_rest_to_the_built_in_rule() -> None:
    counter = sum_metric([number(BASE, NOW, 4, {"tallymark.account.id": "acme"})], "h.calls")
    found = decode(rules("metric: 'h*', quantity: count"), counts(point()), counter)
    assert [(p.stream.series.meter, p.value) for p in found.points] == [("m", 3), ("h.calls", 4)]


def test_a_metric_that_the_file_names_is_not_counted_under_its_own_name_too() -> None:
    both = {"tallymark.account.id": "globex", **ACME}
    counter = sum_metric([number(BASE, NOW, 4, both)], "calls", "1")
    [found] = decode(rules("metric: calls, quantity: value"), counter).points
    assert (found.stream.series.account, found.stream.series.meter) == ("acme", "m")


def test_the_sdks_own_scopes_are_never_the_files() -> None:
    file = rules("metric: '*', scope: '*', quantity: value")
    counter = sum_metric([number(BASE, NOW, 4, {"tallymark.account.id": "acme", **ACME})])
    [found] = decode(file, counter, scope="tallymark").points
    assert found.stream.series.meter == "api.requests"
    assert not decode(file, counter, scope="tallymark.mirror").points


def test_since_starts_a_total_that_ran_before_at_nothing() -> None:
    """Otherwise a new meter would bill what a gateway has counted since it was started, months ago."""
    file = parse_rules(
        "meters: {m: {unit: '1', sources: [{metric: h, quantity: count, account: consumer,"
        f" since: {'2026-09-21T14:00:30Z'}}}]}}}}"
    )
    since = file.meters["m"].sources[0].since
    assert since is not None
    old, new = since - 50 * SECOND, since + 50 * SECOND

    def total(start: int, end: int, count: int) -> Any:
        return histogram_point(start, end, count, None, ACME)

    metric = counts(
        total(old, since, 900),  # ended by then: not counted, and where counting begins
        total(old, since + 10 * SECOND, 1000),
        total(old, since + 20 * SECOND, 1007),
        total(new, new + SECOND, 5),
        temporality=2,
    )
    body = metrics_of(KONG, metric).SerializeToString()
    decoded = decode_metrics("default", body, StreamCache(), TimeLimits(), new + 60 * SECOND, Metering(file))
    assert (increased(decoded.points), decoded.unmatched) == ([100, 7, 5], 0)
    # What a stream had counted by `since` is not known where no total was seen by then: that it bills nothing is safe.
    assert increased(decoded.points[1:]) == [7, 5]


def increased(points: list[Point]) -> list[Decimal]:
    by_epoch: dict[tuple[object, int], list[Point]] = {}
    for one in points:
        assert one.stream.source is not None
        by_epoch.setdefault((one.stream.source.id, one.start_ns), []).append(one)
    return [one.value for (_, start), several in by_epoch.items() for one in increases(start, (), several).points]


def totals(file: Rules, *counted: tuple[int, int]) -> list[Point]:
    """Of a gateway that has run for two days: (seconds after BASE, count)."""
    points = [histogram_point(BASE - 48 * HOUR, BASE + at * SECOND, count, None, ACME) for at, count in counted]
    return decode(file, counts(*points, temporality=2)).points


def test_another_since_begins_again_from_nothing() -> None:
    """Nobody knows for how long there was no such rule: what was counted meanwhile is not billed to who comes next."""
    first = totals(rules(COUNT), (10, 100), (20, 110))
    later = totals(rules(f"{COUNT}, since: '2026-09-21T14:00:30Z'"), (60, 500), (70, 507))
    assert increased([*first, *later]) == [100, 10, 7]
    # It had been seen that far by the new rule: then nothing is lost.
    waited = totals(rules(f"{COUNT}, since: '2026-09-21T14:00:30Z'"), (25, 480), (60, 500))
    assert increased([*first, *waited]) == [100, 10, 20]


def test_who_is_billed_by_which_factor_and_dimensions_is_no_part_of_what_has_been_counted() -> None:
    before = totals(rules(COUNT), (10, 100))
    mapped = "metric: h, quantity: count, factor: 2, dimensions: [consumer], since: '2026-09-01'"
    who = "{attribute: consumer, map: {acme: globex}}"
    file = parse_rules(f"meters: {{m: {{unit: '1', sources: [{{{mapped}, account: {who}}}]}}}}")
    after = totals(file, (20, 130))
    made = increases(before[0].start_ns, (), [*before, *after]).points
    assert [(p.stream.series.account, p.value) for p in made] == [("acme", 100), ("globex", 60)]
    assert len({p.stream.source.id for p in [*before, *after] if p.stream.source}) == 1
    other = totals(rules(COUNT, name="n"), (20, 130)) + totals(rules("metric: h, quantity: sum", "s"), (20, 130))
    assert all(p.stream.source and p.stream.source.id != before[0].stream.source.id for p in other)  # type: ignore[union-attr]


def test_what_was_refused_before_since_is_nobodys() -> None:
    """A rule that counts from later on has nothing to do with it, not even as a base."""
    file = rules(f"{COUNT}, since: '2026-09-21T14:00:30Z'")
    nobodys = histogram_point(BASE - HOUR, BASE + SECOND, 3, None, {})
    ancient = histogram_point(BASE - 24_000 * HOUR, BASE - 23_000 * HOUR, 3, None, ACME)
    found = decode(file, counts(nobodys, ancient, temporality=2))
    assert (found.points, found.quarantined, found.unmatched) == ([], [], 2)


def test_what_a_store_keeps_aside_is_written_as_it_was_measured() -> None:
    file = parse_rules(
        "meters: {m: {unit: ms, sources: [{metric: '*', quantity: sum, factor: 1000, account: consumer}]},"
        " c: {unit: '1', sources: [{metric: '*', quantity: count, account: consumer},"
        " {metric: '*', quantity: value, factor: 1/8, account: consumer}]}}"
    )
    counter = sum_metric([number(BASE, NOW, 3, ACME)], "calls", "1")
    for one in decode(file, counts(point(3, 0.1), temporality=2), counter).points:
        [same] = [p for p in again(file, encode_point(one)).points if p.stream.id == one.stream.id]
        assert same[1:] == one[1:]


def test_what_is_not_usage_is_counted_by_name_within_a_limit() -> None:
    found = decode(rules(COUNT), histogram([point()], "x", "s"), histogram([point()], "x", "s"))
    assert found.foreign == {"x": 2}
    unmatched = Unmatched()
    for n in range(MAX_NAMES + 50):
        unmatched.add("traces", {f"name {n}": 1})
    unmatched.add("traces", {"name 0": 5})
    assert unmatched.total == MAX_NAMES + 55
    assert unmatched.top("traces", 2) == [(OTHERS, 50), ("name 0", 6)]
    assert len(unmatched.top("traces", 10_000)) == MAX_NAMES + 1


def test_unmatched_metrics_are_not_looked_into() -> None:
    """Their points need not even be readable."""
    broken = metrics_of(KONG, sum_metric([number(BASE, NOW, 1, {"a": 1})], "x")).SerializeToString()
    harmed = broken.replace(b"\x0a\x01a", b"\x0a\x7fa")
    assert harmed != broken
    assert again(rules(COUNT), harmed).unmatched == 1
