"""The server as a client sees it: real gRPC, real database, and stores that fail on purpose."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc
import psycopg
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tallymark_collector.errors import StoreUnavailable, UserError
from tallymark_collector.pipeline import Pipeline, Writing
from tallymark_collector.receivers.server import Server, serving
from tallymark_collector.settings import Limits, Settings
from tallymark_collector.store import Store
from tests.support.receiving import ACME, GOOD, NOW, Failing, Stuck
from tests.support.usage import BASE, key_values, number, request, sum_metric

METRICS = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


Connect = Callable[..., AbstractAsyncContextManager[tuple[grpc.aio.Channel, Server]]]


@asynccontextmanager
async def connected(store: Writing, **limits: int) -> AsyncIterator[tuple[grpc.aio.Channel, Server]]:
    pipeline = Pipeline(store, Limits(**limits), now_ns=lambda: NOW)  # type: ignore[arg-type]
    settings = Settings("unused", port=0, limits=pipeline.limits, drain_seconds=3)
    async with (
        serving(pipeline, settings) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield channel, server


def metrics(channel: grpc.aio.Channel) -> metrics_service_pb2_grpc.MetricsServiceStub:
    return metrics_service_pb2_grpc.MetricsServiceStub(channel)


async def test_success_leaves_partial_success_unset_and_is_committed(store: Store, dsn: str) -> None:
    async with connected(store) as (channel, _):
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            response = await metrics(channel).Export(GOOD, compression=compression)
            assert not response.HasField("partial_success")
            with psycopg.connect(dsn) as another:
                assert another.execute("SELECT sum(quantity) FROM tallymark.usage_point").fetchone() == (5,)


async def test_an_empty_request_succeeds() -> None:
    async with connected(Failing(AssertionError("nothing to write"))) as (channel, _):
        response = await metrics(channel).Export(metrics_service_pb2.ExportMetricsServiceRequest())
        assert response == metrics_service_pb2.ExportMetricsServiceResponse()


async def test_bad_points_are_refused_by_partial_success_and_the_rest_is_kept(store: Store, dsn: str) -> None:
    points = [number(BASE, NOW, value, ACME) for value in (1, -1, 2)] + [number(BASE, NOW, 9, {})]
    points[2].start_time_unix_nano += 1
    async with connected(store) as (channel, _):
        response = await metrics(channel).Export(request(sum_metric(points)))
        assert response.partial_success.rejected_data_points == 2
        assert "value_negative" in response.partial_success.error_message
        assert "account_missing" in response.partial_success.error_message
    with psycopg.connect(dsn) as another:
        assert another.execute("SELECT sum(quantity) FROM tallymark.usage_point").fetchone() == (3,)
        assert another.execute("SELECT count(*) FROM tallymark.usage_quarantine").fetchone() == (2,)


async def test_a_contradicting_point_is_refused_and_kept(store: Store, dsn: str) -> None:
    async with connected(store) as (channel, _):
        await metrics(channel).Export(GOOD)
        response = await metrics(channel).Export(request(sum_metric([number(BASE, NOW, 6, ACME)])))
        assert response.partial_success.rejected_data_points == 1
        assert "value_conflict" in response.partial_success.error_message
    with psycopg.connect(dsn) as another:
        assert another.execute("SELECT reason FROM tallymark.usage_quarantine").fetchall() == [("value_conflict",)]
        [(payload,)] = another.execute("SELECT payload FROM tallymark.usage_quarantine").fetchall()
    kept = metrics_service_pb2.ExportMetricsServiceRequest.FromString(payload)
    assert kept == request(sum_metric([number(BASE, NOW, 6, ACME)])), "it can be sent again as it came"


async def test_spans_become_evidence_once(store: Store, dsn: str) -> None:
    traces = trace_service_pb2.ExportTraceServiceRequest()
    resource = traces.resource_spans.add()
    resource.resource.attributes.extend(key_values({"service.name": "shop"}))
    spans = resource.scope_spans.add().spans
    usage = {
        "tallymark.meter.api.requests": 1,
        "tallymark.meter.llm.tokens": "0.5",
        "user.id": "ann",
        "http.route": "/a",
    }
    for i, attributes in enumerate([{**ACME, **usage}, {"http.route": "/b"}, usage]):
        spans.add(
            trace_id=bytes([i] * 16),
            span_id=bytes([i] * 8),
            name="GET /a",
            start_time_unix_nano=BASE,
            end_time_unix_nano=NOW,
            attributes=key_values(attributes),
        )
    event = spans[0].events.add(name="tallymark.usage")
    event.attributes.extend(key_values({"tallymark.account.id": "globex", "tallymark.meter.api.requests": 2}))
    async with connected(store) as (channel, _):
        for _ in range(2):
            response = await trace_service_pb2_grpc.TraceServiceStub(channel).Export(traces)
            assert response.partial_success.rejected_spans == 1, "the third names no account"
        spans[0].attributes.extend(key_values({"tallymark.meter.api.requests": 3}))
        again = await trace_service_pb2_grpc.TraceServiceStub(channel).Export(traces)
        assert "value_conflict" in again.partial_success.error_message
    with psycopg.connect(dsn) as another:
        found = another.execute(
            "SELECT account, meter, quantity, user_id, service, attributes->>'http.route' FROM tallymark.usage_evidence"
            " ORDER BY 1, 2"
        ).fetchall()
    assert [tuple(map(str, row)) for row in found] == [
        ("acme", "api.requests", "1", "ann", "shop", "/a"),
        ("acme", "llm.tokens", "0.5", "ann", "shop", "/a"),
        ("globex", "api.requests", "2", "None", "shop", "None"),
    ]


async def test_logs_are_taken_and_dropped() -> None:
    logs = logs_service_pb2.ExportLogsServiceRequest()
    logs.resource_logs.add().scope_logs.add().log_records.add().body.string_value = "hello"
    async with connected(Failing(AssertionError("nothing to write"))) as (channel, _):
        response = await logs_service_pb2_grpc.LogsServiceStub(channel).Export(logs)
        assert not response.HasField("partial_success")


@pytest.mark.parametrize(
    "error",
    [
        StoreUnavailable("the database is away"),
        psycopg.errors.UndefinedTable("nobody migrated"),
        ZeroDivisionError("a bug of ours"),
        RecursionError(),
    ],
)
async def test_a_failing_store_is_unavailable_with_a_delay_in_both_forms(error: Exception, store: Store) -> None:
    failing = Failing(error, behind=store, times=1)
    async with connected(failing) as (channel, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await metrics(channel).Export(GOOD)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        trailing = dict(caught.value.trailing_metadata())
        plain = RetryInfo.FromString(trailing["google.rpc.retryinfo-bin"])
        status = Status.FromString(trailing["grpc-status-details-bin"])
        detailed = RetryInfo()
        assert status.code == grpc.StatusCode.UNAVAILABLE.value[0]
        assert status.details[0].Unpack(detailed)
        assert plain == detailed
        assert plain.retry_delay.seconds == 1
        await metrics(channel).Export(GOOD)


@pytest.mark.parametrize("service", ["metrics.v1.Metrics", "trace.v1.Trace", "logs.v1.Logs"])
async def test_malformed_bytes_are_an_invalid_argument(service: str) -> None:
    async with connected(Failing(AssertionError("nothing to write"))) as (channel, _):
        call = channel.unary_unary(f"/opentelemetry.proto.collector.{service}Service/Export")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\x0a\xff\xff\xff\xff\x0f")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "not an OTLP Export" in str(caught.value.details())


async def test_a_flood_is_refused_retryable_and_what_was_let_in_finishes() -> None:
    stuck = Stuck()
    size = GOOD.ByteSize()
    async with connected(stuck, in_flight_bytes=2 * size) as (channel, _):
        waiting = [asyncio.ensure_future(metrics(channel).Export(GOOD)) for _ in range(2)]
        await stuck.reached(2)
        assert not any(one.done() for one in waiting), "both wait for the store"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await metrics(channel).Export(GOOD)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "google.rpc.retryinfo-bin" in dict(caught.value.trailing_metadata())
        stuck.go.set()
        await asyncio.gather(*waiting)
        await metrics(channel).Export(GOOD)


async def test_a_request_over_the_limit_is_refused_after_decompression() -> None:
    big = request(sum_metric([number(BASE, NOW, 5, {**ACME, "pad": "x" * 200_000})]))
    async with connected(Failing(AssertionError("nothing to write")), request_bytes=100_000) as (channel, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await metrics(channel).Export(big, compression=grpc.Compression.Gzip)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_health_says_serving_and_then_not(store: Store) -> None:
    async with connected(store) as (channel, server):
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "opentelemetry.proto.collector.metrics.v1.MetricsService"):
            response = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert response.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await server.drain(1)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_draining_finishes_what_was_accepted() -> None:
    stuck = Stuck()
    async with connected(stuck) as (channel, server):
        waiting = asyncio.ensure_future(metrics(channel).Export(GOOD))
        await stuck.entered.wait()
        draining = asyncio.ensure_future(server.drain(60))
        await asyncio.sleep(0.1)
        stuck.go.set()
        assert not (await waiting).HasField("partial_success")
        await draining


async def test_a_second_server_on_the_port_is_refused(store: Store) -> None:
    async with connected(store) as (_, server):
        with pytest.raises(UserError, match="another collector"):
            async with serving(Pipeline(store), Settings("unused", port=server.port)):
                pass
        with socket.socket() as busy:
            assert busy.connect_ex(("127.0.0.1", server.port)) == 0
