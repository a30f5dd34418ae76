"""Clients that watch health: they are told of the end, and hold up neither it nor each other."""

from __future__ import annotations

import asyncio
import struct

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from tests.support.http2 import dialled as framed
from tests.support.http2 import frame
from tests.support.receiving import Counting, receiving

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
METRICS = "opentelemetry.proto.collector.metrics.v1.MetricsService"
LONG = 600
"""Seconds that a drain may take where somebody has a call under way: nobody waits for it here."""


async def heard(port: int, name: str, begun: asyncio.Event) -> tuple[list[int], grpc.StatusCode]:
    """What a client that watches is told, and how that ends."""
    states = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = HealthStub(channel).Watch(HealthCheckRequest(service=name))
        try:
            async for answer in call:
                states.append(answer.status)
                begun.set()
        except grpc.aio.AioRpcError as error:
            return states, error.code()
    raise AssertionError("it ended without a status")


async def test_who_watches_is_told_of_the_end_and_does_not_hold_it_up() -> None:
    await asyncio.wait_for(_watched_until_the_end(), 60)


async def _watched_until_the_end() -> None:
    names = ("", METRICS, "no.such.Service")
    async with receiving(Counting(), drain_seconds=LONG) as server:
        begun = [asyncio.Event() for _ in names]
        watching = [
            asyncio.ensure_future(heard(server.port, name, each)) for name, each in zip(names, begun, strict=True)
        ]
        for each in begun:
            await each.wait()
    told = [await one for one in watching]
    ended = grpc.StatusCode.UNAVAILABLE
    unknown = HealthCheckResponse.SERVICE_UNKNOWN
    assert told == [([SERVING, NOT_SERVING], ended), ([SERVING, NOT_SERVING], ended), ([unknown], ended)]


async def test_who_watches_and_does_not_read_holds_up_nobody() -> None:
    await asyncio.wait_for(_watched_beside_who_does_not_read(), 60)


async def _watched_beside_who_does_not_read() -> None:
    trouble: list[str | None] = [None]

    async def ask() -> str | None:
        return trouble[0]

    async with (
        # Its calls hold up the end as any that is under way does; nothing tells them from one whose client is slow.
        receiving(Counting(), drain_seconds=2, serve={"ask": ask}) as server,
        framed(server.port) as deaf,
    ):
        deaf.says(frame(4, 0, 0, struct.pack(">HI", 4, 0)))  # nothing may be sent on its streams
        await deaf.heard()
        question = HealthCheckRequest().SerializeToString()
        for _ in range(10):
            await deaf.send(deaf.call("/grpc.health.v1.Health/Watch"), b"\0\0\0\0" + bytes([len(question)]) + question)
        await deaf.heard()
        begun = asyncio.Event()
        watching = asyncio.ensure_future(heard(server.port, "", begun))
        await begun.wait()
        trouble[0] = "the database is away"
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            while (await HealthStub(channel).Check(HealthCheckRequest())).status != NOT_SERVING:  # noqa: ASYNC110 - a remote state
                await asyncio.sleep(0.05)
    states, code = await watching
    assert (states, code) == ([SERVING, NOT_SERVING], grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize("name", ["", METRICS])
async def test_what_is_asked_is_answered_and_what_there_is_not_is_not_found(name: str) -> None:
    async with (
        receiving(Counting()) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = HealthStub(channel)
        assert (await stub.Check(HealthCheckRequest(service=name), timeout=60)).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(HealthCheckRequest(service="no.such.Service"), timeout=60)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
