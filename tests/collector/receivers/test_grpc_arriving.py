"""What strangers, and one tenant, can have gRPC keep: heads without bodies, bodies without ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub

from tallymark_collector.errors import Unauthenticated
from tallymark_collector.receivers import grpc_health
from tallymark_collector.receivers.admission import Admission
from tallymark_collector.settings import Connections
from tests.support.http2 import WAIT, announced, dialled
from tests.support.receiving import ACME, GOOD, NOW, Counting, Failing, receiving
from tests.support.usage import BASE, number, request, sum_metric

EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
CHECK = "/grpc.health.v1.Health/Check"
NOTHING = Failing(AssertionError("nothing to write"))
ENDLESS = announced(60 << 20) + bytes(1 << 20)
BODY = GOOD.SerializeToString()


async def by_header(headers: Iterable[tuple[str, str]], _certificate: object = ()) -> str:
    tenant = dict(headers).get("x-tenant")
    if tenant is None:
        raise Unauthenticated("send a token")
    return tenant


async def test_who_may_not_send_is_told_so_before_any_of_the_message_has_come() -> None:
    async with receiving(NOTHING, serve={"tenant_of": by_header}) as server, dialled(server.port) as connection:
        for body in (b"", ENDLESS[:1000]):
            stream = connection.call(EXPORT)
            await connection.send(stream, body)
            assert await connection.status(stream) == "16", "UNAUTHENTICATED"


async def test_nothing_is_read_of_calls_whose_tenant_is_not_known_yet() -> None:
    known = asyncio.Event()

    async def slow(_headers: object, _certificate: object = ()) -> str:
        await known.wait()
        raise Unauthenticated("send a token")

    async with receiving(NOTHING, serve={"tenant_of": slow}) as server, dialled(server.port) as connection:
        streams = [connection.call(EXPORT) for _ in range(10)]
        for stream in streams:
            await connection.push(stream, ENDLESS)
        assert max(connection.sent.values()) <= Connections().window
        known.set()
        assert [await connection.status(stream) for stream in streams] == ["16"] * 10


async def test_a_message_of_many_windows_arrives_whole() -> None:
    metric = sum_metric([number(BASE, NOW, 5, ACME)])
    metric.description = "x" * 3_000_000
    counting = Counting()
    async with (
        receiving(counting) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        for _ in range(3):
            await MetricsServiceStub(channel).Export(request(metric), timeout=WAIT)
    assert counting.points == 3


async def test_a_message_that_never_ends_is_given_up() -> None:
    async with receiving(NOTHING, body_seconds=0.2) as server:
        for body in (b"", announced(1000) + b"begun"):
            async with dialled(server.port) as connection:
                stream = connection.call(EXPORT)
                await connection.send(stream, body)
                assert await connection.status(stream) == "14", "UNAVAILABLE: over a better connection it may arrive"
                assert not connection.closed.is_set()


async def test_a_call_without_a_message_is_refused() -> None:
    async with receiving(NOTHING) as server, dialled(server.port) as connection:
        assert await connection.status(connection.call(EXPORT, end=True)) == "3", "INVALID_ARGUMENT"


async def test_one_tenants_endless_messages_are_bounded_and_nobody_elses_wait() -> None:
    counting = Counting()
    async with (
        receiving(counting, serve={"tenant_of": by_header}, connections=Connections(arriving=2)) as server,
        dialled(server.port) as other,
        dialled(server.port) as same,
    ):
        async with dialled(server.port) as endless:
            streams = [endless.call(EXPORT, ("x-tenant", "a")) for _ in range(6)]
            for stream in streams[:2]:
                await endless.send(stream, ENDLESS)
            for stream in streams[2:]:
                await endless.push(stream, ENDLESS)
            wide = [stream for stream in streams if endless.sent[stream] > Connections().window]
            assert wide == streams[:2], "of the others no more than the window has been taken"
            waits = same.call(EXPORT, ("x-tenant", "a"))
            await same.send(waits, announced(len(BODY)) + BODY, end=True)
            quick = other.call(EXPORT, ("x-tenant", "b"))
            await other.send(quick, announced(len(BODY)) + BODY, end=True)
            assert await other.status(quick) == "0"
            assert not same.ended(waits)
        assert await same.status(waits) == "0", "once the endless ones have gone"
    assert counting.points == 2


async def test_a_client_that_hangs_up_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    admission = Admission(1000, 1.0)
    async with receiving(NOTHING, serve={"admission": admission}) as server:
        for _ in range(5):
            async with dialled(server.port) as connection:
                await connection.send(connection.call(EXPORT), announced(1000) + b"begun")
                await connection.heard()
        assert admission.under_way == 0
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_strangers_with_endless_questions_do_not_keep_health_checks_from_being_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grpc_health, "SECONDS", WAIT)  # as if they came without a pause
    async with (
        receiving(NOTHING) as server,
        dialled(server.port) as strangers,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        streams = [strangers.call(CHECK) for _ in range(grpc_health.AT_ONCE)]
        for stream in streams:
            await strangers.push(stream, ENDLESS[:200_000])
        assert not any(map(strangers.ended, streams))
        late = strangers.call(CHECK)
        await strangers.push(late, ENDLESS)
        assert strangers.sent[late] <= Connections().window
        assert await strangers.status(late) == "0"
        answer = await HealthStub(channel).Check(HealthCheckRequest(service="anything"), timeout=WAIT)
        assert answer.status == HealthCheckResponse.SERVING, "of the collector as a whole"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await HealthStub(channel).Watch(HealthCheckRequest(), timeout=WAIT).read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_what_no_health_check_asks_is_refused() -> None:
    async with (
        receiving(NOTHING) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        codes = {}
        for asked in ("nobody", "x" * 2000):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await HealthStub(channel).Check(HealthCheckRequest(service=asked), timeout=WAIT)
            codes[asked[:3]] = caught.value.code().name
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(CHECK)(b"\x0a\xff", timeout=WAIT)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert codes == {"nob": "NOT_FOUND", "xxx": "INVALID_ARGUMENT"}


async def test_a_client_that_says_nothing_is_cut_off() -> None:
    async with receiving(NOTHING, connections=Connections(handshake=0.2)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.wait_for(reader.read(), WAIT)
        assert reader.at_eof()
        writer.close()
