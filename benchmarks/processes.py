"""One collector process against two, and what counting adds to a request.

Client, processes and the embedded PostgreSQL share the machine: where it has few cores, this tells that and no more.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import grpc
import psycopg
from rich.table import Table

from benchmarks.ingest_load import METHOD, SECOND
from tallymark_collector.model import Batch, WriteResult
from tallymark_collector.store.engines import connect_string
from tallymark_collector.telemetry import requests
from tallymark_collector.telemetry.requests import Requests
from tallymark_collector.telemetry.tenants import Tenants
from tallymark_collector.telemetry.written import Counted, Written
from tests.support.usage import number, request, sum_metric

POINTS: Final = 40_000
SIZES: Final = (200, 4000)
CLIENTS: Final = 4
ROUNDS: Final = 3
CALLS: Final = 20_000


def tables() -> Iterator[Table]:
    """Points per second, and microseconds per request."""
    table = Table("points a request", "processes", "points/s, median", "lowest", "highest", title="OTLP/gRPC to commit")
    with (
        tempfile.TemporaryDirectory(prefix="tallymark-bench-") as folder,
        connect_string(f"embedded:{Path(folder) / 'pg'}") as dsn,
    ):
        rates: dict[tuple[int, int], list[float]] = {(size, n): [] for size in SIZES for n in (1, 2)}
        for turn in range(ROUNDS):
            for size, processes in rates:
                rates[size, processes].append(asyncio.run(_rate(dsn, size, processes, turn)))
        for (size, processes), found in rates.items():
            median, lowest, highest = (f"{f(found):,.0f}" for f in (statistics.median, min, max))
            table.add_row(str(size), str(processes), median, lowest, highest)
    yield table
    cost = Table("what", "µs of CPU a request", title="Counting")
    cost.add_row("a request, its answer, its bytes, and what was committed", f"{asyncio.run(_counting()) * 1e6:.2f}")
    yield cost


async def _rate(dsn: str, size: int, processes: int, turn: int) -> float:
    now = time.time_ns() // SECOND * SECOND - turn * 1000 * SECOND
    bodies = [_body(size, now - n * SECOND) for n in range(POINTS // size)]
    async with _serving(dsn, processes) as port:
        await _send(port, bodies[:CLIENTS])
        began = time.perf_counter()
        await _send(port, bodies[CLIENTS:])
        seconds = time.perf_counter() - began
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute("SELECT count(*) FROM tallymark.usage_point").fetchone()
        assert row == (len(bodies) * size,), "not all is there, or somebody else's"
        connection.execute("TRUNCATE tallymark.usage_point, tallymark.usage_dirty, tallymark.usage_hour")
    return (len(bodies) - CLIENTS) * size / seconds


def _body(size: int, end: int) -> bytes:
    points = [number(end - SECOND, end, 1, {"tallymark.account.id": f"account-{n}"}) for n in range(size)]
    return request(sum_metric(points)).SerializeToString()


@asynccontextmanager
async def _serving(dsn: str, processes: int) -> AsyncIterator[int]:
    arguments = ["serve", "--database", dsn, "--port", "0", "--json", "--processes", str(processes)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tallymark_collector", *arguments), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield json.loads(await process.stdout.readline())["port"]
    finally:
        process.terminate()
        await process.wait()


async def _send(port: int, bodies: Sequence[bytes]) -> None:
    left = iter(bodies)

    async def client() -> None:
        # Else all channels of a process to one address share one connection, which one process of the server has.
        own = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=own) as channel:
            call = channel.unary_unary(METHOD)
            for body in left:
                assert await call(body) == b"", "a refusal"

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


class _Nothing:
    async def write(self, _batch: Batch) -> WriteResult:
        return WriteResult(inserted=1)


async def _counting() -> float:
    counted, bare = Requests(), _Nothing()
    way = Counted(bare, Written(Tenants()))
    batch = Batch()
    metadata = (("user-agent", "x"), ("te", "trailers"), ("grpc-accept-encoding", "identity, deflate, gzip"))

    async def with_counts() -> None:
        with counted.call("grpc", "metrics", requests.traceparent_of(metadata)) as call:
            requests.arrived("default", 1000)
            await way.write(batch)
            call.committed(partial=False)

    async def timed(one: object) -> float:
        began = time.process_time()
        for _ in range(CALLS):
            await one()  # type: ignore[operator]
        return (time.process_time() - began) / CALLS

    async def without() -> None:
        await bare.write(batch)

    return min([await timed(with_counts) for _ in range(5)]) - min([await timed(without) for _ in range(5)])
