"""The real SDK against the real collector, and what is lost between them on purpose: the audit says so, to the unit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

from tests.support.collector import running

SERVICE = "opentelemetry.proto.collector.metrics.v1.MetricsService"

RECORDING = """
import tallymark
tallymark.configure(interval=60)
for n in (5, 7, 1):
    with tallymark.identify(account=f"account-{n % 2}"):
        tallymark.record("m", n, unit="{x}")
        tallymark.record("fine", n / 10)
    assert tallymark.flush(30)
assert tallymark.shutdown(30)
"""

TO_BE_KILLED = """
import sys, time, tallymark
tallymark.configure(interval=60)
with tallymark.identify(account="acme"):
    tallymark.record("m", 40, unit="{x}")
    assert tallymark.flush(30)
    for n in range(1000):
        tallymark.record("m", 2, unit="{x}")
print("recorded", flush=True)
time.sleep(60)
"""

HEIR = """
import time, tallymark
from tallymark import runtime
tallymark.configure(interval=0.05)
own = runtime.current()
with tallymark.identify(account="acme"):
    tallymark.record("heir")
deadline = time.monotonic() + 60
while not tallymark.flush(5) or own.outbox.batches(own=False):
    assert time.monotonic() < deadline
assert tallymark.shutdown(30)
"""

TRACED = """
import sys
from decimal import Decimal
import tallymark
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

endpoint, lost = sys.argv[1], int(sys.argv[2])

class Losing(SpanExporter):
    # Exports, but for one batch, and adds up by itself what spans show of the first account's meter.
    def __init__(self):
        self.real, self.batches = OTLPSpanExporter(endpoint=endpoint), 0
        self.shown = self.dropped = Decimal(0)
    def export(self, spans):
        own = sum((Decimal(str(s.attributes.get("tallymark.meter.m", 0))) for s in spans), Decimal(0))
        self.batches += 1
        if self.batches - 1 == lost:
            self.dropped += own
            return SpanExportResult.SUCCESS
        self.shown += own
        return self.real.export(spans)
    def shutdown(self):
        self.real.shutdown()

exporter = Losing()
provider = TracerProvider(sampler=TraceIdRatioBased(0.3))
provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=600_000))
tracer = provider.get_tracer("test")
tallymark.configure(interval=60)
for n in range(300):
    with tracer.start_as_current_span("call"):
        with tallymark.identify(account="acme"):
            tallymark.record("m", Decimal("0.1") * (n % 7 + 1))
        with tallymark.identify(account="globex"):
            tallymark.record("m", n)
    if n % 100 == 99:
        assert provider.force_flush()
assert tallymark.shutdown(30)
provider.shutdown()
print(exporter.batches, exporter.shown, exporter.dropped)
"""


class Proxy:
    """Passes metrics on to a collector, but for one request, which it acknowledges and drops."""

    def __init__(self, port: int, dropped: int) -> None:
        self._dropped = dropped
        self._seen = 0
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._forward = self._channel.unary_unary(f"/{SERVICE}/Export")
        self._server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
        handler = grpc.unary_unary_rpc_method_handler(self._export)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": handler}),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def _export(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._seen += 1
        if self._seen - 1 == self._dropped:
            return ExportMetricsServiceResponse().SerializeToString()
        answer: bytes = self._forward(request, timeout=30)
        return answer

    def stop(self) -> None:
        self._server.stop(None).wait()
        self._channel.close()


@contextmanager
def proxied(port: int, dropped: int) -> Iterator[int]:
    proxy = Proxy(port, dropped)
    try:
        yield proxy.port
    finally:
        proxy.stop()


def environment(port: int, folder: Path) -> dict[str, str]:
    return {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "TALLYMARK_ENDPOINT": f"http://127.0.0.1:{port}",
        "TALLYMARK_STATE_DIR": str(folder / "state"),
        "TALLYMARK_TIMEOUT": "20",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "60",  # of spans: those of an export that takes longer are lost
        "OTEL_SERVICE_NAME": "shop",
    }


def run(script: str, port: int, folder: Path, *arguments: str, instance: str = "one") -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env={**environment(port, folder), "OTEL_RESOURCE_ATTRIBUTES": f"service.instance.id={instance}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path for path in (folder / "state").rglob("*") if path.is_file()] == [], "nothing is left behind"
    return done.stdout


def audit(dsn: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tallymark_collector", "audit", "--database", dsn, "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def by_meter(document: dict[str, Any], producer: str = "one") -> dict[str, dict[str, Any]]:
    return {one["meter"]: one for one in document["completeness"] if one["producer"] == producer}


def test_what_was_recorded_is_proved_to_be_here(dsn: str, tmp_path: Path) -> None:
    with running(dsn) as collector:
        run(RECORDING, collector.port, tmp_path)
        status, document = audit(dsn, "--tolerance", "0")
    found = by_meter(document)
    assert {meter: (one["status"], one["counted"], one["control"]) for meter, one in found.items()} == {
        "m": ("complete", "13", "13"),
        "fine": ("complete", "1.3", "1.3"),
    }
    assert all(one["closed"] for one in found.values())
    assert (status, document["clean"], document["unproved_producers"]) == (0, True, 0)


@pytest.mark.parametrize(("dropped", "missing", "fine"), [(0, "5", "0.5"), (1, "7", "0.7"), (2, "1", "0.1")])
def test_a_lost_request_is_named(dsn: str, tmp_path: Path, dropped: int, missing: str, fine: str) -> None:
    with running(dsn) as collector:
        with proxied(collector.port, dropped) as port:
            run(RECORDING, port, tmp_path)
        run(RECORDING, collector.port, tmp_path, instance="two")
        status, document = audit(dsn, "--tolerance", "0")
    found = by_meter(document)
    assert {meter: (one["status"], one["difference"]) for meter, one in found.items()} == {
        "m": ("missing", missing),
        "fine": ("missing", fine),
    }
    assert {one["status"] for one in by_meter(document, "two").values()} == {"complete"}
    assert status == 1
    with psycopg.connect(dsn, options="-c search_path=tallymark -c timezone=UTC") as connection:
        times = connection.execute(
            """SELECT DISTINCT p.time FROM usage_point p JOIN usage_stream s USING (account, stream)
               WHERE s.resource->>'service.instance.id' = 'one' ORDER BY 1"""
        ).fetchall()
    ends = [time.isoformat().replace("+00:00", "Z") for (time,) in times]
    assert len(ends) == 2
    one = found["m"]
    if dropped:
        assert one["since"] == ends[dropped - 1]
    else:
        assert one["since"] < ends[0]
    if dropped < 2:
        assert one["until"] == ends[dropped]
    else:
        assert one["until"] > ends[1], "the closing note tells"


def test_a_lost_closing_note_leaves_the_producer_open(dsn: str, tmp_path: Path) -> None:
    with running(dsn) as collector:
        with proxied(collector.port, 3) as port:
            run(RECORDING, port, tmp_path)
        status, document = audit(dsn, "--tolerance", "0")
        _, later = audit(dsn, "--tolerance", "600")
    assert {one["status"] for one in by_meter(document).values()} == {"not yet closed"}
    assert status == 0
    assert {one["status"] for one in by_meter(later).values()} == {"complete"}, "it was heard of a moment ago"


def test_a_killed_producer_becomes_complete_when_an_heir_has_delivered(dsn: str, tmp_path: Path) -> None:
    with running(dsn) as collector:
        environ = {**environment(collector.port, tmp_path), "OTEL_RESOURCE_ATTRIBUTES": "service.instance.id=killed"}
        with subprocess.Popen(
            [sys.executable, "-c", TO_BE_KILLED], env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"recorded\n"
            process.send_signal(signal.SIGKILL)
        _, document = audit(dsn, "--tolerance", "0")
        one = by_meter(document, "killed")["m"]
        assert (one["status"], one["counted"], one["control"]) == ("not yet closed", "40", "40")
        run(HEIR, collector.port, tmp_path, instance="heir")
        status, document = audit(dsn, "--tolerance", "0")
    one = by_meter(document, "killed")["m"]
    assert (one["status"], one["counted"], one["control"], one["closed"]) == ("complete", "2040", "2040", True)
    assert by_meter(document, "heir")["heir"]["status"] == "complete"
    assert status == 0


def test_a_deleted_parcel_is_missing(dsn: str, tmp_path: Path) -> None:
    """Files that somebody removes: the heir knows what was recorded from what stands in the last segment."""
    script = """
    import os, pathlib, signal, tallymark
    tallymark.configure(endpoint="http://127.0.0.1:1", interval=60)
    state = pathlib.Path(os.environ["TALLYMARK_STATE_DIR"])
    for parcels, n in enumerate((5, 7, 1), start=1):
        with tallymark.identify(account="acme"):
            tallymark.record("m", n, unit="{x}")
        while len(list(state.rglob("*.otlp"))) < parcels:
            tallymark.flush(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    environ = {**environment(1, tmp_path), "OTEL_RESOURCE_ATTRIBUTES": "service.instance.id=killed"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environ, timeout=60, check=False)
    parcels = sorted((tmp_path / "state").rglob("*.otlp"))
    assert len(parcels) == 3
    parcels[1].unlink()
    with running(dsn) as collector:
        # The same service at another endpoint: its folders are moved as the message in the log says.
        old = parcels[0].parent.parent
        run(HEIR, collector.port, tmp_path / "elsewhere", instance="first")
        port = collector.port
        moved = tmp_path / "state" / place_of(port, tmp_path)
        old.rename(moved)
        run(HEIR, port, tmp_path, instance="heir")
        status, document = audit(dsn, "--tolerance", "0")
    one = by_meter(document, "killed")["m"]
    assert (one["status"], one["difference"], one["closed"]) == ("missing", "7", True)
    assert status == 1


def place_of(port: int, folder: Path) -> str:
    """The name of the folder that the service uses for a collector."""
    script = """
    import tallymark
    from tallymark import runtime
    tallymark.configure()
    print(runtime.current().letters.place.name)
    """
    return run(script, port, folder / "asked").strip()


def test_evidence_reconciles_under_sampling_and_a_lost_batch_of_spans_is_missing(dsn: str, tmp_path: Path) -> None:
    with running(dsn) as collector:
        endpoint = f"http://127.0.0.1:{collector.port}"
        batches, shown, dropped = run(TRACED, collector.port, tmp_path, endpoint, "-1").split()
        status, document = audit(dsn, "--tolerance", "0")
        assert (int(batches), dropped) == (3, "0")
        found = {one["account"]: (Decimal(one["missing"]), Decimal(one["more"])) for one in document["evidence"]}
        assert found == {"acme": (0, 0), "globex": (0, 0)}
        [acme] = [one for one in document["evidence"] if one["account"] == "acme"]
        assert Decimal(acme["counted"]) == Decimal(acme["shown"]) == Decimal(shown)
        assert 0 < Decimal(shown) < 120, "some calls were sampled, not all"
        assert status == 0

        _, _, dropped = run(TRACED, collector.port, tmp_path, endpoint, "1", instance="two").split()
        status, document = audit(dsn, "--tolerance", "0")
        [acme] = [one for one in document["evidence"] if one["account"] == "acme"]
        assert Decimal(acme["missing"]) == Decimal(dropped) > 0
        assert (status, {one["status"] for one in document["completeness"]}) == (1, {"complete"})
