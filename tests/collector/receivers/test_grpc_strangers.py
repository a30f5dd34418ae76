"""Calls over gRPC that nobody offers, whose paths may be anything: they end no server and disturb no call."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub

from tests.support.http2 import announced, dialled
from tests.support.receiving import GOOD, Counting, Stuck, receiving

EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
NO_TEXT = "/x\udcff\udcfe/Export"
"""As bytes that are not UTF-8."""
STREAMS = 50
"""Calls of strangers while others are served."""


async def test_calls_whose_paths_are_no_text_disturb_nobody() -> None:
    """Many, on a connection each, beside a client that sends one call after the other: each of its calls succeeds, on
    the one connection that it has."""
    counting, sent, over = Counting(), 0, asyncio.Event()

    async def send(port: int) -> int:
        nonlocal sent
        # Without retries: a server that ends would be seen.
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_retries", 0)]) as channel:
            while not over.is_set() or sent < STREAMS:
                await MetricsServiceStub(channel).Export(GOOD, timeout=60)
                sent += 1
        return sent

    async with receiving(counting) as server:
        sending = asyncio.create_task(send(server.port))
        statuses = []
        for _ in range(STREAMS):
            async with dialled(server.port) as stranger:
                statuses.append(await stranger.status(stranger.call(NO_TEXT)))
        over.set()
        await sending
        assert server.restarts == 0
    assert statuses == ["12"] * STREAMS, "UNIMPLEMENTED"
    assert counting.points == sent


async def test_a_call_under_way_is_acknowledged_whatever_strangers_ask_for() -> None:
    stuck = Stuck()
    async with (
        receiving(stuck) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        dialled(server.port) as stranger,
    ):
        waiting = asyncio.ensure_future(MetricsServiceStub(channel).Export(GOOD))
        await stuck.entered.wait()
        # With a body that never ends, and one that is large: nothing of it is read.
        streams = [stranger.call(path) for path in (NO_TEXT, "/", "/a", EXPORT + "\udcff", EXPORT + "/")]
        for stream in streams:
            await stranger.push(stream, announced(60 << 20) + bytes(1 << 20))
        # Of a further head a connection may tell by a number what it has told before: ended is what can be seen.
        statuses = [await stranger.status(stream) for stream in streams]
        assert statuses[0] == "12"
        state = await HealthStub(channel).Check(HealthCheckRequest(), timeout=60)
        assert state.status == HealthCheckResponse.SERVING
        stuck.go.set()
        await waiting


@pytest.mark.parametrize("path", ["/opentelemetry.proto.collector.profiles.v1.Profiles/Export", EXPORT + "2", "/x"])
async def test_what_nobody_offers_is_unimplemented(path: str) -> None:
    async with (
        receiving(Counting()) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError, match="Method not found!") as caught:
                await channel.unary_unary(path)(b"x" * 100_000, timeout=60)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            with pytest.raises(grpc.aio.AioRpcError, match="Method not found!"):
                await channel.stream_stream(path)(timeout=60).read()
        await MetricsServiceStub(channel).Export(GOOD, timeout=60)
