"""`tallymark serve`'s protocols as a process: both ports, taken ports, the end, the database's absence, forwarding."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import psycopg
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tallymark_collector.cli import receiving
from tallymark_collector.cli.health import state_of
from tallymark_collector.errors import UserError
from tallymark_collector.settings import DEFAULT_HTTP_PORT, Compression, Forwarding, Settings
from tests.collector.cli.conftest import Run, program
from tests.support.collector import running
from tests.support.messages import otlp_json
from tests.support.usage import SECOND, number, request, sum_metric

WAIT = 90
"""Seconds that nothing here takes, on any machine."""


def usage(quantity: int, account: str = "acme") -> bytes:
    now = time.time_ns()
    message = request(sum_metric([number(now - SECOND, now, quantity, {"tallymark.account.id": account})]))
    return message.SerializeToString()


def post(port: int, body: bytes, media: str = "application/x-protobuf") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
    try:
        connection.request("POST", "/v1/metrics", body, {"Content-Type": media})
        return connection.getresponse().status
    finally:
        connection.close()


def call(port: int, body: bytes, compression: grpc.Compression = grpc.Compression.NoCompression) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        export = channel.unary_unary("/opentelemetry.proto.collector.metrics.v1.MetricsService/Export")
        assert export(body, timeout=WAIT, compression=compression) == b""


def total(dsn: str) -> int | None:
    with psycopg.connect(dsn) as connection:
        row = connection.execute("SELECT sum(quantity) FROM tallymark.usage_point").fetchone()
        assert row is not None
        return row[0]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ports_of_http() -> None:
    def choose(given: int | None, grpc_port: int, *, off: bool = False) -> int | None:
        return receiving.http_port(given, off=off, grpc_port=grpc_port)

    assert [choose(None, 4317), choose(None, 0), choose(5, 4317), choose(0, 0)] == [DEFAULT_HTTP_PORT, 0, 5, 0]
    assert choose(None, 4317, off=True) is None
    with pytest.raises(UserError, match="--http-port 5 is the port of gRPC, too"):
        choose(5, 5)
    with pytest.raises(UserError, match="--no-http and --http-port contradict each other"):
        choose(5, 4317, off=True)


def test_what_forwarding_is_told(tmp_path: Path) -> None:
    headers = {receiving.HEADERS_VARIABLE: "authorization=Bearer%20hunter2, X-Team=billing,"}
    assert receiving.forwarding(None, None, 1, {}) is None
    assert receiving.forwarding("grpc://c:4317", tmp_path, 2, headers) == Forwarding(
        "grpc://c:4317", tmp_path, (("authorization", "Bearer hunter2"), ("x-team", "billing")), max_bytes=2 << 20
    )
    plain = receiving.forwarding("http://c", tmp_path, 1, {}, compression=Compression.NONE, tenant="acme-corp")
    assert plain is not None
    assert (plain.compression, plain.tenant) == (Compression.NONE, "acme-corp")
    for text in ("hunter2", "a=b,hun ter2=x", "a=hunter2%0d%0ax: y", "=hunter2"):
        with pytest.raises(UserError, match="TALLYMARK_FORWARD_HEADERS is not key=value") as caught:
            receiving.forwarding("grpc://c:4317", tmp_path, 1, {receiving.HEADERS_VARIABLE: text})
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--forward-to", "grpc://c:4317"], "--forward-to needs --forward-dir"),
        (["--forward-dir", "x"], "--forward-dir without --forward-to"),
        (["--forward-to", "c:4317", "--forward-dir", "x"], "--forward-to is no address"),
        (["--forward-to", "http://localhost:4318", "--forward-dir", "x"], "port 4318 of localhost is this collector"),
        (["--forward-compression", "zstd"], "Invalid value for '--forward-compression'"),
        (["--no-http", "--http-port", "5"], "contradict each other"),
    ],
)
def test_contradictions_are_a_sentence(offline: Run, arguments: list[str], sentence: str) -> None:
    result = offline("serve", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_loops_are_seen_where_the_address_says_so() -> None:
    hop = Forwarding("grpc://[::1]:4317", Path("x"))
    with pytest.raises(UserError, match="is this collector itself"):
        receiving.check_loop(Settings("d", forwarding=hop))
    receiving.check_loop(Settings("d", port=4000, http_port=4318, forwarding=hop))
    receiving.check_loop(Settings("d"))


def test_both_protocols_are_told_taken_and_refused_to_a_second(dsn: str) -> None:
    with running(dsn) as collector:
        call(collector.port, usage(5), grpc.Compression.Gzip)
        assert post(collector.http_port, usage(7)) == 200
        assert total(dsn) == 12
        taken = str(collector.http_port)
        second = program("serve", "--port", "0", "--http-port", taken, "--database", dsn)
        assert (second.returncode, second.stdout) == (2, "")
        assert f"error: cannot listen on 127.0.0.1:{taken}: is another collector running there?" in second.stderr
        assert post(collector.http_port, usage(1)) == 200
    with running(dsn) as collector:
        assert collector.http_port > 0


def test_without_http(dsn: str) -> None:
    command = [sys.executable, "-m", "tallymark_collector", "serve", "--port", "0", "--no-http", "--database", dsn]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert json.loads(process.stdout.readline())["http_port"] is None
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=WAIT) == ("", "")
        finally:
            process.kill()


def test_of_two_that_start_at_the_same_moment_one_serves(dsn: str) -> None:
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
        port, http_port = one.getsockname()[1], two.getsockname()[1]
    command = [sys.executable, "-m", "tallymark_collector", "serve", "--json", "--database", dsn]
    command += ["--port", str(port), "--http-port", str(http_port)]
    pair = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for _ in range(2)
    ]
    try:
        until(lambda: any(process.poll() is not None for process in pair))
        [lost] = [process for process in pair if process.poll() is not None]
        [won] = [process for process in pair if process is not lost]
        assert lost.returncode == 2
        assert "is another collector running there?" in lost.communicate()[1]
        assert won.stdout is not None
        assert json.loads(won.stdout.readline())["http_port"] == http_port
        assert post(http_port, usage(3)) == 200
        call(port, usage(4))
        won.send_signal(signal.SIGTERM)
        assert won.communicate(timeout=WAIT) == ("", "")
    finally:
        for process in pair:
            process.kill()
            process.wait()
    assert total(dsn) == 7


@pytest.mark.parametrize("protocol", ["gRPC", "HTTP"])
def test_the_end_finishes_and_answers_what_was_accepted(dsn: str, protocol: str) -> None:
    command = [sys.executable, "-m", "tallymark_collector", "serve", "--port", "0", "--json", "--database", dsn]
    answers: list[int] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            ready = json.loads(process.stdout.readline())
            over: Callable[[], int] = {
                "HTTP": lambda: post(ready["http_port"], usage(5)),
                "gRPC": lambda: call(ready["port"], usage(5)) or 200,
            }[protocol]
            thread = threading.Thread(target=lambda: answers.append(over()))
            with psycopg.connect(dsn) as holding, psycopg.connect(dsn, autocommit=True) as looking:
                holding.execute("LOCK TABLE tallymark.usage_point IN ACCESS EXCLUSIVE MODE")
                thread.start()
                waiting = (
                    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                    " AND datname = current_database() AND query LIKE 'COPY usage_point%'"
                )
                until(lambda: looking.execute(waiting).fetchone() == (1,))
                process.send_signal(signal.SIGTERM)
                until(lambda: state_of(f"127.0.0.1:{ready['port']}", 0.5) != "serving")
                until(lambda: refuses(ready["http_port"]))
                assert answers == [], "it waits for the table"
                holding.rollback()
            thread.join(WAIT)
            out, err = process.communicate(timeout=WAIT)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "", "")
    assert answers == [200]
    assert total(dsn) == 5


def refuses(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.engines("embedded")
def test_health_follows_the_database_and_nonsense_leaves_no_line_in_the_log(dsn: str) -> None:
    name = str(conninfo_to_dict(dsn)["dbname"])
    command = [sys.executable, "-m", "tallymark_collector", "serve", "--port", "0", "--json", "--database", dsn]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            ready = json.loads(process.stdout.readline())
            endpoint = f"127.0.0.1:{ready['port']}"
            for _ in range(2):
                with socket.create_connection(("127.0.0.1", ready["http_port"])) as client:
                    client.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
                    client.settimeout(WAIT)
                    assert b" 400 " in client.recv(1000)
            until(lambda: state_of(endpoint) == "serving")
            with psycopg.connect(make_conninfo(dsn, dbname="postgres"), autocommit=True) as another:
                set_ = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
                another.execute(set_.format(sql.Identifier(name), sql.SQL("false")))
                another.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
                until(lambda: state_of(endpoint) == "not serving")
                assert post(ready["http_port"], usage(1)) == 503
                another.execute(set_.format(sql.Identifier(name), sql.SQL("true")))
            until(lambda: state_of(endpoint) == "serving")
            until(lambda: post(ready["http_port"], usage(1)) == 200)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=WAIT)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "nonsense" not in err
    assert "aiohttp" not in err
    assert "health checks are told that usage is not taken: the database is not available" in err
    assert "the database is back" in err


@pytest.mark.engines("embedded")
def test_what_waits_for_the_next_hop_survives_both_collectors(dsn: str, unmigrated: str, tmp_path: Path) -> None:
    """The first collector is stopped and started while the second is away, the second is killed while it takes."""
    quantities = list(range(1, 31))
    with running(unmigrated) as second:
        hop = ["--forward-to", f"http://127.0.0.1:{second.http_port}", "--forward-dir", str(tmp_path / "spool")]
        second.kill()
        with running(dsn, *hop) as first:
            for quantity in quantities[:10]:
                call(first.port, usage(quantity), grpc.Compression.Gzip)
            assert first.process is not None
            first.process.send_signal(signal.SIGTERM)
            assert first.process.wait(WAIT) == 0
            assert len(list((tmp_path / "spool").glob("*.metrics"))) == 10
            first.kill()
            first.start()
            second.start()
            for quantity in quantities[10:]:
                assert post(first.http_port, usage(quantity)) == 200
                if quantity == 20:
                    second.kill()
                    second.start()
            until(lambda: total(unmigrated) == sum(quantities))
        assert total(dsn) == sum(quantities)


def test_a_folder_in_use_ends_the_second_with_a_sentence(dsn: str, tmp_path: Path) -> None:
    hop = ["--forward-to", "grpc://127.0.0.1:1", "--forward-dir", str(tmp_path)]
    with running(dsn, *hop) as collector:
        second = program("serve", "--port", "0", *hop, "--database", dsn)
        assert (second.returncode, second.stdout) == (2, "")
        assert "is in use by another collector: give each its own" in second.stderr
        assert post(collector.http_port, usage(1)) == 200, "the next hop is away, and nobody waits for it"


def test_json_of_two_clients_in_one_request_reversed_and_again(dsn: str) -> None:
    """What a gateway does: re-batched, in another order, sent twice."""
    now = time.time_ns() // SECOND * SECOND
    pieces = []
    for producer in ("one", "two"):
        for i in range(5):
            point = number(now + i - SECOND, now + i, i + 1, {"tallymark.account.id": "acme"})
            pieces.append(request(sum_metric([point]), producer=producer))
    whole = request(sum_metric([]), producer="three")
    for piece in reversed(pieces):
        whole.resource_metrics.extend(piece.resource_metrics)
    with running(dsn) as collector:
        assert post(collector.http_port, otlp_json(pieces[3]), "application/json") == 200
        for _ in range(2):
            assert post(collector.http_port, otlp_json(whole), "application/json") == 200
        with grpc.insecure_channel(f"127.0.0.1:{collector.port}") as channel:
            stub = MetricsServiceStub(channel)
            del whole.resource_metrics[2:4]
            for message in (whole, pieces[0], pieces[9]):
                answer = stub.Export(message, compression=grpc.Compression.Gzip, timeout=WAIT)
                assert not answer.HasField("partial_success")
    assert total(dsn) == 2 * (1 + 2 + 3 + 4 + 5)
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT count(*) FROM tallymark.usage_quarantine").fetchone() == (0,)
