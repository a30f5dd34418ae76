"""`serve --meters` as a process: spans in, invoices' numbers out, and a word about what was passed over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import grpc
import psycopg
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

from tests.support.telemetry import span, spans_of
from tests.support.usage import BASE, SECOND

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
