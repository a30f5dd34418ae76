"""What the benchmark of ingestion sends, how it is sent, and the same rows through bare COPY."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import grpc
import psutil
import psycopg
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tallymark import conventions
from tallymark_collector.model import Point
from tallymark_collector.processors.decoding import decode_metrics
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits
from tallymark_collector.store import binary, rows

POINTS: Final = 80_000
ACCOUNTS: Final = 1000
SECOND: Final = 1_000_000_000
INTERVAL: Final = SECOND // 100
"""Between a stream's points. All intervals of one moment are over before the next round: its points are the later ones,
as they are where clients send every few seconds."""
METHOD: Final = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


def requests(size: int, *, repeated: float = 0.0, offset: int = 0) -> list[bytes]:
    """Whole intervals of all accounts' streams, cut into requests of `size` points.

    `repeated`: that share of a request's points stood in the request before, too. `offset`: nanoseconds into the past.
    """
    now = time.time_ns() // INTERVAL * INTERVAL - offset
    share = round(size * repeated)
    found = []
    for first in range(0, POINTS, size - share):
        request, metric = _empty()
        for i in range(max(first - share, 0), min(first - share + size, POINTS)):
            _add(metric, i, now)
        found.append(request.SerializeToString())
    return found


def _add(metric: Metric, number: int, now: int) -> None:
    interval, account = divmod(number, ACCOUNTS)
    end = now - (POINTS // ACCOUNTS - interval) * INTERVAL
    point = metric.sum.data_points.add(start_time_unix_nano=end - INTERVAL, time_unix_nano=end, as_int=1)
    texts = {
        conventions.ACCOUNT: f"account-{account}",
        conventions.PLAN: "pro",
        conventions.HTTP_ROUTE: "/items/{id}",
        conventions.HTTP_METHOD: "GET",
    }
    for key, text in texts.items():
        point.attributes.add(key=key).value.string_value = text
    point.attributes.add(key=conventions.HTTP_STATUS).value.int_value = 200


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


def batches(bodies: Sequence[bytes]) -> list[list[Point]]:
    """The points of requests."""
    cache = StreamCache()
    return [decode_metrics("default", body, cache, TimeLimits(), time.time_ns()).points for body in bodies]


def binary_blobs(found: Sequence[list[Point]]) -> Iterator[bytes]:
    """Each batch as COPY's binary format, in the order of the unique key: the fastest that the server can be asked."""
    for points in found:
        yield b"".join((binary.HEADER, *sorted(rows.point_rows(points)), binary.TRAILER))


def text_blobs(found: Sequence[list[Point]]) -> Iterator[bytes]:
    """Each batch as COPY's text format, as it came: what one would write by hand."""
    for points in found:
        yield "".join(_text_line(point) for point in points).encode()


def _text_line(point: Point) -> str:
    stream, series = point.stream, point.stream.series
    times = f"{rows.timestamp(point.time_ns)}\t{stream.id}\t{rows.timestamp(point.start_ns)}"
    part = rows.nanoseconds(point.start_ns, point.time_ns)
    return f"{series.account}\t{times}\t{part}\t{series.id}\t{series.tenant}\t{point.value}\n"


def copied(dsn: str, blobs: Sequence[bytes], form: str) -> float:
    """Seconds of COPY straight into usage_point, a commit for each request."""
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        start = time.perf_counter()
        for blob in blobs:
            statement = f"COPY usage_point ({rows.POINT_COLUMNS}) FROM STDIN (FORMAT {form})"
            with connection.cursor().copy(statement) as copy:  # type: ignore[arg-type]
                copy.write(blob)
        return time.perf_counter() - start


@dataclass
class Collector:
    """A collector process."""

    port: int
    process: psutil.Process

    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        times = self.process.cpu_times()
        return times.user + times.system


@asynccontextmanager
async def collector(dsn: str) -> AsyncIterator[Collector]:
    """`tallymark serve` as a process of its own."""
    arguments = ["serve", "--database", dsn, "--port", "0", "--json"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tallymark_collector", *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield Collector(json.loads(await process.stdout.readline())["port"], psutil.Process(process.pid))
    finally:
        process.terminate()
        await process.wait()


async def sent(port: int, bodies: Sequence[bytes], clients: int, *, rate: float | None = None) -> list[float]:
    """Sends all requests; returns the seconds to each one's acknowledgement.

    `rate`: requests per second that are due, whatever the answers; from when one was due its time is counted.
    """
    left = iter(enumerate(bodies))
    taken: list[float] = []
    begin = time.perf_counter()

    async def client() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(METHOD)
            for number, body in left:
                due = time.perf_counter() if rate is None else begin + number / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                answer = await call(body)
                assert answer == b"", "a refusal"
                taken.append(time.perf_counter() - due)

    await asyncio.gather(*(client() for _ in range(clients)))
    return taken
