"""Conversion: exact, deterministic, within the limits."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.sdk.resources import Resource

from tallymark.batches import Request, count_points, halves, producer_record, requests_of
from tallymark.meters import Meter
from tallymark.quantities import Exact, add, exact
from tallymark.recorder import Recorder
from tallymark.segment import Contents
from tallymark.streams import Series

PRODUCER = producer_record(Resource({"service.instance.id": "i", "list": ["a", "b"]}), "tallymark", "1")
METERS = [Series(Meter("m", "1"), ()), Series(Meter("n", "{x}"), (("a", "string", "x" * 400),))]


def points_of(requests: list[Request]) -> list[tuple[Any, ...]]:
    found = []
    for request in requests:
        for resource in ExportMetricsServiceRequest.FromString(request.body).resource_metrics:
            for metric in resource.scope_metrics[0].metrics:
                for p in metric.sum.data_points:
                    account = {a.key: a.value.string_value for a in p.attributes}["tallymark.account.id"]
                    value = Decimal(p.as_int) if p.WhichOneof("value") == "as_int" else Decimal(repr(p.as_double))
                    found.append((metric.name, account, p.start_time_unix_nano, p.time_unix_nano, value))
    return found


def contents(recorder: Recorder, end_ns: int = 10**10) -> Contents:
    (segment,) = recorder.cut(end_ns)
    return segment.contents()


quantities = st.integers(1, 2**63 - 1) | st.floats(1e-9, 1e15) | st.decimals(Decimal("1e-30"), 10**18, places=30)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0, 1]), quantities), min_size=1, max_size=40))
def test_points_denote_the_exact_sums_and_are_the_same_each_time(recorded: list[Any]) -> None:
    recorder = Recorder(5 * 10**9)
    want: dict[tuple[str, str], Exact] = {}
    for account, which, amount in recorded:
        recorder.add((METERS[which], account, None), exact(amount))
        key = (METERS[which].meter.name, account)
        want[key] = add(want.get(key, 0), exact(amount))
    taken = contents(recorder)
    requests = list(requests_of(taken, PRODUCER, max_points=5))
    assert requests == list(requests_of(taken, PRODUCER, max_points=5))
    got: dict[tuple[str, str], Exact] = {}
    ends: dict[tuple[str, str], int] = {}
    for meter, account, start, end, value in points_of(requests):
        assert value > 0
        assert start == ends.get((meter, account), 5 * 10**9), "the intervals of a stream follow each other"
        assert end > start
        ends[meter, account] = end
        got[meter, account] = add(got.get((meter, account), 0), value)
    assert got == {key: amount for key, amount in want.items() if amount}
    assert set(ends.values()) <= {10**10}
    assert sum(r.points for r in requests) == len(points_of(requests))
    by_meter: dict[str, Exact] = {}
    for request in requests:
        for name, amount in request.amounts.items():
            by_meter[name] = add(by_meter.get(name, 0), amount)
    for name, total in by_meter.items():
        assert total == sum_of(amount for (meter, _), amount in want.items() if meter == name)


def sum_of(amounts: Any) -> Exact:
    total: Exact = 0
    for amount in amounts:
        total = add(total, amount)
    return total


def test_requests_are_bounded_in_points_and_bytes_and_lose_nothing() -> None:
    recorder = Recorder(0)
    for n in range(100):
        recorder.add((METERS[1], f"account-{n}", None), 1)
    taken = contents(recorder)
    by_points = list(requests_of(taken, PRODUCER, max_points=30))
    by_bytes = list(requests_of(taken, PRODUCER, max_bytes=7_000))
    assert [r.points for r in by_points] == [30, 30, 30, 10]
    assert max(len(r.body) for r in by_bytes) <= 7_000
    assert 7 <= len(by_bytes) <= 12
    assert sum(r.points for r in by_bytes) == 100
    assert sum(int(r.amounts["n"]) for r in by_bytes) == 100


def test_halves_hold_each_point_once() -> None:
    recorder = Recorder(0)
    for n in range(7):
        recorder.add((METERS[n % 2], f"account-{n}", None), n + 1)
    (whole,) = requests_of(contents(recorder), PRODUCER)
    parts = [whole.body]
    while any(count_points(part) > 1 for part in parts):
        parts = [half for part in parts for half in (halves(part) or (part,))]
    assert len(parts) == 7
    assert sorted(points_of([Request(p, 1, {}) for p in parts])) == sorted(points_of([whole]))
    assert all(b"service.instance.id" in part for part in parts)
