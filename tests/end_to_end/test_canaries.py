"""Secrets in every place where a client can put one, over every protocol, are looked for in the whole database, in
what the collector wrote in both of its forms, in its answers, its metrics and what the command line shows."""

from __future__ import annotations

import gzip
import http.client
import json
import re
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from psycopg import sql

from tests.collector.cli.conftest import invoke
from tests.collector.cli.test_serve import serving
from tests.end_to_end import canaries as made
from tests.end_to_end.canaries import WORD, Canaries
from tests.support.messages import otlp_json

METERS = """
meters:
  gateway.calls:
    unit: "{request}"
    sources:
      - {metric: gateway.duration, quantity: count, account: tallymark.account.id, dimensions: [url.full, http.target]}
      - {span: "gateway*", sampled: allow, account: tallymark.account.id, dimensions: [url.full, url.query]}
"""
_COLUMNS = """
SELECT c.table_schema, c.table_name, c.column_name, c.data_type FROM information_schema.columns c
JOIN information_schema.tables t USING (table_schema, table_name)
WHERE t.table_type = 'BASE TABLE' AND c.table_schema NOT IN ('information_schema', 'pg_catalog')
  AND c.data_type IN ('text', 'character varying', 'jsonb', 'json', 'bytea', 'name', 'ARRAY')"""

_HTTP = {"metrics": "/v1/metrics", "traces": "/v1/traces", "logs": "/v1/logs"}
_STUBS = {
    "metrics": metrics_service_pb2_grpc.MetricsServiceStub,
    "traces": trace_service_pb2_grpc.TraceServiceStub,
    "logs": logs_service_pb2_grpc.LogsServiceStub,
}


def holding(dsn: str, word: str) -> tuple[dict[str, list[str]], int]:
    """What each column that can hold text holds of a word, and how many columns that are."""
    found: dict[str, list[str]] = {}
    with psycopg.connect(dsn, options="-c bytea_output=escape") as connection:
        columns = connection.execute(_COLUMNS).fetchall()
        for schema, table, column, _ in columns:
            query = sql.SQL("SELECT {0}::text FROM {1} WHERE {0}::text ILIKE {2}").format(
                sql.Identifier(column), sql.Identifier(schema, table), sql.Literal(f"%{word}%")
            )
            values = [value for (value,) in connection.execute(query).fetchall()]
            if values:
                found[f"{table}.{column}"] = values
    return found, len(columns)


def requests(secrets: Canaries, producer: str) -> Iterator[tuple[str, Message]]:
    now_ns = time.time_ns()
    for _, message in made.metrics(secrets, now_ns, producer):
        yield "metrics", message
    for _, spans in made.traces(secrets, now_ns, producer):
        yield "traces", spans
    yield "logs", made.logs(secrets, now_ns)


def over_grpc(port: int, secrets: Canaries) -> Iterator[str]:
    """What the collector answers."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        metadata = [
            ("x-api-key", secrets("metadata")),
            ("cookie", secrets("metadata")),
            ("traceparent", f"00-{secrets('traceparent')}-1-01"),
        ]
        seen: set[str] = set()
        for signal, message in requests(secrets, "grpc"):
            answer = _STUBS[signal](channel).Export(message, timeout=60, metadata=metadata)
            yield str(answer)
            raw = channel.unary_unary(
                f"/opentelemetry.proto.collector.{'trace' if signal == 'traces' else signal}.v1."
                f"{ {'metrics': 'Metrics', 'traces': 'Trace', 'logs': 'Logs'}[signal] }Service/Export"
            )
            if signal in seen:
                continue
            seen.add(signal)
            cut = message.SerializeToString()[:-3]
            for body, headers in (
                (cut, metadata),
                (secrets("not OTLP").encode(), metadata),
                (cut, [("authorization", secrets("a scheme of one's own"))]),
                (cut, [("authorization", f"Bearer {secrets('no token of ours')}")]),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    raw(body, timeout=60, metadata=headers)
                yield str(caught.value)


def _wrong_json(text: str) -> Iterator[bytes]:
    attribute = {"key": "authorization", "value": {"intValue": text}}
    metric = {"name": "calls", "sum": {"dataPoints": [{"attributes": [attribute]}]}}
    for wrong in (
        {"resourceMetrics": text, "resourceSpans": text, "resourceLogs": text},
        {"resourceMetrics": [{text: 1, "resource": text}], "resourceSpans": [{"resource": text}]},
        {"resourceMetrics": [{"scopeMetrics": [{"metrics": [metric]}]}]},
        {"resourceSpans": [{"scopeSpans": [{"spans": [{"attributes": {"authorization": text}}]}]}]},
    ):
        yield json.dumps(wrong).encode()


def over_http(port: int, secrets: Canaries) -> Iterator[str]:
    """The same in protobuf and in JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def post(path: str, body: bytes, **more: str) -> str:
        headers = {"cookie": secrets("header"), "x-api-key": secrets("header"), "user-agent": secrets("header")}
        connection.request("POST", path, body, headers | {name.replace("_", "-"): text for name, text in more.items()})
        answer = connection.getresponse()
        return f"{answer.status} {answer.getheaders()} {answer.read()!r}"

    for kind in ("application/x-protobuf", "application/json"):
        seen: set[str] = set()
        for signal, message in requests(secrets, kind.partition("/")[2]):
            as_json = kind.endswith("json")
            body = otlp_json(message) if as_json else message.SerializeToString()
            answer = post(_HTTP[signal], gzip.compress(body), content_type=kind, content_encoding="gzip")
            assert answer.startswith("200")
            yield answer
            canary = secrets("malformed")
            if signal in seen:
                continue
            seen.add(signal)
            for part in (body[:-3], canary.encode(), *_wrong_json(canary)):
                yield post(_HTTP[signal], part, content_type=kind)
            yield post(_HTTP[signal], canary.encode(), content_type=kind, content_encoding="gzip")
            yield post(_HTTP[signal], body, content_type=kind, authorization=canary)
            yield post(_HTTP[signal], body, content_type=kind, authorization=f"Bearer {canary}")
            yield post(f"{_HTTP[signal]}?api_key={canary}", body[:-3], content_type=kind)
            yield post(f"/{canary}", body, content_type=kind)
    connection.close()
    yield from malformed(port, secrets)


def malformed(port: int, secrets: Canaries) -> Iterator[str]:
    """Heads that are no HTTP."""
    begun = "POST /v1/metrics HTTP/1.1\r\nHost: x\r\n"
    for head in (
        f"{begun}Authorization: Bearer {secrets('control character')}\x01\r\n\r\n",
        f"{begun}Authorization: Bearer {secrets('long head')}{'a' * 9000}\r\n\r\n",
        f"{begun}Authorization Bearer {secrets('no colon')}\r\n\r\n",
        f"POST /v1/metrics?api_key={secrets('line')}\x01 HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(head.encode())
            answer = connection.recv(1 << 16)
        assert b" 400 " in answer
        yield answer.decode("latin-1")


def answered(port: int, *paths: str) -> Iterator[str]:
    for path in paths:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", path)
        yield connection.getresponse().read().decode()
        connection.close()


def shown(dsn: str, meters: Path, *endpoint: str) -> Iterator[str]:
    """What the command line shows, items of the quarantine one by one."""

    def run(*command: str) -> str:
        done = invoke(*command, database=dsn)
        return str(done.stdout) + str(done.stderr)

    listed = run("quarantine", "list", "--json")
    yield listed
    one_each = {(item["reason"], item["signal"], item["meter"]): item["id"] for item in json.loads(listed)["items"]}
    for item in list(one_each.values())[::2]:
        yield run("quarantine", "show", item, "--meters", str(meters))
    yield run("status", "--json", "--endpoint", *endpoint)


def leaked(texts: Sequence[str], secrets: Canaries) -> set[str]:
    """The places of canaries that stand in what was written or stored, as they were or in hexadecimal digits."""
    whole = "\n".join(texts)
    seen = set(re.findall(rf"{WORD}\w*?v0gel", whole))
    seen |= {
        bytes.fromhex(found).decode() for found in re.findall(f"{WORD.encode().hex()}(?:..)*?{b'v0gel'.hex()}", whole)
    }
    return {secrets.places[canary] for canary in seen}


@pytest.mark.engines("embedded")
def test_no_secret_of_a_client_is_stored_written_or_answered(dsn: str, tmp_path: Path) -> None:
    meters = tmp_path / "meters.yaml"
    meters.write_text(METERS)
    secrets = Canaries()
    said: list[str] = []
    for form, send in (("json", over_grpc), ("text", over_http)):
        options = ("--json", "--meters", str(meters), "--log-format", form, "--log-level", "debug")
        with serving(dsn, *options) as process:
            assert process.stdout is not None
            ready: dict[str, Any] = json.loads(process.stdout.readline())
            said += send(ready["port"] if send is over_grpc else ready["http_port"], secrets)
            said += answered(ready["admin_port"], "/metrics", "/readyz", f"/{secrets('path')}")
            said += malformed(ready["admin_port"], secrets)
            if form == "text":
                said += shown(dsn, meters, f"127.0.0.1:{ready['port']}")
            process.terminate()
            said += process.communicate(timeout=60)
        assert process.returncode == 0
    assert len(secrets.places) > 1000
    stored, columns = holding(dsn, WORD)
    assert columns >= 90
    assert leaked([*said, *(value for values in stored.values() for value in values)], secrets) == set()
    assert (WORD in "\n".join(said), stored) == (False, {}), "not even a part of one"
    everything, _ = holding(dsn, "REDACTED")
    assert set(everything) == {
        "usage_series.attributes",
        "usage_stream.resource",
        "usage_evidence.attributes",
        "usage_evidence.name",
        "usage_evidence.user_id",
        "usage_quarantine.payload",
    }, "the names stay, and each of these had something to hide"


@pytest.mark.engines("embedded")
def test_the_canaries_are_found_where_nothing_is_redacted(dsn: str, tmp_path: Path) -> None:
    """The test above could see them; and whoever wants them stored gets them, with a warning."""
    meters = tmp_path / "meters.yaml"
    meters.write_text(METERS)
    secrets = Canaries()
    with serving(dsn, "--json", "--meters", str(meters), "--no-redaction") as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        list(over_grpc(ready["port"], secrets))
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert "--no-redaction: what clients send is stored as it comes" in err
    stored, _ = holding(dsn, WORD)
    assert {"usage_series.attributes", "usage_stream.resource", "usage_evidence.attributes"} <= set(stored)
    places = leaked([value for values in stored.values() for value in values], secrets)
    for place in (
        "stored: point: sig",
        "stored: resource: cookie",
        "evidence: span: cookie",
        "no account: exemplar: sig",
    ):
        assert place in places
