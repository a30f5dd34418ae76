"""gRPC below OTLP: how long connections live, what is counted after decompression, reflection."""

from __future__ import annotations

import asyncio
import gzip
import socket
import sys
import threading
from collections.abc import Iterable
from contextlib import nullcontext, suppress

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub

from tallymark_collector.errors import Unauthenticated
from tallymark_collector.processes.ports import held
from tallymark_collector.receivers import grpc_server
from tallymark_collector.receivers.admission import Admission
from tallymark_collector.receivers.server import Server, grpc_options
from tallymark_collector.settings import Connections, Limits
from tests.support.http2 import announced, dialled
from tests.support.receiving import ACME, GOOD, NOW, Counting, Failing, Stuck, receiving
from tests.support.usage import BASE, number, request, sum_metric

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes share ports on Linux alone")
STOPPING = "the collector is stopping"
SERVICES = {
    "opentelemetry.proto.collector.metrics.v1.MetricsService",
    "opentelemetry.proto.collector.trace.v1.TraceService",
    "opentelemetry.proto.collector.logs.v1.LogsService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
}


class Relay:
    """A TCP relay that counts connections, as a balancer in front of the collector."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.connections = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        back, forth = await asyncio.open_connection("127.0.0.1", self.target)
        await asyncio.gather(self.pump(reader, forth), self.pump(back, writer), return_exceptions=True)

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


async def test_an_old_connection_is_left_for_another_and_no_call_is_lost() -> None:
    counting, calls = Counting(), 0
    async with receiving(counting, connections=Connections(max_age=0.3, max_age_grace=5)) as server:
        relay = Relay(server.port)
        listener = await asyncio.start_server(relay.handle, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            while relay.connections < 4:
                await MetricsServiceStub(channel).Export(GOOD, timeout=30)
                calls += 1
        listener.close()
    assert counting.points == calls > 0


async def test_a_call_under_way_outlives_the_age_of_its_connection() -> None:
    stuck = Stuck()
    async with (
        receiving(stuck, connections=Connections(max_age=0.1, max_age_grace=60)) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        waiting = asyncio.ensure_future(MetricsServiceStub(channel).Export(GOOD))
        await stuck.entered.wait()
        await asyncio.sleep(0.5)  # longer than the age; only a wrong server notices
        stuck.go.set()
        await waiting


def test_options_are_in_milliseconds() -> None:
    options = dict(grpc_options(Connections(max_age=600, keepalive=1.5), Limits(request_bytes=7)))
    assert options["grpc.so_reuseport"] == 0
    assert options["grpc.max_connection_age_ms"] == 600_000
    assert options["grpc.max_connection_age_grace_ms"] == 30_000
    assert options["grpc.keepalive_time_ms"] == 1500
    assert options["grpc.max_receive_message_length"] == 8


@pytest.mark.parametrize("compression", grpc.Compression)
async def test_a_request_over_the_limit_is_refused_by_us_however_small_its_message(
    compression: grpc.Compression,
) -> None:
    big = request(sum_metric([number(BASE, NOW, 5, {**ACME, "pad": "x" * 110_000})]))
    assert len(gzip.compress(big.SerializeToString())) < 1000
    async with (
        receiving(Failing(AssertionError("nothing to write")), request_bytes=100_000) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await MetricsServiceStub(channel).Export(big, compression=compression)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "google.rpc.retryinfo-bin" not in dict(caught.value.trailing_metadata()), "final: it is not retried"
        after = "" if compression is grpc.Compression.NoCompression else " after decompression"
        assert caught.value.details() == (
            f"the message is larger than max: more than 100000 bytes{after}. Send less at once, in more requests"
        )


@pytest.mark.parametrize("compression", grpc.Compression)
async def test_a_message_is_read_and_counted_however_it_is_compressed(compression: grpc.Compression) -> None:
    big = request(*(sum_metric([number(BASE, NOW, 5, ACME)], name=f"m{i}") for i in range(2)))
    big.resource_metrics[0].scope_metrics[0].metrics[0].description = "x" * 3_000_000
    stuck, admission = Stuck(), Admission(1 << 30, 1.0)
    async with (
        receiving(stuck, serve={"admission": admission}) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        sending = asyncio.ensure_future(MetricsServiceStub(channel).Export(big, timeout=60, compression=compression))
        await stuck.entered.wait()
        assert admission.under_way == big.ByteSize()
        stuck.go.set()
        await sending
        asked = HealthCheckRequest(service="opentelemetry.proto.collector.metrics.v1.MetricsService")
        answer = await HealthStub(channel).Check(asked, timeout=60, compression=compression)
        assert answer.status == HealthCheckResponse.SERVING


@pytest.mark.parametrize("body", [gzip.compress(GOOD.SerializeToString())[:-5], b"\x1f\x8b" + bytes(100), b"\x78\x9c"])
async def test_a_message_that_cannot_be_unfolded_is_malformed(body: bytes) -> None:
    async with (
        receiving(Failing(AssertionError("nothing to write"))) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=r"the message('s| is not) (gzip|deflate)") as caught:
            await channel.unary_unary("/opentelemetry.proto.collector.metrics.v1.MetricsService/Export")(body)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("offered", [True, False])
async def test_reflection_is_offered_where_asked_for_and_tells_our_services(offered: bool) -> None:
    async with (
        receiving(Counting(), reflection=offered) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        if not offered:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ServerReflectionInfo(iter([])).read()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            return
        call = stub.ServerReflectionInfo(
            iter(
                [
                    reflection_pb2.ServerReflectionRequest(list_services=""),
                    reflection_pb2.ServerReflectionRequest(file_containing_symbol=min(SERVICES, key=len)),
                    reflection_pb2.ServerReflectionRequest(
                        file_containing_symbol="opentelemetry.proto.collector.metrics.v1.MetricsService"
                    ),
                ]
            )
        )
        listed = await call.read()
        assert {service.name for service in listed.list_services_response.service} == SERVICES
        for _ in range(2):
            assert (await call.read()).file_descriptor_response.file_descriptor_proto


async def test_what_reflection_reads_is_small_and_nobodys_without_a_credential() -> None:
    known = {"x-tenant": "a"}

    async def by_header(headers: Iterable[tuple[str, str]], _certificate: object = ()) -> str:
        if "x-tenant" not in dict(headers):
            raise Unauthenticated("send a token")
        return known["x-tenant"]

    large = reflection_pb2.ServerReflectionRequest(file_containing_symbol="x" * 200_000)
    async with (
        receiving(Counting(), reflection=True, serve={"tenant_of": by_header}) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            call = ask(iter([large]), metadata=[*known.items()], compression=compression, timeout=60)
            with pytest.raises(grpc.aio.AioRpcError, match="larger than max: more than 4096 bytes") as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.aio.AioRpcError, match="send a token") as caught:
            await ask(iter([large]), timeout=60).read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        async with dialled(server.port) as strangers:
            stream = strangers.call("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
            await strangers.push(stream, announced(60 << 20) + bytes(1 << 20))
            assert strangers.sent[stream] <= Connections().window
            assert await strangers.status(stream) == "16", "UNAUTHENTICATED"
        listing = ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=[*known.items()])
        answers = [answer async for answer in listing]
        assert len(answers) == 1


def test_of_many_binds_at_the_same_moment_one_succeeds() -> None:
    """As many servers as threads, all at one barrier, again and again: never two on a port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    barrier, bound = threading.Barrier(4), []

    def bind() -> None:
        server = grpc.server(None, options=grpc_options(Connections(), Limits()))  # type: ignore[arg-type]
        barrier.wait()
        with suppress(RuntimeError):
            bound.append((server.add_insecure_port(f"127.0.0.1:{port}"), server))

    threads = [threading.Thread(target=bind) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bound) == 1


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=LINUX)])
async def test_a_server_that_ends_by_itself_is_started_again(
    shared: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As grpcio's own does of a path that is no text: somebody has to listen again, on the same port, though the
    connection stays open."""
    monkeypatch.setattr(grpc_server, "_NEEDED", ("what_a_later_release_lacks",))
    counting = Counting()
    # A port that processes share is never free, whoever listens.
    with held("127.0.0.1", 0) if shared else nullcontext(0) as port:
        await _breaks(counting, caplog, shared=shared, port=port)
    assert counting.points == 3


async def _breaks(counting: Counting, caplog: pytest.LogCaptureFixture, *, shared: bool, port: int) -> None:
    told: list[str] = []
    async with receiving(counting, shares_ports=shared, port=port) as server:
        writers = []
        server.readiness.told = lambda: told.append(server.readiness.reason)
        for times in (1, 2, 3):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writers.append(writer)
            writer.write(_call(b"/x\xff/Export"))
            await asyncio.wait_for(_started_again(server, times), 60)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                await MetricsServiceStub(channel).Export(GOOD, timeout=30, wait_for_ready=True)
                state = await HealthStub(channel).Check(HealthCheckRequest(), timeout=30)
                assert state.status == HealthCheckResponse.SERVING
                assert server.readiness.serving
        for writer in writers:
            writer.close()
    assert "this release of grpcio" in caplog.text
    assert caplog.text.count("nobody listens on port") == 3
    assert told == ["nobody listens for gRPC: its server ended and is started again", ""] * 3 + [STOPPING]


async def _started_again(server: Server, times: int) -> None:
    while server.restarts < times:  # noqa: ASYNC110 - a count has no event
        await asyncio.sleep(0.01)


def _call(path: bytes) -> bytes:
    """A call without a message, in HTTP/2's frames."""
    headers = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"x", b"te": b"trailers"}
    headers[b"content-type"] = b"application/grpc"
    block = b"".join(b"\0%c%s%c%s" % (len(name), name, len(value), value) for name, value in headers.items())
    settings = b"\0\0\0\4\0\0\0\0\0"
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + b"\0\0%c\1\5\0\0\0\1" % len(block) + block


async def test_connections_past_the_limit_are_closed_and_others_find_the_places_of_those_that_left() -> None:
    counting = Counting()
    async with receiving(counting, connections=Connections(most=2)) as server:
        first = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            assert await asyncio.wait_for(reader.read(), 60) == b""
            writer.close()
        for _, writer in first:
            writer.close()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            await MetricsServiceStub(channel).Export(GOOD, timeout=60, wait_for_ready=True)
    assert counting.points == 1
