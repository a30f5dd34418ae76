"""docs/operating.md, "Backup" and "Restore", as commands: a dump that was taken while a collector wrote is whole, and
what is sent again to the restored database is counted once."""

from __future__ import annotations

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import grpc
import psycopg
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tallymark_collector.aggregates.audit import Report, audit
from tallymark_collector.store import Store
from tests.collector.cli.conftest import PLANS, program
from tests.deploy.conftest import Server
from tests.support.collector import running
from tests.support.usage import SECOND, number, request, sum_metric

DOCUMENT = Path(__file__).parents[2] / "docs/operating.md"
DUMP = "pg_dump --format=custom --no-owner --no-privileges"
RESTORE = "pg_restore --exit-on-error --single-transaction --no-owner --no-privileges"
POINTS = 20
DUMPED = 50
"""Requests that were answered before the dump began."""
WAITING = "SELECT pid FROM pg_locks WHERE NOT granted AND relation = 'tallymark.plan_version'::regclass"


def usage(count: int) -> list[ExportMetricsServiceRequest]:
    """Requests with delta and cumulative points of several accounts over some hours."""
    now = time.time_ns() // SECOND * SECOND
    found = []
    for batch in range(count):
        end = now - (count - batch) * 60 * SECOND
        delta = [
            number(end - SECOND * (i + 1), end - SECOND * i, batch + i, {"tallymark.account.id": f"a{i % 3}"})
            for i in range(POINTS - 1)
        ]
        total = [number(now - 86_400 * SECOND, end, (batch + 1) * 10, {"tallymark.account.id": "a0"})]
        found.append(request(sum_metric(delta), sum_metric(total, name="bytes", unit="By", temporality=2)))
    return found


def expected(requests: list[ExportMetricsServiceRequest]) -> Decimal:
    return Decimal(sum(batch + i for batch in range(len(requests)) for i in range(POINTS - 1)) + 10 * len(requests))


def send(port: int, requests: list[ExportMetricsServiceRequest]) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = metrics_service_pb2_grpc.MetricsServiceStub(channel)
        for each in requests:
            assert not stub.Export(each, timeout=60).HasField("partial_success")


def state(dsn: str) -> tuple[int, Decimal, Decimal]:
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        row = connection.execute(
            "SELECT count(*), coalesce(sum(quantity), 0), (SELECT coalesce(sum(quantity), 0) FROM usage_hourly)"
            " FROM usage_point"
        ).fetchone()
    assert row is not None
    return row


async def audited(dsn: str) -> Report:
    store = Store(dsn)
    await store.open()
    try:
        async with store.reading() as connection:
            return await audit(connection)
    finally:
        await store.close()


def restore(server: Server, dump: Path, name: str) -> str:
    server.execute(f"CREATE DATABASE {name}")
    done = server.run("pg_restore", *RESTORE.split(" ")[1:], f"--dbname={name}", str(dump))
    assert (done.returncode, done.stderr) == (0, b"")
    return server.to(dbname=name)


def test_a_dump_beside_a_writing_collector_is_whole_and_takes_what_is_sent_again(
    own_server: Server, tmp_path: Path
) -> None:
    own_server.execute("CREATE DATABASE live")
    live = own_server.to(dbname="live")
    requests = usage(150)
    with running(live) as collector:
        plans = tmp_path / "plans.yaml"
        plans.write_text(PLANS)
        assert program("plans", "apply", str(plans), "--database", live).returncode == 0
        send(collector.port, requests[:DUMPED])
        dump = tmp_path / "during.dump"
        with ThreadPoolExecutor(1) as pool, psycopg.connect(live) as lock:
            # pg_dump has its snapshot by the time that it waits for this table; until then it cannot end.
            lock.execute("LOCK TABLE tallymark.plan_version")
            dumping = pool.submit(own_server.run, "pg_dump", *DUMP.split(" ")[1:], f"--file={dump}", dsn=live)
            while not own_server.execute(WAITING, dbname="live"):
                assert not dumping.done(), dumping.result().stderr
                time.sleep(0.01)
            send(collector.port, requests[DUMPED:])
            lock.rollback()
            assert (dumping.result().returncode, dumping.result().stderr) == (0, b"")
    assert state(live)[1:] == (expected(requests),) * 2
    after = tmp_path / "after.dump"
    assert own_server.run("pg_dump", *DUMP.split(" ")[1:], f"--file={after}", dsn=live).returncode == 0

    copy = restore(own_server, after, "copy")
    assert state(copy) == state(live)

    restored = restore(own_server, dump, "restored")
    points, total, hourly = state(restored)
    assert (points, total, hourly) == (DUMPED * POINTS, *[expected(requests[:DUMPED])] * 2)
    found = asyncio.run(audited(restored))
    assert (found.clean, found.points) == (True, points)
    assert program("migrate", "--check", "--database", restored).returncode == 0
    assert program("audit", "--database", restored).returncode == 0
    assert "unchanged: 2" in program("plans", "apply", str(plans), "--database", restored).stdout

    with running(restored) as collector:
        for _ in range(2):  # what clients still have, and once more what they have sent already
            send(collector.port, requests)
            assert state(restored) == state(live)
    assert asyncio.run(audited(restored)).clean


def test_the_page_says_what_was_tested() -> None:
    text = re.sub(r"\s*\\\n\s*", " ", DOCUMENT.read_text())
    assert f"{DUMP} " in text
    assert f"{RESTORE} " in text
