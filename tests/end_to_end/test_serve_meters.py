"""`serve --meters` as a process: spans in, invoices' numbers out, and a word about what was passed over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import grpc
import psycopg
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

from tests.support.collector import running
from tests.support.telemetry import histogram, histogram_point, metrics_of, span, spans_of
from tests.support.usage import BASE, SECOND, key_values

RULES = """\
meters:
  calls: {unit: "{call}", sources: [{span: "GET *", account: customer, spans_are_complete: true}]}
"""


def test_a_file_of_meters_in_the_environment(dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "meters.yaml"
    file.write_text(RULES)
    arguments = [sys.executable, "-m", "tallymark_collector", "serve", "--database", dsn, "--port", "0", "--json"]
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TALLYMARK_METERS": str(file)},
    ) as collector:
        try:
            assert collector.stdout is not None
            port = json.loads(collector.stdout.readline())["port"]
            times = {"start_time_unix_nano": BASE - SECOND, "end_time_unix_nano": BASE}
            spans = [span(n, {"customer": f"c{n % 2}"}, name=f"GET /{n}", **times) for n in range(5)]
            spans.append(span(9, {"customer": "c1"}, name="SELECT", **times))
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = trace_service_pb2_grpc.TraceServiceStub(channel)
                for _ in range(2):
                    stub.Export(spans_of({"service.name": "x"}, spans), timeout=60)
            with psycopg.connect(dsn) as connection:
                query = "SELECT account, meter, unit, sum(quantity)::int FROM tallymark.usage_hourly GROUP BY 1, 2, 3"
                found = connection.execute(query).fetchall()
        finally:
            collector.terminate()
            _, log = collector.communicate(timeout=60)
    assert sorted(found) == [("c0", "calls", "{call}", 3), ("c1", "calls", "{call}", 2)]
    assert "not usage, passed over since the start: traces: 'SELECT' 2" in log


def test_tenants_that_nobody_has_made_are_told_once_at_the_start(dsn: str, tmp_path: Path) -> None:
    """A slip in a name bills nothing, which nobody sees; but a tenant may also be made later."""
    file, log = tmp_path / "meters.yaml", tmp_path / "log"
    source = "{{tenants: [{}], metric: a, quantity: sum, account: customer}}"
    file.write_text(
        'meters:\n  calls:\n    unit: "{call}"\n    sources:\n'
        + "".join(f"      - {source.format(names)}\n" for names in ("default, acme-corp", "acme-crop", "acme-crop"))
    )
    with psycopg.connect(dsn) as connection:
        connection.execute("INSERT INTO tallymark.tenant (tenant) VALUES ('acme-corp')")
    # Several processes, of which one tells, while it starts.
    more = () if not sys.platform.startswith("linux") else ("--processes", "2")
    with running(dsn, "--meters", str(file), *more, log=log):
        pass
    told = [line for line in log.read_text().splitlines() if "nobody has made" in line]
    assert len(told) == 1, log.read_text()
    assert f"{file}:2: the meter 'calls' names the tenant 'acme-crop', which nobody has made" in told[0]
    assert "there are acme-corp, default" in told[0]
    assert "tallymark tenants set acme-crop" in told[0]


def test_usage_of_nobody_is_attributed_while_the_collector_runs(dsn: str, tmp_path: Path) -> None:
    """The same telemetry comes before, between and after: over gRPC, then by the command, all as processes."""
    file = tmp_path / "meters.yaml"
    file.write_text(
        RULES + '  requests: {unit: "1", sources: [{metric: h, quantity: count, account: customer}]}\n'
        "  seconds: {unit: s, sources: [{metric: h, quantity: sum, account: customer}]}\n"
    )
    environment = {**os.environ, "TALLYMARK_METERS": str(file), "TALLYMARK_DATABASE": dsn, "TALLYMARK_BY": "anne"}
    program = [sys.executable, "-m", "tallymark_collector"]

    def settle(*arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program, "quarantine", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**environment, **changed},
        )

    resource = {"service.name": "x", "service.instance.id": "one"}
    times = {"start_time_unix_nano": BASE - SECOND, "end_time_unix_nano": BASE}
    totals = [
        metrics_of(
            resource, histogram([histogram_point(BASE - 9 * SECOND, BASE + n * SECOND, n, n / 2, {})], "h", "s", 2)
        )
        for n in (4, 9)
    ]
    spans = spans_of(resource, [span(n, {}, name=f"GET /{n}", **times) for n in range(3)])
    with subprocess.Popen(
        [*program, "serve", "--port", "0", "--no-http", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as collector:
        try:
            assert collector.stdout is not None
            port = json.loads(collector.stdout.readline())["port"]
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                traces = trace_service_pb2_grpc.TraceServiceStub(channel)
                metrics = metrics_service_pb2_grpc.MetricsServiceStub(channel)

                def send() -> None:
                    assert traces.Export(spans, timeout=60).partial_success.rejected_spans == 3
                    for one in totals:
                        assert metrics.Export(one, timeout=60).partial_success.rejected_data_points == 1

                send()
                first = settle("attribute", "--meter", "calls", "--account", "acme", "--yes", "--json")
                assert (first.returncode, len(json.loads(first.stdout)["done"])) == (0, 3)
                send()
                without = settle("attribute", "--all", "--account", "acme", "--yes", TALLYMARK_METERS="")
                assert without.returncode == 1
                assert without.stderr.count("give that file, --meters FILE") == 4
                rest = settle("attribute", "--all", "--account", "globex", "--yes", "--json")
                assert (rest.returncode, len(json.loads(rest.stdout)["done"])) == (0, 4)
                send()
                # The service names its customer by now; the spans are the same.
                for one in spans.resource_spans[0].scope_spans[0].spans:
                    one.attributes.extend(key_values({"customer": "acme"}))
                assert not traces.Export(spans, timeout=60).HasField("partial_success")
            with psycopg.connect(dsn) as connection:
                query = "SELECT account, meter, sum(quantity) FROM tallymark.usage_hourly GROUP BY 1, 2 ORDER BY 2"
                found = connection.execute(query).fetchall()
                left = connection.execute("SELECT count(*) FROM tallymark.usage_quarantine_open").fetchone()
        finally:
            collector.terminate()
            collector.communicate(timeout=60)
    assert found == [("acme", "calls", 3), ("globex", "requests", 9), ("globex", "seconds", Decimal("4.5"))]
    assert left == (0,)
