"""Credentials over real gRPC and a real database: who is let in, what others are told, whose usage it becomes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tallymark_collector.access import Authenticator, Scope, records, tokens
from tallymark_collector.access.records import InDatabase
from tallymark_collector.access.requests import tenant_of
from tallymark_collector.errors import StoreUnavailable
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.receivers.server import Server, serving
from tallymark_collector.settings import Settings
from tallymark_collector.store import Store
from tests.collector.access.conftest import Directory
from tests.support.usage import BASE, SECOND, key_values, number, request, sum_metric

NOW = BASE + 60 * SECOND
ACME = {"tallymark.account.id": "acme"}
CLAIMS = {"tenant": "globex", "tallymark.tenant": "globex", "tallymark.tenant.id": "globex"}
"""Attributes that would name a tenant, if attributes named tenants."""


@asynccontextmanager
async def guarded(store: Store, authenticator: Authenticator) -> AsyncIterator[tuple[grpc.aio.Channel, Server]]:
    pipeline = Pipeline(store, now_ns=lambda: NOW)
    async with (
        serving(pipeline, Settings("unused", port=0, drain_seconds=3), tenant_of=tenant_of(authenticator)) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield channel, server


async def made(store: Store, tenant: str, *scopes: Scope, account: str | None = None) -> str:
    async with store.transaction() as connection:
        _, token, _ = await records.add(connection, tenant, scopes or (Scope.WRITE,), account=account)
    assert token is not None
    return token.text


async def export(channel: grpc.aio.Channel, quantity: int, *headers: tuple[str, str], **resource: str) -> None:
    points = [number(BASE, NOW, quantity, {**ACME, **CLAIMS})]
    stub = metrics_service_pb2_grpc.MetricsServiceStub(channel)
    answer = await stub.Export(request(sum_metric(points), **{**CLAIMS, **resource}), metadata=headers, timeout=30)
    assert not answer.HasField("partial_success")


def bearer(text: str) -> tuple[str, str]:
    return ("authorization", f"Bearer {text}")


async def test_the_tenant_follows_from_the_token_alone(store: Store, dsn: str) -> None:
    ours, theirs = await made(store, "acme-corp"), await made(store, "globex")
    async with guarded(store, Authenticator(InDatabase(store))) as (channel, _):
        await export(channel, 5, bearer(ours), ("tenant", "globex"), ("x-tallymark-tenant", "globex"))
        await export(channel, 7, bearer(theirs))
        spans = trace_service_pb2.ExportTraceServiceRequest()
        span = spans.resource_spans.add().scope_spans.add().spans.add(trace_id=b"t" * 16, span_id=b"s" * 8)
        span.start_time_unix_nano = span.end_time_unix_nano = NOW
        span.attributes.extend(key_values({**ACME, **CLAIMS, "tallymark.meter.api.requests": 1}))
        await trace_service_pb2_grpc.TraceServiceStub(channel).Export(spans, metadata=[bearer(ours)])
    with psycopg.connect(dsn) as another:
        found = another.execute("SELECT tenant, account, quantity FROM tallymark.usage_point ORDER BY 1").fetchall()
        assert [(tenant, account, int(quantity)) for tenant, account, quantity in found] == [
            ("acme-corp", "acme", 5),
            ("globex", "acme", 7),
        ]
        assert another.execute("SELECT tenant FROM tallymark.usage_evidence").fetchall() == [("acme-corp",)]


async def test_everybody_else_is_refused_and_nothing_is_kept(
    store: Store, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    good, reads = await made(store, "acme-corp"), await made(store, "acme-corp", Scope.READ)
    of_one = await made(store, "acme-corp", Scope.READ_ACCOUNT, account="acme")
    known = tokens.read(good)
    assert known is not None
    forged = tokens.of(known.id, tokens.make().text[17:60]).text
    ended = await made(store, "acme-corp")
    async with store.transaction() as connection:
        await records.revoke(connection, ended)
    refused = {
        (): "UNAUTHENTICATED",
        (bearer(forged),): "UNAUTHENTICATED",
        (bearer(ended),): "UNAUTHENTICATED",
        (bearer(good.swapcase()),): "UNAUTHENTICATED",
        (("authorization", good),): "UNAUTHENTICATED",
        (("authorization", f"Bearer {good} {good}"),): "UNAUTHENTICATED",
        (bearer(good), bearer(good)): "UNAUTHENTICATED",
        (bearer(good), bearer(forged)): "UNAUTHENTICATED",
        (bearer(reads),): "PERMISSION_DENIED",
        (bearer(of_one),): "PERMISSION_DENIED",
    }
    async with guarded(store, Authenticator(InDatabase(store))) as (channel, _):
        for service in ("metrics.v1.Metrics", "trace.v1.Trace", "logs.v1.Logs"):
            call = channel.unary_unary(f"/opentelemetry.proto.collector.{service}Service/Export")
            for headers, code in refused.items():
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(request(sum_metric([number(BASE, NOW, 1, ACME)])).SerializeToString(), metadata=headers)
                assert caught.value.code().name == code
                told = f"{caught.value.details()} {caught.value.trailing_metadata()}"
                assert not any(text[17:60] in told for text in (good, forged, ended, reads, of_one))
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, "a probe needs no token"
    assert not any(text[17:60] in caplog.text for text in (good, forged, ended, reads, of_one))
    with psycopg.connect(dsn) as another:
        for table in ("usage_point", "usage_quarantine", "usage_stream", "usage_evidence"):
            assert another.execute(f"SELECT count(*) FROM tallymark.{table}").fetchone() == (0,)  # type: ignore[arg-type]


async def test_a_database_that_is_away_asks_for_patience(store: Store) -> None:
    directory = Directory(away=StoreUnavailable("could not connect to host=db.internal user=tallymark_writer"))
    async with guarded(store, Authenticator(directory)) as (channel, _):
        for headers in ((), (bearer(tokens.make().text),)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await export(channel, 1, *headers)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "google.rpc.retryinfo-bin" in dict(caught.value.trailing_metadata())
            assert "db.internal" not in str(caught.value.details())


async def test_a_table_that_cannot_be_read_asks_for_patience_too(store: Store, dsn: str) -> None:
    text = await made(store, "acme-corp")
    with psycopg.connect(dsn, autocommit=True) as another:
        another.execute("ALTER TABLE tallymark.credential RENAME TO elsewhere")
    async with guarded(store, Authenticator(InDatabase(store))) as (channel, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await export(channel, 1, bearer(text))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
