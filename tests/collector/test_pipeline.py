"""A large request lets others have their turn; what is no usage is counted by tenant."""

from __future__ import annotations

import asyncio

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from tallymark_collector.model import Batch, WriteResult
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.processors import decoding
from tallymark_collector.settings import Limits
from tallymark_collector.store.committing import committing
from tallymark_collector.store.writer import Encoded
from tallymark_collector.telemetry.tenants import Tenants
from tests.support.telemetry import histogram, histogram_point, metrics_of, span, spans_of
from tests.support.usage import BASE, SECOND, number, request, sum_metric

NOW = BASE + 60 * SECOND


class Instant:
    """A store that is done at once and says in which order requests came to it."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    async def write_together(self, group: list[Encoded]) -> list[WriteResult]:
        self.sizes += [len(encoded.batch.points) for encoded in group]
        return [WriteResult(inserted=len(encoded.batch.points)) for encoded in group]

    async def write(self, batch: Batch) -> WriteResult:
        raise AssertionError("nothing here fails")


async def test_a_small_request_passes_a_large_one_that_is_being_read() -> None:
    count = 20 * decoding.PIECE
    account = {"tallymark.account.id": "acme"}
    large = request(sum_metric([number(BASE, NOW - i, 1, account) for i in range(count)])).SerializeToString()
    small = request(sum_metric([number(BASE, NOW, 1, account)])).SerializeToString()
    store = Instant()
    turns = 0
    async with committing(store, Limits()) as writing:
        pipeline = Pipeline(writing, now_ns=lambda: NOW)
        reading = asyncio.ensure_future(pipeline.metrics("default", large))

        async def ticking() -> None:
            nonlocal turns
            while not reading.done():
                turns += 1
                await asyncio.sleep(0)

        await asyncio.gather(ticking(), pipeline.metrics("default", small), reading)
    assert store.sizes == [1, count]
    assert turns >= 2 * 20, "once for each piece that was decoded, and once for each whose rows were made"


async def test_what_is_no_usage_is_counted_by_tenant() -> None:
    logs = ExportLogsServiceRequest()
    logs.resource_logs.add().scope_logs.add().log_records.add()
    logs.resource_logs.add().scope_logs.add().log_records.add()
    foreign = metrics_of({}, histogram([histogram_point(BASE, NOW, 1, 1.0, {})])).SerializeToString()
    pipeline = Pipeline(Nothing(), now_ns=lambda: NOW, tenants=Tenants(limit=2))
    await pipeline.metrics("a", foreign)
    await pipeline.metrics("b", foreign)
    await pipeline.traces("b", spans_of({}, [span(1, {})]).SerializeToString())
    await pipeline.logs("c", logs.SerializeToString())
    await pipeline.logs("d", ExportLogsServiceRequest().SerializeToString())
    assert pipeline.totals.unmatched == {"a": 1, "b": 2, "other": 2}


class Nothing:
    """A store to which nothing comes."""

    async def write(self, batch: Batch) -> WriteResult:
        raise AssertionError("nothing here is usage")
