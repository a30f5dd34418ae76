"""OTLP over gRPC to committed rows, over bare COPY of the same rows into the same table with its index.

The database is the embedded PostgreSQL; the collector is a process of its own and the client another, on the same
cores as the database.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import psycopg
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from rich.table import Table

from tallymark import conventions
from tallymark_collector.model import Batch, Point
from tallymark_collector.processors.decoding import StreamCache, decode_metrics
from tallymark_collector.processors.validation import TimeLimits
from tallymark_collector.store import Store, rows
from tallymark_collector.store.engines import connect_string

POINTS: Final = 160_000
ACCOUNTS: Final = 1000
SIZES: Final = (200, 8000)
"""Points per request."""
SECOND: Final = 1_000_000_000
METHOD: Final = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


@dataclass(frozen=True)
class Run:
    """One measured way."""

    way: str
    size: int
    clients: int
    seconds: float

    @property
    def rate(self) -> float:
        """Points per second."""
        return POINTS / self.seconds


def tables() -> Iterator[Table]:
    """One table of rates and ratios to bare COPY."""
    with (
        tempfile.TemporaryDirectory(prefix="tallymark-bench-") as folder,
        connect_string(f"embedded:{Path(folder) / 'pg'}") as dsn,
    ):
        runs = asyncio.run(_measure(dsn))
    base = {run.size: run.rate for run in runs if run.way.startswith("bare COPY")}
    table = Table(title=f"{POINTS:,} points of {ACCOUNTS} accounts, 5 attributes, embedded PostgreSQL")
    for column in ("way", "points/request", "clients", "points/s", "over COPY"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for run in runs:
        ratio = f"{run.rate / base[run.size]:.2f}"
        table.add_row(run.way, f"{run.size:,}", str(run.clients), f"{run.rate:,.0f}", ratio)
    yield table


async def _measure(dsn: str) -> list[Run]:
    runs = []
    store = Store(dsn)
    await store.open()
    await store.migrate()
    for size in SIZES:
        requests = list(_requests(size))
        batches = _batches(requests)
        runs.append(Run("bare COPY, one commit per request", size, 1, await _copied(dsn, batches)))
        runs.append(Run("store.write alone", size, 1, await _timed(dsn, lambda b=batches: _written(store, b))))
        async with _collector(dsn) as port:
            for way, clients in (("OTLP/gRPC to commit", 1), ("OTLP/gRPC to commit", 4), ("the same again", 4)):
                work = lambda r=requests, c=clients, p=port: _sent(p, r, c)  # noqa: E731 - bound in the loop
                seconds = await (_clocked(work) if way == "the same again" else _timed(dsn, work))
                runs.append(Run(way, size, clients, seconds))
        with psycopg.connect(dsn) as connection:
            row = connection.execute("SELECT count(*), sum(quantity) FROM tallymark.usage_point").fetchone()
            assert row == (POINTS, POINTS), "a fast collector that loses points is not fast"
    await store.close()
    return runs


def _requests(size: int) -> Iterator[bytes]:
    """Whole intervals of all accounts' streams, cut into requests of `size` points."""
    now = time.time_ns() // SECOND * SECOND
    request, metric = _empty()
    for i in range(POINTS):
        interval, account = divmod(i, ACCOUNTS)
        end = now - (POINTS // ACCOUNTS - interval) * 10 * SECOND
        point = metric.sum.data_points.add(start_time_unix_nano=end - 10 * SECOND, time_unix_nano=end, as_int=1)
        texts = {
            conventions.ACCOUNT: f"account-{account}",
            conventions.PLAN: "pro",
            conventions.HTTP_ROUTE: "/items/{id}",
            conventions.HTTP_METHOD: "GET",
        }
        for key, text in texts.items():
            point.attributes.add(key=key).value.string_value = text
        point.attributes.add(key=conventions.HTTP_STATUS).value.int_value = 200
        if len(metric.sum.data_points) == size:
            yield request.SerializeToString()
            request, metric = _empty()


def _empty() -> tuple[ExportMetricsServiceRequest, Metric]:
    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    for key, text in ((conventions.SERVICE_NAME, "shop"), (conventions.SERVICE_INSTANCE, "bench")):
        resource.resource.attributes.add(key=key).value.string_value = text
    scope = resource.scope_metrics.add()
    scope.scope.name = conventions.SCOPE_NAME
    metric = scope.metrics.add(name="api.requests", unit="{request}")
    metric.sum.aggregation_temporality = 1
    metric.sum.is_monotonic = True
    return request, metric


def _batches(requests: Sequence[bytes]) -> list[list[Point]]:
    cache = StreamCache()
    return [decode_metrics("default", body, cache, TimeLimits(), time.time_ns()).points for body in requests]


async def _copied(dsn: str, batches: list[list[Point]]) -> float:
    blobs = ["".join(map(X
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        connection.execute("DROP TABLE IF EXISTS bare; CREATE TABLE bare (LIKE usage_point INCLUDING ALL)")
        start = time.perf_counter()
        for blob in blobs:
            with connection.cursor().copy(f"COPY bare ({rows.POINT_COLUMNS}) FROM STDIN") as copy:
                copy.write(blob)
        seconds = time.perf_counter() - start
        connection.execute("DROP TABLE bare")
    return seconds


async def _timed(dsn: str, work: Callable[[], Awaitable[None]]) -> float:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        # In the order in which the refresher of a running collector locks them.
        connection.execute("TRUNCATE usage_dirty, usage_hour, usage_point")
        connection.execute("CHECKPOINT")
    return await _clocked(work)


async def _clocked(work: Callable[[], Awaitable[None]]) -> float:
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


async def _written(store: Store, batches: list[list[Point]]) -> None:
    for batch in batches:
        await store.write(Batch(points=batch))


async def _sent(port: int, requests: Sequence[bytes], clients: int) -> None:
    left = iter(requests)

    async def client() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(METHOD)
            for body in left:
                answer = await call(body)
                assert answer == b"", "a refusal"

    await asyncio.gather(*(client() for _ in range(clients)))


@asynccontextmanager
async def _collector(dsn: str) -> AsyncIterator[int]:
    arguments = ["serve", "--database", dsn, "--port", "0", "--json"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tallymark_collector", *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield json.loads(await process.stdout.readline())["port"]
    finally:
        process.terminate()
        await process.wait()
