"""What failed requests leave in memory, where nobody searches for cycles: next to nothing."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator

import aiohttp
import grpc
import psycopg
import pytest

from tallymark_collector.errors import StoreUnavailable
from tallymark_collector.pipeline import Writing
from tallymark_collector.settings import Limits
from tallymark_collector.store import Store
from tallymark_collector.store.committing import committing
from tests.support.receiving import ACME, NOW, Failing, receiving
from tests.support.usage import BASE, number, request, sum_metric

METRICS = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
TIMES = 9
POINTS = 2000
GOOD = request(sum_metric([number(BASE, NOW - i * 1000, 5, ACME) for i in range(POINTS)])).SerializeToString()
LITTLE = 40_000
"""Bytes of errors and statements; such a request is three times as much as it came, and thirty times decoded."""
JUNK = b"\xff" * len(GOOD)


@pytest.fixture(autouse=True)
def nobody_searches() -> Iterator[None]:
    gc.collect()
    gc.disable()
    # Records of the log keep the errors, as tests see them.
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


async def over_grpc(store: Writing, body: bytes, look: Callable[[], None]) -> None:
    async with (
        receiving(store) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        call = channel.unary_unary(METRICS)
        for _ in range(TIMES):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call(body)
            assert raised.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INVALID_ARGUMENT)
            look()


async def over_http(store: Writing, body: bytes, look: Callable[[], None]) -> None:
    headers = {"Content-Type": "application/x-protobuf"}
    async with receiving(store) as server, aiohttp.ClientSession(headers=headers) as session:
        for _ in range(TIMES):
            async with session.post(f"http://127.0.0.1:{server.http_port}/v1/metrics", data=body) as answer:
                assert answer.status in (400, 503)
                await answer.read()
            look()


OVER = pytest.mark.parametrize("over", [over_grpc, over_http])
Over = Callable[[Writing, bytes, Callable[[], None]], Awaitable[None]]


async def left(over: Over, store: Writing, body: bytes) -> float:
    """Bytes that each request has left, the first ones apart."""
    sizes: list[int] = []
    tracemalloc.start()
    try:
        await over(store, body, lambda: sizes.append(tracemalloc.get_traced_memory()[0]))
    finally:
        tracemalloc.stop()
    return (sizes[-1] - sizes[TIMES // 3]) / (TIMES - TIMES // 3 - 1)


@OVER
async def test_of_one_that_cannot_be_read(over: Over) -> None:
    assert await left(over, Failing(AssertionError("nothing to write")), JUNK) < LITTLE


@OVER
@pytest.mark.parametrize("error", [StoreUnavailable("away"), RuntimeError("unforeseen")])
async def test_of_one_that_the_store_does_not_take(over: Over, error: Exception) -> None:
    assert await left(over, Failing(error), GOOD) < LITTLE


@OVER
async def test_of_one_that_the_database_does_not_take(over: Over, store: Store, dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as another:
        another.execute(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN RAISE 'no space left' USING ERRCODE = 'disk_full'; END$$"
        )
        another.execute("CREATE TRIGGER full_disk BEFORE INSERT ON tallymark.usage_series EXECUTE FUNCTION full_disk()")
    async with committing(store, Limits()) as together:
        assert await left(over, together, GOOD) < LITTLE


async def test_of_one_whose_client_hung_up(store: Store) -> None:
    async with committing(store, Limits()) as together, receiving(together) as server:
        tracemalloc.start()
        try:
            for _ in range(TIMES):
                async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                    call = channel.unary_unary(METRICS)(GOOD)
                    await asyncio.sleep(0.02)
                    call.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await call
            deadline = time.monotonic() + 60
            while tracemalloc.get_traced_memory()[0] > TIMES * LITTLE:  # until the server has heard of it
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
        finally:
            tracemalloc.stop()
