"""Usage that names nobody is known by its meter, so what becomes of it does not depend on how it was batched."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint

from tallymark_collector.metering import Metering, parse_rules
from tallymark_collector.processors.decoding import Decoded, decode_metrics
from tallymark_collector.processors.described import MAX_STORED
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits
from tests.support.telemetry import histogram, histogram_point
from tests.support.usage import BASE, SECOND, number, request, sum_metric

NOW = BASE + 60 * SECOND
ACME = {"tallymark.account.id": "acme"}
OVERFLOW = {"otel.metric.overflow": True}
METER = ("u.route", "{request}")
KNOWN = {METER, ("seats", "{seat}")}


def decode(
    message: ExportMetricsServiceRequest,
    known: set[tuple[str, str]] = KNOWN,
    *,
    tenant: str = "default",
    metering: Metering | None = None,
) -> Decoded:
    return decode_metrics(
        tenant, message.SerializeToString(), StreamCache(), TimeLimits(), NOW, metering=metering, known=known
    )


def usage(points: Sequence[NumberDataPoint], name: str = METER[0], unit: str = METER[1], **how: object) -> Metric:
    return sum_metric(points, name, unit, **how)  # type: ignore[arg-type]


def seats(*points: NumberDataPoint) -> Metric:
    metric = Metric(name="seats", unit="{seat}")
    metric.gauge.data_points.extend(points)
    return metric


def foreign(*metrics: Metric, **resource: str) -> ExportMetricsServiceRequest:
    return request(*metrics, scope="shop", **resource)


def reasons(decoded: Decoded) -> list[str]:
    return [item.refusal.reason.value for item in decoded.quarantined]


def test_usage_of_a_known_meter_that_names_nobody_is_kept_alone_too() -> None:
    found = decode(foreign(usage([number(BASE, NOW, 700, {})])))
    assert (reasons(found), found.rejected, found.unmatched) == (["account_missing"], 1, 0)


def test_what_a_producer_added_up_past_its_limit_is_kept_in_a_slice_of_its_own() -> None:
    found = decode(foreign(usage([number(BASE, NOW, 700, OVERFLOW)])))
    assert (reasons(found), found.rejected, found.unmatched) == (["attribute_overflow"], 1, 0)


@pytest.mark.parametrize(
    "metric",
    [
        usage([number(BASE, NOW, 7, {})], name="other"),
        usage([number(BASE, NOW, 7, {})], unit="By"),
        histogram([histogram_point(BASE, NOW, 1, 1.0, {})], name=METER[0], unit=METER[1]),
    ],
    ids=["another name", "another unit", "no sum"],
)
def test_what_is_no_meter_of_the_tenant_is_passed_over(metric: Metric) -> None:
    found = decode(foreign(metric))
    assert (reasons(found), found.rejected, found.unmatched) == ([], 0, 1)
    assert decode(foreign(usage([number(BASE, NOW, 7, {})])), set()).unmatched == 1


def test_the_mirror_of_usage_is_never_usage() -> None:
    mirror = request(usage([number(BASE, NOW, 7, {})]), scope="tallymark.mirror")
    assert decode(mirror).unmatched == 1


def test_beside_a_resource_that_is_too_large_it_is_kept_as_well() -> None:
    found = decode(foreign(usage([number(BASE, NOW, 7, {})]), label="x" * (MAX_STORED + 1)))
    assert (reasons(found), found.rejected, found.unmatched) == (["resource_too_large"], 1, 0)


def test_of_a_meter_that_a_file_makes_the_file_alone_says_what_is_its_usage() -> None:
    rules = parse_rules(
        """
        meters:
          u.route:
            unit: "{request}"
            sources:
              - {metric: u.route, quantity: value, account: key, resource: {service.name: kong}, tenants: [default]}
        """
    )
    nobodys = foreign(usage([number(BASE, NOW, 7, {})]))
    assert decode(nobodys, metering=Metering(rules)).unmatched == 1
    assert reasons(decode(nobodys, tenant="globex", metering=Metering(rules))) == ["account_missing"]


POINTS = [
    *(usage([number(BASE, NOW + i, i + 1, {**ACME, "n": i})]) for i in range(3)),
    usage([number(BASE, NOW, 5, {})]),
    usage([number(BASE, NOW + 1, 5, {"http.route": "/a"})]),
    usage([number(BASE, NOW, 700, OVERFLOW)]),
    usage([number(BASE, NOW, 9, {})], temporality=2),
    seats(number(BASE, NOW, 3, ACME)),
    seats(number(BASE, NOW + 1, 3, {})),
    usage([number(BASE, NOW, 4, {})], "seats", "{seat}", temporality=2, monotonic=False),
    usage([number(BASE, NOW, 4, {})], name="foreign"),
]
"""Each a metric with one point."""


def joined(singles: Sequence[Metric]) -> list[Metric]:
    """The points of the same metric in one, as a client sends them."""
    found: dict[bytes, Metric] = {}
    for single in singles:
        header = Metric()
        header.CopyFrom(single)
        kind = single.WhichOneof("data")
        assert kind is not None
        del getattr(header, kind).data_points[:]
        whole = found.setdefault(header.SerializeToString(), header)
        getattr(whole, kind).data_points.extend(getattr(single, kind).data_points)
    return list(found.values())


def said(several: Sequence[Decoded]) -> tuple[list[object], list[bytes], set[str]]:
    points = sorted((p.stream.id.hex, p.start_ns, p.time_ns, p.value) for one in several for p in one.points)
    quarantined = sorted(item.digest() for one in several for item in one.quarantined)
    return list(points), quarantined, {name for one in several for name in one.foreign}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=len(POINTS), max_size=len(POINTS)))
def test_whatever_the_batches_the_same_is_billed_and_the_same_is_kept(places: list[tuple[int, int]]) -> None:
    """Each point to some metric of some request."""
    whole = decode(foreign(*joined(POINTS)))
    requests: dict[int, dict[int, list[Metric]]] = {}
    for (sent, place), single in zip(places, POINTS, strict=True):
        requests.setdefault(sent, {}).setdefault(place, []).append(single)
    sent_apart = [[metric for singles in one.values() for metric in joined(singles)] for one in requests.values()]
    slices = [decode(foreign(*metrics)) for metrics in sent_apart]
    assert said(slices) == said([whole])
    assert sum(one.rejected for one in slices) == whole.rejected == 6
