"""OTLP over gRPC to committed rows, over bare COPY of the same rows into the same table with its unique index.

The collector is a process of its own and the client another, on the same cores as the database. All ways take turns,
several times, and the medians are shown: what else the machine does then falls on all of them. With
TALLYMARK_BENCH_DSN a second server, say TimescaleDB, stands beside the embedded PostgreSQL; a database is made in it.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Final

import psycopg
from psycopg.conninfo import make_conninfo
from rich.table import Table

from benchmarks import ingest_load as load
from benchmarks import ingest_stages
from tallymark_collector.errors import UserError
from tallymark_collector.model import Batch
from tallymark_collector.store import Store, locks
from tallymark_collector.store.engines import connect_string

SIZES: Final = (200, 8000)
"""Points per request."""
ROUNDS: Final = int(os.environ.get("TALLYMARK_BENCH_ROUNDS", "5"))
NAME: Final = "tallymark_bench_ingest"
TEXT, BINARY = "COPY, text, as it comes", "COPY, binary, in the index's order"
GRPC_ONE, GRPC = "OTLP/gRPC to commit, 1 client", "OTLP/gRPC to commit, 4 clients"


@dataclass
class Way:
    """One way, measured several times."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Microseconds of the collector's CPU for a point."""
    sent: int = load.POINTS

    @property
    def rate(self) -> float:
        """Points per second."""
        return self.sent / statistics.median(self.seconds)


@dataclass
class Measured:
    """Everything of one server and size of request."""

    ways: dict[str, Way] = field(default_factory=lambda: defaultdict(Way))
    acknowledged: list[float] = field(default_factory=list)
    """Seconds, at half of the rate of 4 clients."""


def tables() -> Iterator[Table]:
    """A table for each server: rates, ratios to bare COPY, CPU, acknowledgements."""
    with _servers() as servers:
        for name, dsn in servers.items():
            for size, measured in asyncio.run(_measure(dsn)).items():
                yield _table(f"{name}: {load.POINTS:,} points, {size:,} a request, median of {ROUNDS}", measured)
    yield ingest_stages.table()


@contextmanager
def _servers() -> Iterator[dict[str, str]]:
    with (
        tempfile.TemporaryDirectory(prefix="tallymark-bench-") as folder,
        connect_string(f"embedded:{Path(folder) / 'pg'}") as dsn,
    ):
        servers = {"embedded": dsn}
        if given := os.environ.get("TALLYMARK_BENCH_DSN"):
            with psycopg.connect(given, autocommit=True) as connection:
                connection.execute(f"DROP DATABASE IF EXISTS {NAME} WITH (FORCE)")
                connection.execute(f"CREATE DATABASE {NAME}")
            servers["TALLYMARK_BENCH_DSN"] = make_conninfo(given, dbname=NAME)
        yield servers


def _table(title: str, measured: Measured) -> Table:
    table = Table(title=title)
    for column in ("way", "points/s", "over binary", "over text", "collector's CPU"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, way in measured.ways.items():
        ratios = [f"{way.rate / measured.ways[base].rate:.2f}" for base in (BINARY, TEXT)]
        cpu = f"{statistics.median(way.cpu):.1f} us/point" if way.cpu else ""
        table.add_row(name, f"{way.rate:,.0f}", *ratios, cpu)
    cuts = statistics.quantiles(measured.acknowledged, n=100)
    table.caption = f"acknowledged at half of that load: p50 {cuts[49] * 1e3:.0f} ms, p99 {cuts[98] * 1e3:.0f} ms"
    return table


async def _measure(dsn: str) -> dict[int, Measured]:
    with psycopg.connect(dsn) as connection:
        statement = "SELECT count(*) FROM pg_available_extensions WHERE name = 'timescaledb'"
        [available] = connection.execute(statement).fetchone() or (0,)
    store = Store(dsn, wants_timescale=available > 0)
    await store.open()
    await store.migrate()
    try:
        await store.check_columns()
        columns = True
    except UserError:
        columns = False
    found = {size: Measured() for size in SIZES}
    async with load.collector(dsn) as collector:
        for _ in range(ROUNDS):
            for size, measured in found.items():
                await _round(dsn, store, collector, size, measured)
                if columns:
                    await _into_columns(dsn, store, collector, size, measured)
        for size, measured in found.items():
            _empty(dsn)
            rate = measured.ways[GRPC].rate / 2 / size
            measured.acknowledged = await load.sent(collector.port, load.requests(size), 16, rate=rate)
    await store.close()
    return found


async def _round(dsn: str, store: Store, collector: load.Collector, size: int, measured: Measured) -> None:
    bodies = load.requests(size)
    batches = load.batches(bodies)
    ways = measured.ways
    for name, form, blobs in ((TEXT, "text", load.text_blobs), (BINARY, "binary", load.binary_blobs)):
        _empty(dsn)
        made = list(blobs(batches))
        ways[name].seconds.append(await asyncio.to_thread(load.copied, dsn, made, form))
    _empty(dsn)
    ways["store.write alone"].seconds.append(
        await _clocked(lambda: _written(store, [Batch(points=b) for b in batches]))
    )
    for name, clients in ((GRPC_ONE, 1), (GRPC, 4)):
        _empty(dsn)
        await _timed(ways[name], collector, bodies, clients)
        _check(dsn, load.POINTS)
    repeating = load.requests(size, repeated=0.1)
    ways["the same with 10 % duplicates"].sent = sum(map(len, load.batches(repeating)))
    _empty(dsn)
    await _timed(ways["the same with 10 % duplicates"], collector, repeating, 4)
    _check(dsn, load.POINTS)


async def _into_columns(dsn: str, store: Store, collector: load.Collector, size: int, measured: Measured) -> None:
    """Late points into pieces of the table that are laid out as columns and hold the same streams already."""
    _empty(dsn)
    days = 30 * 86_400 * load.SECOND
    # 5 s apart, which all intervals of one moment are not: no point of theirs is the other's.
    earlier, bodies = load.requests(8000, offset=days), load.requests(size, offset=days + 5 * load.SECOND)
    await _written(store, [Batch(points=points) for points in load.batches(earlier)])
    assert await store.lay_out(datetime.now(timezone.utc) - timedelta(days=20)) > 0
    await _timed(measured.ways["the same, late, into columns"], collector, bodies, 4)
    _check(dsn, 2 * load.POINTS)


async def _timed(way: Way, collector: load.Collector, bodies: Sequence[bytes], clients: int) -> None:
    cpu = collector.cpu()
    way.seconds.append(await _clocked(lambda: load.sent(collector.port, bodies, clients)))
    way.cpu.append((collector.cpu() - cpu) / way.sent * 1e6)


async def _clocked(work: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


async def _written(store: Store, batches: Sequence[Batch]) -> None:
    for batch in batches:
        await store.write(batch)


def _empty(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        with connection.transaction():
            # Alone: the refresher of the running collector locks these tables in another order.
            connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [locks.REFRESHING])
            connection.execute("TRUNCATE usage_dirty, usage_hour, usage_point")
        connection.execute("CHECKPOINT")


def _check(dsn: str, points: int) -> None:
    with psycopg.connect(dsn) as connection:
        row = connection.execute("SELECT count(*), sum(quantity) FROM tallymark.usage_point").fetchone()
    assert row == (points, points), "a fast collector that loses points is not fast"
