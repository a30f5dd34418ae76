"""What waits to be written is counted by the memory that it takes, whatever it is."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint

from tallymark import conventions
from tallymark_collector.errors import Overloaded
from tallymark_collector.model import Attributes, Batch, Stream, WriteResult
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.processors.at_once import at_once
from tallymark_collector.settings import Limits
from tallymark_collector.store import weighing
from tallymark_collector.store.committing import Committing, committing
from tallymark_collector.store.dictionaries import Dictionaries
from tallymark_collector.store.writer import Encoded
from tests.support.receiving import ACME, NOW
from tests.support.usage import BASE, key_values, number, point, request, stream, sum_metric

BOUND = 1 << 19
ITEMS = 20
"""In one request."""
AT_MOST = 1.25
"""Times the bound that a flood may really take: interpreters differ, and containers grow by leaps."""
AT_LEAST = 0.4
"""Less would be room that is given to nobody."""


class Closed:
    """A database that never answers."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()

    async def write_together(self, group: Sequence[Encoded]) -> list[WriteResult]:
        self.entered.set()
        await asyncio.Event().wait()
        return []

    async def write(self, batch: Batch) -> WriteResult:
        raise AssertionError(batch)


def metric(
    make: Callable[[int, int], NumberDataPoint],
    name: str = "api.requests",
    scope: str = "tallymark",
    temporality: int = 1,
    monotonic: bool = True,
) -> Callable[[int], bytes]:
    """From a request's number to the request, of what `make` makes of that and each point's number."""

    def body(turn: int) -> bytes:
        found = [make(turn, i) for i in range(ITEMS)]
        unit = "{request}" if scope == "tallymark" else "1"
        return request(
            sum_metric(found, name=name, unit=unit, temporality=temporality, monotonic=monotonic), scope=scope
        ).SerializeToString()

    return body


def control(name: str, temporality: int = 2, **attributes: str) -> Callable[[int], bytes]:
    named = {f"tallymark.control.{key}": value for key, value in attributes.items()}

    def one(turn: int, i: int) -> NumberDataPoint:
        own = {} if name == conventions.CONTROL_CLOSED else {conventions.CONTROL_METER: f"meter-{turn}-{i}", **named}
        return number(BASE + turn, NOW + i, 1, own)

    return metric(one, name, conventions.CONTROL_SCOPE, temporality)


def spans(**more: object) -> Callable[[int], bytes]:
    def body(turn: int) -> bytes:
        found = ExportTraceServiceRequest()
        made = found.resource_spans.add().scope_spans.add().spans
        for i in range(ITEMS):
            attributes = {**ACME, "tallymark.meter.api.requests": 1, "user.id": f"ann-{turn}-{i}", **more}
            made.add(
                trace_id=turn.to_bytes(16, "big"),
                span_id=i.to_bytes(8, "big"),
                name=f"GET /{turn}/{i}",
                start_time_unix_nano=BASE,
                end_time_unix_nano=NOW + i,
                attributes=key_values(attributes),
            )
        return found.SerializeToString()

    return body


def histograms(turn: int) -> bytes:
    """Of a type that is not billed, and with much to say."""
    found = [Metric(name="http.server.duration", description="x" * 3000) for _ in range(ITEMS)]
    for i, one in enumerate(found):
        said = key_values({"said": f"{turn}-{i}" + "x" * 3000})
        one.histogram.data_points.add(time_unix_nano=NOW, count=1, attributes=said)
    return request(*found).SerializeToString()


def dimensions(turn: int, i: int, count: int = 1, length: int = 1) -> dict[str, str]:
    return {**ACME, **{f"dimension-{k}": f"{turn}-{i}-{'x' * length}" for k in range(count)}}


def known(_turn: int, i: int) -> dict[str, str]:
    return {**ACME, "dimension": str(i)}


FLOODS: dict[str, Callable[[int], bytes]] = {
    "amounts": metric(lambda turn, i: number(BASE + turn, NOW + i, 1000 + i, known(turn, i))),
    "long names": metric(lambda turn, i: number(BASE + turn, NOW + i, 1 + i, {"tallymark.account.id": "a" * 250})),
    "running totals": metric(lambda turn, i: number(BASE + turn, NOW + i, 1 + i, known(turn, i)), temporality=2),
    "levels": metric(lambda turn, i: number(BASE, NOW + turn * ITEMS + i, 1 + i, ACME), temporality=2, monotonic=False),
    "streams": metric(lambda turn, i: number(BASE, NOW, 1, dimensions(turn, i))),
    "streams with long attributes": metric(lambda turn, i: number(BASE, NOW, 1, dimensions(turn, i, length=600))),
    "streams with many attributes": metric(lambda turn, i: number(BASE, NOW, 1, dimensions(turn, i, count=15))),
    "running totals of streams": metric(lambda turn, i: number(BASE, NOW, 1, dimensions(turn, i)), temporality=2),
    "control totals": control(conventions.CONTROL_TOTAL, unit="1"),
    "counts of evidence": control(conventions.CONTROL_EVIDENCE, 1, unit="1", account="acme"),
    "closings": control(conventions.CONTROL_CLOSED),
    "quarantined": metric(lambda turn, i: number(BASE + turn, NOW, -1 - i, known(turn, i))),
    "quarantined, large": histograms,
    "evidence": spans(),
    "evidence with long attributes": spans(**{"http.route": "x" * 3000}),
    "evidence with many attributes": spans(**{f"dimension-{i}": i for i in range(50)}),
}


@asynccontextmanager
async def stuck() -> AsyncIterator[tuple[Committing, Closed]]:
    """Group commit over a database that never answers, which is ended all the same."""
    closed = Closed()
    with pytest.raises(asyncio.CancelledError):  # noqa: PT012 - the writer's, at the context's end
        async with committing(closed, Limits(queued_bytes=BOUND)) as found:
            try:
                yield found, closed
            finally:
                found.running.cancel()


@pytest.mark.parametrize("kind", FLOODS)
async def test_a_flood_takes_no_more_than_was_counted(kind: str) -> None:
    bodies = 0
    async with stuck() as (found, closed):
        pipeline = Pipeline(found, now_ns=lambda: NOW)
        stage = pipeline.traces if kind.startswith("evidence") else pipeline.metrics

        async def take(turn: int) -> None:
            nonlocal bodies
            body = FLOODS[kind](turn)
            bodies += len(body)
            await stage("default", body)

        # The first is under way for good. It has brought what all share.
        tasks = [asyncio.create_task(take(0))]
        await closed.entered.wait()
        gc.collect()
        tracemalloc.start()
        try:
            bodies, before = 0, tracemalloc.get_traced_memory()[0]
            while not tasks[-1].done():
                tasks.append(asyncio.create_task(take(len(tasks))))
                while found.queued_requests < len(tasks) - 1 and not tasks[-1].done():  # noqa: ASYNC110
                    await asyncio.sleep(0)
            refused = tasks.pop().exception()
            gc.collect()
            # The requests as they came are counted from arrival to answer (`receivers.admission`).
            held = tracemalloc.get_traced_memory()[0] - before - bodies
        finally:
            tracemalloc.stop()
        counted, requests = found.queued_bytes, len(tasks) - 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(refused, Overloaded)
    assert requests > 3
    assert BOUND <= counted < BOUND + 2 * counted // requests, "the bound is passed by one request"
    assert AT_LEAST * counted < held < AT_MOST * counted, f"{held} bytes, counted as {counted}"


def described(size: int, scope: int = 0) -> Callable[[int], Stream]:
    resource = Attributes.of({"labels": "x" * size})
    return lambda i: replace(stream(n=i), resource=resource, scope_name="y" * scope)


async def test_what_each_new_stream_writes_again_counts_until_it_is_written() -> None:
    """Each row of a stream has a copy of its resource, and of its scope's name: in a request of 300 KB they may come to
    128 MB, which no group is to have beside others."""
    made = described(30_000, 1_000)
    batch = [point(made(i), 0, 1, 1) for i in range(200)]
    copies = 200 * 31_000
    first, again = at_once(weighing.of_points(batch)), at_once(weighing.of_points(batch))
    assert copies < again < first < copies + 200 * 4_000
    Dictionaries().remember([one.stream for one in batch])
    assert at_once(weighing.of_points(batch)) == 200 * weighing.POINT


async def test_others_have_their_turn_while_resources_are_measured() -> None:
    batch = [point(described(30_000)(i), 0, 1, 1) for i in range(200)]
    pauses = sum(1 for _ in weighing.of_points(batch))
    assert pauses >= 200 * 30_000 // (weighing.COPIES + 30_100)
