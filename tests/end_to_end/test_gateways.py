"""Gateways without an SDK of ours, over real gRPC into a real database: what SQL bills against what the test sent."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from decimal import Decimal

import grpc
import psycopg
import pytest
from google.protobuf.message import Message
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tallymark_collector.aggregates.audit import audit
from tallymark_collector.metering import Metering, parse_rules
from tallymark_collector.metering.kept import decode_kept
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.processors.validation import TimeLimits
from tallymark_collector.receivers.server import serving
from tallymark_collector.settings import Settings
from tallymark_collector.store import Store
from tests.support.telemetry import histogram, histogram_point, metrics_of, span, spans_of
from tests.support.usage import BASE, SECOND, number, request, sum_metric

NOW = BASE + 3000 * SECOND
ENVOY = {"service.name": "envoy", "service.instance.id": "edge-1"}
RULES = """
meters:
  gateway.requests:
    unit: "{request}"
    sources:
      - metric: http.server.request.duration
        resource: {service.name: kong}
        quantity: count
        account: kong.consumer
        dimensions: {method: http.request.method}
      - span: "*"
        kind: server
        resource: {service.name: envoy}
        where: {http.response.status_code: {to: 499}}
        account: [tenant.id, {resource: tenant.id}]
        dimensions: [http.request.method]
        spans_are_complete: true
  gateway.milliseconds:
    unit: ms
    sources:
      - metric: http.server.request.duration
        resource: {service.name: kong}
        quantity: sum
        factor: 1000
        account: kong.consumer
      - span: "*"
        kind: server
        resource: {service.name: envoy}
        quantity: duration
        factor: 1000
        account: [tenant.id, {resource: tenant.id}]
        spans_are_complete: true
"""


class Gateway:
    """A client of a collector that knows the file of meters."""

    def __init__(self, pipeline: Pipeline, channel: grpc.aio.Channel) -> None:
        self.pipeline = pipeline
        self._metrics = metrics_service_pb2_grpc.MetricsServiceStub(channel)
        self._traces = trace_service_pb2_grpc.TraceServiceStub(channel)

    async def metrics(self, resource: Mapping[str, object], *metrics: Metric) -> ExportMetricsServiceResponse:
        return await self._metrics.Export(metrics_of(resource, *metrics))

    async def spans(self, spans: Iterable[Span], resource: Mapping[str, object] = ENVOY) -> ExportTraceServiceResponse:
        return await self._traces.Export(spans_of(resource, spans))

    async def send(self, message: Message) -> ExportMetricsServiceResponse:
        return await self._metrics.Export(message)


@asynccontextmanager
async def gateway(store: Store) -> AsyncIterator[Gateway]:
    pipeline = Pipeline(store, now_ns=lambda: NOW, metering=Metering(parse_rules(RULES)))
    async with (
        serving(pipeline, Settings("unused", port=0)) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield Gateway(pipeline, channel)


def billed(dsn: str, columns: str = "account, meter") -> dict[tuple[str, ...], Decimal]:
    query = f"SELECT {columns}, sum(quantity) FROM tallymark.usage_hourly GROUP BY {columns}"
    with psycopg.connect(dsn) as connection:
        return {tuple(row[:-1]): row[-1] for row in connection.execute(query).fetchall()}  # type: ignore[arg-type]


def rows(dsn: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        return connection.execute(query).fetchall()  # type: ignore[arg-type]


def without_zeros(found: Mapping[tuple[str, ...], Decimal]) -> dict[tuple[str, ...], Decimal]:
    return {key: value for key, value in found.items() if value}


@pytest.mark.parametrize("seed", range(3))
async def test_spans_of_envoy_retried_and_in_other_batches(store: Store, dsn: str, seed: int) -> None:
    chance = random.Random(seed)
    expected: dict[tuple[str, ...], Decimal] = defaultdict(Decimal)
    calls: Counter[str] = Counter()
    sent = []
    for n in range(300):
        account = f"a{chance.randrange(5)}"
        status = chance.choice([200, 201, 404, 503])
        start = BASE + chance.randrange(2000 * SECOND)
        length = chance.randrange(10 * SECOND)
        method = chance.choice(["GET", "POST"])
        attributes = {"tenant.id": account, "http.response.status_code": status, "http.request.method": method}
        times = {"start_time_unix_nano": start, "end_time_unix_nano": start + length}
        sent.append(span(n, attributes, **times, name=f"egress {n}"))
        expected[account, "gateway.milliseconds"] += Decimal(length) / 1_000_000
        if status <= 499:
            expected[account, "gateway.requests"] += 1
            calls[method] += 1
    clients = [span(1000 + n, {"tenant.id": "a1"}, kind=3) for n in range(7)]
    async with gateway(store) as client:
        for _ in range(3):
            everything = [*sent, *clients]
            chance.shuffle(everything)
            while everything:
                size = chance.randrange(1, 60)
                batch, everything = everything[:size], everything[size:]
                response = await client.spans(batch)
                assert not response.HasField("partial_success")
        assert client.pipeline.unmatched.top("traces") == [("ingress", 21)]
    assert without_zeros(billed(dsn)) == without_zeros(expected)
    by_method = rows(
        dsn,
        "SELECT method, sum(quantity)::int FROM usage_hourly WHERE meter = 'gateway.requests' GROUP BY 1",
    )
    assert dict(by_method) == calls  # type: ignore[arg-type,comparison-overlap]
    # Each number can be traced to its calls.
    shown = rows(dsn, "SELECT account, meter, sum(quantity) FROM usage_evidence GROUP BY 1, 2")
    assert without_zeros({row[:2]: row[2] for row in shown}) == without_zeros(expected)  # type: ignore[misc]
    assert rows(dsn, "SELECT count(*) FROM usage_quarantine") == [(0,)]
    async with store.reading() as connection:
        assert (await audit(connection)).clean


@pytest.mark.parametrize("seed", range(3))
async def test_cumulative_histograms_of_kong_with_resets(store: Store, dsn: str, seed: int) -> None:
    """Routes are dropped from the series, so several streams of one process merge into one."""
    chance = random.Random(seed)
    expected: dict[tuple[str, ...], Decimal] = defaultdict(Decimal)
    sent: list[tuple[str, Metric]] = []
    for instance in ("kong-1", "kong-2"):
        start = BASE
        counts: Counter[tuple[str, str]] = Counter()
        sums: dict[tuple[str, str], float] = defaultdict(float)
        for step in range(1, 30):
            time_ns = BASE + step * 60 * SECOND
            if chance.random() < 0.15:  # the process starts again
                for (account, _), total in sums.items():
                    expected[account, "gateway.milliseconds"] += Decimal(repr(total)) * 1000
                counts.clear()
                sums.clear()
                start = time_ns - 30 * SECOND
            for account in ("acme", "globex"):
                for route in ("/a", "/b", "/c"):
                    more = chance.randrange(20)
                    counts[account, route] += more
                    sums[account, route] += chance.random() * more
                    expected[account, "gateway.requests"] += more
            points = [
                histogram_point(
                    start, time_ns, count, sums[key], {"kong.consumer": key[0], "http.route": key[1], "n": 1}
                )
                for key, count in counts.items()
            ]
            sent.append((instance, histogram(points, temporality=2)))
        for (account, _), total in sums.items():
            expected[account, "gateway.milliseconds"] += Decimal(repr(total)) * 1000
    async with gateway(store) as client:
        for _ in range(2):
            chance.shuffle(sent)
            for instance, metric in sent:
                resource = {"service.name": "kong", "service.instance.id": instance}
                response = await client.metrics(resource, metric)
                assert not response.HasField("partial_success"), response
    assert billed(dsn) == expected
    async with store.reading() as connection:
        assert (await audit(connection)).clean


async def test_two_values_for_one_interval_of_a_source_are_a_conflict_and_merged_routes_are_none(
    store: Store, dsn: str
) -> None:
    kong = {"service.name": "kong", "service.instance.id": "one"}

    def points(count: int) -> Metric:
        return histogram(
            histogram_point(BASE, BASE + SECOND, count + n, 1.5, {"kong.consumer": "acme", "http.route": f"/{n}"})
            for n in range(3)
        )

    async with gateway(store) as client:
        assert not (await client.metrics(kong, points(5))).HasField("partial_success")
        assert billed(dsn)["acme", "gateway.requests"] == 5 + 6 + 7
        assert (await client.metrics(kong, points(50))).partial_success.rejected_data_points == 3
    assert billed(dsn)["acme", "gateway.requests"] == 5 + 6 + 7
    [(reason, payload)] = rows(dsn, "SELECT reason, payload FROM usage_quarantine ORDER BY payload LIMIT 1")
    assert reason == "value_conflict"
    # What was kept is the same contradiction when it is taken out again, not new usage.
    again = decode_kept(
        "default",
        "metrics",
        "gateway.requests",
        bytes(payload),  # type: ignore[arg-type]
        rules=parse_rules(RULES),
        account=None,
        limits=TimeLimits(),
        now_ns=NOW,
    )
    assert again.points
    assert (await store.write(again)).inserted == 0
    assert billed(dsn)["acme", "gateway.requests"] == 5 + 6 + 7


async def test_unattributed_usage_is_kept_and_counts_once_when_somebody_is_named(store: Store, dsn: str) -> None:
    kong = {"service.name": "kong", "service.instance.id": "one"}
    points = [histogram_point(BASE, BASE + n * SECOND, n, None, {"http.route": "/a"}) for n in (1, 2, 3)]
    named = histogram_point(BASE, BASE + SECOND, 40, 2.0, {"kong.consumer": "acme"})
    async with gateway(store) as client:
        for _ in range(2):
            answer = (await client.metrics(kong, histogram([*points, named]))).partial_success
            assert answer.rejected_data_points == 3
            assert "kong.consumer" in answer.error_message
        assert (await client.spans([span(1, {"http.response.status_code": 200})])).partial_success.rejected_spans == 1
    assert billed(dsn) == {("acme", "gateway.requests"): 40, ("acme", "gateway.milliseconds"): 2000}
    kept = rows(dsn, "SELECT tenant, signal, meter, payload, reason FROM usage_quarantine")
    # Three points and a span, each for two meters; a histogram without a sum names nobody first.
    assert [row[-1] for row in kept] == ["account_missing"] * 8
    assert {row[2] for row in kept} == {"gateway.requests", "gateway.milliseconds"}
    for _ in range(2):
        for tenant, signal, meter, payload, _ in kept:
            batch = decode_kept(
                tenant,  # type: ignore[arg-type]
                signal,  # type: ignore[arg-type]
                meter,  # type: ignore[arg-type]
                bytes(payload),  # type: ignore[arg-type]
                rules=parse_rules(RULES),
                account="globex",
                limits=TimeLimits(),
                now_ns=NOW,
            )
            await store.write(batch)
    assert billed(dsn)["globex", "gateway.requests"] == 1 + 2 + 3 + 1
    assert billed(dsn)["acme", "gateway.requests"] == 40


async def test_sampled_spans_are_kept_and_not_billed(store: Store, dsn: str) -> None:
    usual = {"tenant.id": "acme", "http.response.status_code": 200}
    signs = [
        {"trace_state": "ot=th:8"},
        {"trace_state": "vendor=1,ot=rv:1;th:c"},
        {"trace_state": "ot=p:3"},
        {"flags": 0x100},
    ]
    spans = [span(n, usual, **fields) for n, fields in enumerate(signs)]
    complete = [{"trace_state": "ot=th:0"}, {"trace_state": "ot=p:0"}, {"flags": 0x101}, {"trace_state": "x=th:8"}]
    spans += [span(100 + n, usual, **fields) for n, fields in enumerate(complete)]
    async with gateway(store) as client:
        answer = (await client.spans(spans)).partial_success
    assert answer.rejected_spans == len(signs)
    assert "sampled: allow" in answer.error_message
    assert billed(dsn)["acme", "gateway.requests"] == len(complete)
    assert rows(dsn, "SELECT reason, count(*) FROM usage_quarantine GROUP BY 1") == [("span_sampled", 2 * len(signs))]


async def test_our_own_sdk_counters_with_an_account_and_foreign_metrics_are_as_without_a_file(
    store: Store, dsn: str
) -> None:
    async with gateway(store) as client:
        sdk = request(sum_metric([number(BASE, NOW, 5, {"tallymark.account.id": "acme"})]))
        await client.send(sdk)
        other = request(sum_metric([number(BASE, NOW, 7, {"tallymark.account.id": "acme"})], name="x"), scope="other")
        await client.send(other)
        await client.metrics(ENVOY, histogram([histogram_point(BASE, NOW, 3, 1.0, {})], name="process.cpu.time"))
        top = client.pipeline.unmatched.top("metrics")
    assert billed(dsn) == {("acme", "api.requests"): 5, ("acme", "x"): 7}
    assert top == [("process.cpu.time", 1)]
