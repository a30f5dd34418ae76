"""The table of metrics, the page for Prometheus, and OTLP: one set of instruments behind all of them."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from tallymark_collector.model import Batch, Quarantined, Reason, Refusal, WriteResult
from tallymark_collector.settings import Telemetry
from tallymark_collector.telemetry import readings
from tallymark_collector.telemetry.exporting import Exporting
from tallymark_collector.telemetry.instruments import INSTRUMENTS, PREFIX, STATE, Kind, one
from tallymark_collector.telemetry.requests import Requests
from tallymark_collector.telemetry.tenants import Tenants
from tallymark_collector.telemetry.written import Counted, Timed, Written
from tests.support.usage import point, stream

PAGE = Path(__file__).parents[3] / "docs/metrics.md"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(exporting: Exporting) -> Samples:
    """What the page says, read by Prometheus's own parser."""
    kind, text = exporting.page()
    assert kind.startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_page_and_code_have_the_same_table() -> None:
    row = r"^\| `(tallymark\.collector\.[^`]+)` \| ([^|]+) \| `([^`]+)` \| ([^|]*) \|"
    rows = re.findall(row, PAGE.read_text(encoding="utf-8"), re.M)
    written = [(name, kind.strip(), unit, re.findall("`([^`]+)`", attributes)) for name, kind, unit, attributes in rows]
    assert written == [(PREFIX + i.name, i.kind.value, i.unit, [*i.attributes]) for i in INSTRUMENTS]


def test_each_of_the_table_can_be_made_and_is_on_the_page() -> None:
    exporting = Exporting()
    for instrument in INSTRUMENTS:
        if instrument.kind is Kind.HISTOGRAM:
            exporting.instruments.histogram(instrument.name).record(1)
        else:
            exporting.instruments.observe(instrument.name, one(lambda: 7))
    found = {name for name, _ in samples(exporting)}
    for instrument in INSTRUMENTS:
        plain = (PREFIX + instrument.name).replace(".", "_")
        assert [name for name in found if name.startswith(plain)], instrument.name
    assert "tallymark_collector_points_total" in found
    assert "tallymark_collector_commit_duration_seconds_bucket" in found


class Store:
    """A store with an answer for each batch."""

    def __init__(self, *results: WriteResult | Exception) -> None:
        self.results = [*results]

    async def write(self, _batch: Batch) -> WriteResult:
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    async def write_together(self, group: list[Held]) -> list[WriteResult]:
        return [await self.write(held.batch) for held in group]


class Held:
    def __init__(self, batch: Batch) -> None:
        self.batch = batch


def quarantined(tenant: str, reason: Reason) -> Quarantined:
    return Quarantined(tenant, "acme", "api.requests", 1, Refusal(reason, "so"), "metrics", b"")


async def test_what_is_committed_is_counted_by_tenant_and_what_is_not_is_not() -> None:
    exporting = Exporting()
    written = Written(Tenants(limit=1))
    readings.observe_written(exporting.instruments, written)
    one_point = [point(stream(tenant="a"), 0, 1, 1)]
    other = [point(stream(tenant="b"), 0, 1, 1)]
    way = Counted(
        Store(
            WriteResult(inserted=1, duplicates=2, evidence=3, conflicts=[quarantined("a", Reason.VALUE_CONFLICT)]),
            RuntimeError("lost"),
            WriteResult(inserted=4),
        ),
        written,
    )
    await way.write(Batch(points=one_point, quarantined=[quarantined("a", Reason.ACCOUNT_MISSING)] * 2))
    with pytest.raises(RuntimeError):
        await way.write(Batch(points=one_point))
    await way.write(Batch(points=other))
    found = {(name, labels): value for (name, labels), value in samples(exporting).items() if name != "target_info"}
    a = ("tallymark_tenant", "a")
    assert found == {
        ("tallymark_collector_points_total", (a,)): 1,
        ("tallymark_collector_points_total", (("tallymark_tenant", "other"),)): 4,
        ("tallymark_collector_duplicates_total", (a,)): 2,
        ("tallymark_collector_evidence_total", (a,)): 3,
        ("tallymark_collector_quarantined_total", (("tallymark_reason", "account_missing"), a)): 2,
        ("tallymark_collector_quarantined_total", (("tallymark_reason", "value_conflict"), a)): 1,
    }


async def test_transactions_are_measured_when_they_are_committed() -> None:
    exporting = Exporting()
    store = Timed(
        Store(WriteResult(), WriteResult(), RuntimeError("lost"), WriteResult()),
        readings.transactions(exporting.instruments),
    )
    batch = Batch(points=[point(stream(), 0, 1, 1), point(stream(), 1, 2, 1)])
    await store.write_together([Held(batch), Held(batch)])
    with pytest.raises(RuntimeError):
        await store.write_together([Held(batch)])
    await store.write(batch)
    found = samples(exporting)
    assert found["tallymark_collector_commit_requests_sum", ()] == 3
    assert found["tallymark_collector_commit_points_sum", ()] == 6
    assert found["tallymark_collector_commit_duration_seconds_count", ()] == 2


def test_reading_while_a_key_is_added_is_done_again() -> None:
    exporting = Exporting()
    tries: list[int] = []

    def changing() -> list[tuple[float, dict[str, str]]]:
        tries.append(1)
        if len(tries) < 3:
            raise RuntimeError("dictionary changed size during iteration")
        return [(5, {STATE: "x"})]

    exporting.instruments.observe("forward.requests", changing)
    assert samples(exporting)["tallymark_collector_forward_requests_total", (("tallymark_state", "x"),)] == 5


def test_requests_are_read_while_they_are_counted() -> None:
    """Counted in one thread, read in another, as with OTLP's."""
    exporting, counted = Exporting(), Requests()
    readings.observe_requests(exporting.instruments, counted)

    def count() -> None:
        for number in range(300):
            time.sleep(0.0002)  # without a pause it would keep the interpreter for itself
            with counted.call("grpc", f"signal-{number}") as call:
                call.committed(partial=False)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        while thread.is_alive():
            samples(exporting)
    finally:
        thread.join()
    total = sum(value for (name, _), value in samples(exporting).items() if name.endswith("requests_total"))
    assert total == sum(counted.answered.values()) == 300


class Receiver(BaseHTTPRequestHandler):
    bodies: list[ExportMetricsServiceRequest]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.bodies.append(ExportMetricsServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


async def test_the_same_numbers_go_over_otlp() -> None:
    class Own(Receiver):
        bodies: list[ExportMetricsServiceRequest] = []  # noqa: RUF012

    with HTTPServer(("127.0.0.1", 0), Own) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        exporting = Exporting(Telemetry("http", f"http://127.0.0.1:{server.server_port}/v1/metrics"))
        exporting.instruments.observe("unmatched", one(lambda: 42))
        page = samples(exporting)
        await exporting.close()
        server.shutdown()
        thread.join()
    [resource] = Own.bodies[-1].resource_metrics
    [metric] = [m for scope in resource.scope_metrics for m in scope.metrics if m.name == PREFIX + "unmatched"]
    assert metric.sum.data_points[0].as_int == page["tallymark_collector_unmatched_total", ()] == 42
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "tallymark-collector"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
async def test_another_end_that_hangs_holds_up_nobody(protocol: str) -> None:
    """It takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        exporting = Exporting(Telemetry(protocol, f"http://127.0.0.1:{port}"))
        exporting.instruments.observe("unmatched", one(lambda: 42))
        closing = asyncio.create_task(exporting.close())
        turns = 0
        while not closing.done():
            turns += 1
            await asyncio.sleep(0.01)
        assert turns > 1, "the loop went on"
