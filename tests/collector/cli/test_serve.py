"""`tallymark serve` as a process: ready, takes usage over a real channel, ends in order."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import grpc
import psycopg
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc

from tallymark_collector.application import keep_periods
from tallymark_collector.billing import read_catalog
from tallymark_collector.billing.records import apply
from tallymark_collector.cli.redaction import shown
from tallymark_collector.cli.serve import address, is_loopback
from tallymark_collector.errors import StoreUnavailable
from tallymark_collector.processors.validation import TimeLimits
from tallymark_collector.settings import RETENTION_MARGIN, Retention
from tallymark_collector.store import Store
from tallymark_collector.store.database import Connection
from tests.collector.cli.conftest import Run, execute, program
from tests.support.usage import SECOND, number, request, sum_metric

COMMAND = [sys.executable, "-m", "tallymark_collector", "serve", "--port", "0"]


@contextmanager
def serving(dsn: str, *more: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*COMMAND, "--database", dsn, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # without effect where it has ended; else a failed test would wait for it


def export(port: int, quantity: int, token: str = "") -> None:
    now = time.time_ns()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = metrics_service_pb2_grpc.MetricsServiceStub(channel)
        point = number(now - SECOND, now, quantity, {"tallymark.account.id": "acme"})
        metadata = [("authorization", f"Bearer {token}")] if token else []
        answer = stub.Export(request(sum_metric([point])), timeout=60, metadata=metadata)
    assert not answer.HasField("partial_success")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_ready_then_usage_then_the_end(run: Run, plans: Path, dsn: str, end: signal.Signals) -> None:
    assert run("plans", "apply", str(plans)).exit_code == 0
    execute(dsn, "DELETE FROM billing_period")
    with serving(dsn, "--json") as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert (ready["pid"], ready["host"], ready["database"]) == (process.pid, "127.0.0.1", shown(dsn))
        export(ready["port"], 5)
        asking = ["status", "--json", "--endpoint", f"127.0.0.1:{ready['port']}"]
        until(lambda: json.loads(run(*asking).stdout)["collector"]["state"] == "serving")

        second = program("serve", "--port", str(ready["port"]), "--database", dsn)
        assert (second.returncode, second.stdout) == (2, "")
        assert second.stderr.count("\n") == 1, "one sentence, no traceback, nothing of gRPC's own"
        assert f"error: cannot listen on 127.0.0.1:{ready['port']}" in second.stderr

        until(lambda: execute(dsn, "SELECT FROM billing_period") > 40)
        process.send_signal(end)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    with psycopg.connect(dsn) as another:
        assert another.execute("SELECT sum(quantity) FROM tallymark.usage_point").fetchone() == (5,)


def test_people_get_a_line_and_a_warning_where_others_may_write(empty_dsn: str) -> None:
    with serving(empty_dsn, "--host", "0.0.0.0", "--allow-anonymous") as process:
        assert process.stderr is not None
        assert "with --allow-anonymous: whoever reaches this port can write" in process.stderr.readline()
        assert "without TLS: tokens travel in clear" in process.stderr.readline()
        ready = process.stderr.readline()
        assert ready.startswith("listening on 0.0.0.0:")
        assert shown(empty_dsn) in ready
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")


def test_nobody_listens_for_strangers_before_there_is_a_token(run: Run, dsn: str) -> None:
    refused = program("serve", "--port", "0", "--host", "0.0.0.0", "--json", "--database", dsn)
    assert (refused.returncode, refused.stdout) == (2, "")
    error = refused.stderr.splitlines()[-1]
    assert error.startswith("error: --host 0.0.0.0 is reached by others, and no credential has been made")
    assert "tallymark tokens create" in error
    token = run("tokens", "create", "--tenant", "acme-corp", "--scope", "write").stdout.strip()
    with serving(dsn, "--host", "0.0.0.0", "--json") as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert (ready["tls"], ready["anonymous"]) == (False, False)
        with pytest.raises(grpc.RpcError) as caught:
            export(ready["port"], 5)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
        export(ready["port"], 7, token)
    with psycopg.connect(dsn) as another:
        stored = another.execute("SELECT tenant, sum(quantity) FROM tallymark.usage_point GROUP BY 1").fetchall()
    assert stored == [("acme-corp", 7)]


def is_taken(port: int) -> bool:
    """Whether a request without a credential is, or else refused for that."""
    try:
        export(port, 1)
    except grpc.RpcError as error:
        return error.code() is not grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
    return True


def test_on_loopback_it_says_that_nobody_needs_a_token_and_the_first_one_ends_that(run: Run, dsn: str) -> None:
    with serving(dsn) as process:
        assert process.stderr is not None
        port = int(process.stderr.readline().split(":")[1].split()[0])
        assert "no credential has been made: whoever is on this machine can write usage" in process.stderr.readline()
        export(port, 5)
        token = run("tokens", "create", "--tenant", "default", "--scope", "write").stdout.strip()
        export(port, 7, token)  # at once
        until(lambda: not is_taken(port))


def test_tls_takes_a_pair(offline: Run, tmp_path: Path) -> None:
    for arguments in (["--tls-cert", "a.pem"], ["--tls-key", "a.pem"], ["--tls-client-ca", "a.pem"]):
        result = offline("serve", *arguments)
        assert (result.exit_code, "TLS takes a certificate and its key" in result.stderr) == (2, True)
    missing = offline("serve", "--tls-cert", str(tmp_path / "a.pem"), "--tls-key", str(tmp_path / "b.pem"))
    assert missing.exit_code == 2
    assert f"the certificate (--tls-cert) in {tmp_path / 'a.pem'} cannot be read" in missing.stderr


def test_addresses(offline: Run) -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost")] == [True] * 5
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.com")] == [False] * 4
    assert [address(host) for host in ("::1", "[::1]", "localhost")] == ["[::1]", "[::1]", "localhost"]
    assert "--host is empty" in offline("serve", "--host", "").stderr
    assert offline("serve", "--port", "65536").exit_code == 2


class Away:
    """A store that is not available at first."""

    def __init__(self, behind: Store, times: int) -> None:
        self.behind, self.times = behind, times

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        self.times -= 1
        if self.times >= 0:
            raise StoreUnavailable("away")
        async with self.behind.transaction() as connection:
            yield connection


async def test_periods_of_every_tenant_are_extended_whatever_becomes_of_one(
    store: Store, plans: Path, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = read_catalog(plans)
    async with store.transaction() as connection:
        for tenant in ("acme-corp", "broken", "globex"):
            await apply(connection, tenant, catalog, datetime.now(timezone.utc))
    written = execute(dsn, "DELETE FROM billing_period WHERE tenant <> 'broken'")
    execute(dsn, "DELETE FROM billing_period")
    execute(dsn, "UPDATE subscription SET time_zone = 'Mars/Olympus' WHERE tenant = 'broken'")
    extending = asyncio.create_task(keep_periods(store, interval=0.01))
    try:
        while execute(dsn, "SELECT FROM billing_period WHERE tenant IN ('acme-corp', 'globex')") < written:
            assert not extending.done()
            await asyncio.sleep(0.01)
    finally:
        extending.cancel()
    assert "billing periods of tenant 'broken' are not extended" in caplog.text


async def test_periods_are_extended_once_the_database_is_back(store: Store, plans: Path, dsn: str) -> None:
    async with store.transaction() as connection:
        await apply(connection, "default", read_catalog(plans), datetime.now(timezone.utc))
    written = execute(dsn, "DELETE FROM billing_period")
    extending = asyncio.create_task(keep_periods(Away(store, 2), interval=0.01, retry=0.01))  # type: ignore[arg-type]
    try:
        while execute(dsn, "SELECT FROM billing_period") < written:
            assert not extending.done()
            await asyncio.sleep(0.01)
    finally:
        extending.cancel()
    assert written > 60


@pytest.mark.engines("embedded", "postgres")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--keep-points", "30"], "leave out --keep-points and --keep-evidence"),
        (["--keep-evidence", "30"], "leave out --keep-points and --keep-evidence"),
        (["--columnstore-after", "30"], "leave out --columnstore-after"),
        (["--keep-points", "3"], "--keep-points"),
    ],
)
def test_retention_that_this_database_cannot_do_is_a_sentence(
    run: Run, dsn: str, options: list[str], sentence: str
) -> None:
    result = run("serve", "--port", "0", *options, database=dsn)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1 or "INFO" in result.stderr


def test_timescale_that_is_asked_for_and_not_there_is_a_sentence(offline: Run, tmp_path: Path) -> None:
    result = offline("migrate", database="timescale:postgresql://me:hunter2@127.0.0.1:1/usage")
    assert result.exit_code == 2
    assert "cannot connect to the database" in result.stderr
    assert "hunter2" not in result.stderr


def test_points_are_set_aside_before_their_time_is_dropped() -> None:
    assert Retention().times() == TimeLimits()
    assert Retention(points=timedelta(days=30)).times().retention == timedelta(days=30) - RETENTION_MARGIN
    assert Retention(points=timedelta(days=9000)).times().retention == TimeLimits().retention
