"""Limits of tenants: what is let in, what has to wait and for how long, what is set aside; and that nothing is lost."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal

import grpc
import psycopg
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.metrics.v1 import metrics_pb2

from tallymark_collector.access.lookups import REMEMBERED_SECONDS
from tallymark_collector.access.quotas import (
    BURST_SECONDS,
    BYTES_READ,
    MAX_DELAY,
    READ_AT_LEAST,
    READ_FACTOR,
    Bucket,
    Quotas,
)
from tallymark_collector.access.records import InDatabase, Tenant, add_tenant, set_limits
from tallymark_collector.errors import MalformedRequest, Overloaded, StoreUnavailable
from tallymark_collector.model import Batch, Quarantined, Reason, Refusal, Stream, WriteResult
from tallymark_collector.pipeline import Pipeline, Writing
from tallymark_collector.processors import set_aside
from tallymark_collector.receivers.server import serving
from tallymark_collector.settings import Limits, Settings
from tallymark_collector.store import Store
from tests.collector.access.conftest import Clock
from tests.support.receiving import Counting
from tests.support.telemetry import span, spans_of
from tests.support.usage import BASE, SECOND, number, point, request, stream, sum_metric

NOW = BASE + 60 * SECOND


@dataclass
class Limited:
    """Tenants' limits in memory, and streams that are known."""

    tenants: dict[str, Tenant] = field(default_factory=dict)
    known: set[object] = field(default_factory=set)
    asked: int = 0

    async def tenant(self, name: str) -> Tenant:
        self.asked += 1
        await asyncio.sleep(0)
        return self.tenants.get(name, Tenant(name))

    async def unseen(self, streams: Iterable[Stream]) -> list[Stream]:
        found = {stream.id: stream for stream in streams if stream.id not in self.known}
        return [*found.values()]


class Nowhere:
    """A store that nothing gets to."""

    async def write(self, batch: Batch) -> WriteResult:
        raise AssertionError("it should not have come so far")


def batch(points: int, **more: str) -> Batch:
    return Batch(points=[point(stream(**more), i, i + 1, 1) for i in range(points)])  # type: ignore[arg-type]


async def admitted(quotas: Quotas, what: Batch, tenant: str = "default") -> Batch:
    async with quotas.admitting(tenant, what) as found:
        return found


async def delay(quotas: Quotas, what: Batch, tenant: str = "default") -> float:
    with pytest.raises(Overloaded) as refused:
        await admitted(quotas, what, tenant)
    return refused.value.retry_after


async def test_over_the_rate_the_delay_is_the_time_until_there_is_room(clock: Clock) -> None:
    quotas = Quotas(Limited(), Limits(points_per_second=10), clock)
    assert (await admitted(quotas, batch(100))).points, f"{BURST_SECONDS} s worth may come at once"
    assert await delay(quotas, batch(1)) == pytest.approx(0.1)
    assert await delay(quotas, batch(30)) == pytest.approx(3)
    clock.seconds += 2.999
    assert await delay(quotas, batch(30)) == pytest.approx(0.001)
    clock.seconds += 0.001
    await admitted(quotas, batch(30))
    assert await delay(quotas, batch(1)) == pytest.approx(0.1)


async def test_a_request_that_is_larger_than_the_bucket_is_let_in_when_that_is_full_and_paid_for(clock: Clock) -> None:
    quotas = Quotas(Limited(), Limits(points_per_second=1), clock)
    await admitted(quotas, batch(50))
    assert await delay(quotas, batch(50)) == pytest.approx(50), "the debt of 40, then a full bucket of 10"
    assert await delay(quotas, batch(1)) == pytest.approx(41)
    clock.seconds += 50
    await admitted(quotas, batch(50))
    huge = Quotas(Limited(), Limits(points_per_second=0.001), clock)
    await admitted(huge, batch(50))
    assert await delay(huge, batch(1)) == MAX_DELAY, "then it asks again"


async def test_tenants_do_not_use_up_each_others_rate_and_have_their_own(clock: Clock) -> None:
    limited = Limited({"small": Tenant("small", 1), "free": Tenant("free", math.inf)})
    quotas = Quotas(limited, Limits(points_per_second=10), clock)
    await admitted(quotas, batch(100), "one")
    assert await delay(quotas, batch(1), "one") > 0
    await admitted(quotas, batch(100), "two")
    await admitted(quotas, batch(10), "small")
    assert await delay(quotas, batch(1), "small") == pytest.approx(1)
    for _ in range(50):
        await admitted(quotas, batch(100), "free")


async def test_spans_totals_and_what_is_refused_count_too_and_a_failed_write_does_not(clock: Clock) -> None:
    quotas = Quotas(Limited(), Limits(points_per_second=1), clock)
    junk = Quarantined("default", "", "m", 1, Refusal(Reason.TIME_AHEAD, ""), "metrics", b"")
    for _ in range(20):
        with pytest.raises(StoreUnavailable):
            async with quotas.admitting("default", Batch(quarantined=[junk] * 10)):
                raise StoreUnavailable("away")
    await admitted(quotas, Batch(quarantined=[junk] * 10))
    assert await delay(quotas, Batch(quarantined=[junk])) == pytest.approx(1)


async def test_limits_are_read_again_after_a_while_once_for_all_that_wait(clock: Clock) -> None:
    limited = Limited({"acme": Tenant("acme", 1)})
    quotas = Quotas(limited, clock=clock)
    await asyncio.gather(*(admitted(quotas, Batch(), "acme") for _ in range(20)))
    assert limited.asked == 1
    await admitted(quotas, batch(10), "acme")
    limited.tenants["acme"] = Tenant("acme", 1000)
    assert await delay(quotas, batch(10), "acme") > 0
    clock.seconds += REMEMBERED_SECONDS
    await admitted(quotas, batch(10_000), "acme")
    assert limited.asked == 2


async def test_streams_beyond_the_limit_are_set_aside_and_known_ones_go_on(clock: Clock) -> None:
    limited = Limited()
    quotas = Quotas(limited, Limits(new_streams_per_hour=3), clock)
    streams = [stream(user=f"u{i}") for i in range(5)]
    what = Batch(points=[point(one, 0, 1, 1) for one in streams] + [point(streams[4], 1, 2, 7)])
    found = await admitted(quotas, what)
    assert [p.stream for p in found.points] == streams[:3]
    assert [(q.refusal.reason, q.account, q.meter) for q in found.quarantined] == [
        (Reason.STREAMS_LIMITED, "acme", "api.requests")
    ] * 3
    limited.known.update(one.id for one in streams[:3])
    again = await admitted(quotas, what)
    assert (len(again.points), len(again.quarantined)) == (3, 3)
    clock.seconds += 1199
    assert len((await admitted(quotas, what)).points) == 3
    clock.seconds += 1
    assert len((await admitted(quotas, what)).points) == 4, "a third of an hour, a third of three"


async def test_a_stream_is_counted_once_though_its_write_fails_or_others_carry_it_too(clock: Clock) -> None:
    quotas = Quotas(Limited(), Limits(new_streams_per_hour=1), clock)
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match="1 points were let in"):
            async with quotas.admitting("default", batch(1)) as found:
                raise StoreUnavailable(f"{len(found.points)} points were let in")
    assert not (await admitted(quotas, batch(1, producer="two"))).points


@given(
    rate=st.floats(0.01, 1e6),
    steps=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 1_000_000)), max_size=40),
)
def test_never_more_than_the_rate_allows_and_the_delay_is_never_too_short(
    rate: float, steps: list[tuple[float, int]]
) -> None:
    bucket = Bucket(rate, rate * 10, 0.0)
    now = taken = 0.0
    largest = 0
    for wait, amount in steps:
        now += wait
        asked = bucket.take(amount, now)
        if asked:
            now += asked * (1 + 1e-9) + 1e-9
            assert bucket.take(amount, now) <= 1e-3, "whoever comes back when told is let in"
        taken += amount
        largest = max(largest, amount)
        assert taken <= rate * (now + 10) * (1 + 1e-6) + largest + 1


async def test_over_grpc_refusals_are_retryable_and_in_the_end_everything_is_there(store: Store, dsn: str) -> None:
    clock = Clock()
    async with store.transaction() as connection:
        await add_tenant(connection, "acme-corp")
        await set_limits(connection, Tenant("default", 1), ["points_per_second"])
    pipeline = Pipeline(store, now_ns=lambda: NOW, quotas=Quotas(InDatabase(store), clock=clock))
    acme = {"tallymark.account.id": "acme"}
    async with (
        serving(pipeline, Settings("unused", port=0)) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = metrics_service_pb2_grpc.MetricsServiceStub(channel)
        refused = 0
        for i in range(40):
            body = request(sum_metric([number(BASE + i, BASE + i + 1, 1, acme) for _ in range(1)]))
            call = stub.Export(body)
            code = await call.code()
            if code is not grpc.StatusCode.OK:
                refused += 1
                assert code is grpc.StatusCode.UNAVAILABLE
                told = RetryInfo.FromString(dict(await call.trailing_metadata())["google.rpc.retryinfo-bin"])
                clock.seconds += told.retry_delay.seconds + told.retry_delay.nanos / 1e9
                await stub.Export(body)
    assert refused == 40 - BURST_SECONDS
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT count(*), sum(quantity) FROM tallymark.usage_point").fetchone() == (40, 40)


async def test_new_streams_of_a_restarted_collector_are_those_that_the_database_lacks(store: Store, dsn: str) -> None:
    acme = {"tallymark.account.id": "acme"}

    async def send(quotas: Quotas, to: Store, *users: str) -> metrics_service_pb2.ExportMetricsServiceResponse:
        pipeline = Pipeline(to, now_ns=lambda: NOW, quotas=quotas)
        points = [number(BASE, NOW, 1, {**acme, "user": user}) for user in users]
        return await pipeline.metrics("default", request(sum_metric(points)).SerializeToString())  # type: ignore[return-value]

    limits = Limits(new_streams_per_hour=2)
    first = await send(Quotas(InDatabase(store), limits), store, "a", "b", "c")
    assert (first.rejected, "streams_limited (1 of meter 'api.requests')" in first.message) == (1, True)  # type: ignore[attr-defined]
    restarted = Store(dsn)
    await restarted.open()
    try:
        again = await send(Quotas(InDatabase(restarted), limits), restarted, "a", "b", "d", "e", "f")
    finally:
        await restarted.close()
    assert again.rejected == 1  # type: ignore[attr-defined]
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        users = connection.execute("SELECT attributes->>'user', quantity FROM usage_hourly ORDER BY 1").fetchall()
        assert users == [("a", Decimal(1)), ("b", Decimal(1)), ("d", Decimal(1)), ("e", Decimal(1))]
        kept = connection.execute(
            "SELECT account, meter, reason, payload FROM usage_quarantine ORDER BY payload"
        ).fetchall()
    assert [row[:3] for row in kept] == [("acme", "api.requests", "streams_limited")] * 2
    for (*_, payload), user in zip(kept, "cf", strict=True):
        whole = metrics_service_pb2.ExportMetricsServiceRequest.FromString(payload)
        assert whole == request(sum_metric([number(BASE, NOW, 1, {**acme, "user": user})])), "it can be sent as it came"


async def test_who_has_to_wait_anyway_is_refused_before_the_request_is_read() -> None:
    clock = Clock()
    quotas = Quotas(Limited(), Limits(points_per_second=1.0), clock=clock)
    await admitted(quotas, batch(30))
    pipeline = Pipeline(Nowhere(), quotas=quotas)
    for take in (pipeline.metrics, pipeline.traces):
        with pytest.raises(Overloaded, match="more than 1 points a second") as refused:
            await take("default", b"\xff")
        assert refused.value.retry_after == pytest.approx(21.0)
    clock.seconds += 21.0
    for take in (pipeline.metrics, pipeline.traces):
        with pytest.raises(MalformedRequest):
            await take("default", b"\xff")


def foreign_metrics(count: int) -> bytes:
    """Metrics that are nobody's usage, as small as they can be."""
    metrics = [metrics_pb2.Metric(name="x") for _ in range(count)]
    return request(*metrics).SerializeToString()


def foreign_spans(count: int) -> bytes:
    return spans_of({}, [span(n, {}) for n in range(count)]).SerializeToString()


def records(count: int) -> bytes:
    message = ExportLogsServiceRequest()
    message.resource_logs.add().scope_logs.add().log_records.extend([LogRecord()] * count)
    return message.SerializeToString()


READ = {"metrics": foreign_metrics, "traces": foreign_spans, "logs": records}


def limited_pipeline(clock: Clock, rate: float, store: Writing | None = None) -> Pipeline:
    quotas = Quotas(Limited(), Limits(points_per_second=rate), clock=clock)
    return Pipeline(store or Nowhere(), now_ns=lambda: NOW, quotas=quotas)


@pytest.mark.parametrize("signal", READ)
async def test_what_is_no_usage_is_read_at_ten_times_the_rate_and_then_has_to_wait(clock: Clock, signal: str) -> None:
    body, pipeline = READ[signal](20_000), limited_pipeline(clock, 1_000)
    take = getattr(pipeline, signal)
    units = max(20_000, len(body) / BYTES_READ)
    burst = READ_FACTOR * 1_000 * BURST_SECONDS
    for _ in range(math.ceil(burst / units)):
        await take("default", body)
    debt = units * math.ceil(burst / units) - burst
    with pytest.raises(Overloaded, match="reads at most 10000 points, spans and records a second") as refused:
        await take("default", body)
    assert refused.value.retry_after == pytest.approx((debt + 1) / (READ_FACTOR * 1_000), rel=0.01)
    for other in READ:
        with pytest.raises(Overloaded):
            await getattr(pipeline, other)("default", b"\xff")  # unread
    clock.seconds += refused.value.retry_after
    await take("default", body)
    await take("another", body)


async def test_what_is_no_usage_takes_nothing_from_the_rate_of_usage(clock: Clock) -> None:
    pipeline = limited_pipeline(clock, 100, Counting())
    usage = request(sum_metric([number(BASE, NOW, 5, {"tallymark.account.id": "acme"})] * 100)).SerializeToString()
    await pipeline.metrics("default", usage)
    for _ in range(20):
        clock.seconds += 1.0
        await pipeline.metrics("default", usage)
        await pipeline.traces("default", foreign_spans(800))
    assert pipeline.totals.points == 2_100


async def test_a_small_limit_still_reads_what_an_ordinary_service_sends(clock: Clock) -> None:
    pipeline = limited_pipeline(clock, 0.01)
    for _ in range(60):
        await pipeline.traces("default", foreign_spans(int(READ_AT_LEAST)))
        clock.seconds += 1.1


@pytest.mark.parametrize("body", [b"\xff" * 11_000_000, b"\x0a\x80\x80\x80\x01" + bytes(11_000_000)])
async def test_what_cannot_be_read_is_charged_by_its_bytes(clock: Clock, body: bytes) -> None:
    pipeline = limited_pipeline(clock, 1)
    with pytest.raises(MalformedRequest):
        await pipeline.metrics("default", body)
    with pytest.raises(Overloaded):
        await pipeline.traces("default", body)


async def test_what_is_refused_for_its_points_was_read_all_the_same(clock: Clock) -> None:
    """Or whoever sends it again at once, over and over, is read for nothing."""
    pipeline = limited_pipeline(clock, 100, Counting())
    acme = {"tallymark.account.id": "acme"}
    small, large = (
        request(sum_metric([number(BASE, NOW, 5, acme)] * count)).SerializeToString() for count in (1, 3_000)
    )
    await pipeline.metrics("default", small)
    refused = 0
    for _ in range(10):
        with pytest.raises(Overloaded) as caught:
            await pipeline.metrics("default", large)
        refused += "sends more than 100 points a second" in str(caught.value)
    assert refused == 4, "until what was read is more than ten seconds' worth"
    clock.seconds += caught.value.retry_after
    await pipeline.metrics("default", small)


async def test_nobody_waits_longer_for_what_was_read_than_clients_are_asked_to(clock: Clock) -> None:
    pipeline = limited_pipeline(clock, 1)
    await pipeline.logs("default", records(400_000))
    with pytest.raises(Overloaded) as refused:
        await pipeline.metrics("default", b"")
    assert refused.value.retry_after == MAX_DELAY
    clock.seconds += MAX_DELAY
    await pipeline.metrics("default", b"")


async def test_new_streams_that_are_too_many_to_be_set_aside_are_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is wrong with them, and known ones stand beside them: none may be lost."""
    monkeypatch.setattr(set_aside, "MAX_BYTES", 1000)
    quotas = Quotas(Limited(), Limits(new_streams_per_hour=1.0), clock=Clock())
    new = Batch(points=[point(stream(user=str(i)), 0, 1, 1) for i in range(30)])
    with pytest.raises(Overloaded, match=r"streams an hour .* send fewer in a request") as refused:
        await admitted(quotas, new)
    assert refused.value.retry_after == MAX_DELAY
