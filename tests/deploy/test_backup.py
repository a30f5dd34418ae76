"""docs/operating.md, "Backup" and "Restore", as commands: a dump that was taken while a collector wrote is whole, and
what is sent again to the restored database is counted once."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TypeAlias

import grpc
import psycopg
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from psycopg.conninfo import conninfo_to_dict

from tallymark_collector.aggregates.audit import Report, audit
from tallymark_collector.store import Store
from tallymark_collector.store.engines.embedded import POSTGRES_VERSION
from tests.collector.cli.conftest import PLANS, program
from tests.conformance.test_keeper import until
from tests.deploy.conftest import DEPLOY, Server, make_roles, programs
from tests.support.collector import running
from tests.support.usage import SECOND, number, request, sum_metric

DOCUMENT = Path(__file__).parents[2] / "docs/operating.md"
DUMP = "pg_dump --format=custom --no-owner --no-privileges"
RESTORE = "pg_restore --exit-on-error --single-transaction --no-owner --no-privileges"
CREATE = "createdb"
BEFORE = "psql -v ON_ERROR_STOP=1 -c 'CREATE EXTENSION timescaledb' -c 'SELECT timescaledb_pre_restore()'"
RESTORE_TIMESCALE = "pg_restore --exit-on-error --no-privileges"
AFTER = "psql -v ON_ERROR_STOP=1 -c 'SELECT timescaledb_post_restore()'"
ROLES = DEPLOY / "database/roles.sh"
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


@dataclass(frozen=True)
class Place:
    """A database as its owner and as its writer."""

    owner: str
    writer: str

    @property
    def keeping(self) -> list[str]:
        return [] if self.owner == self.writer else ["--owner-database", self.owner]


Restore: TypeAlias = Callable[[Path, str], Place]
"""Makes a new database of a dump."""


def done(server: Server, command: str, *arguments: str, dsn: str) -> None:
    """Runs what the page says, with more behind it."""
    program_, *options = shlex.split(command)
    found = server.run(program_, *options, *arguments, dsn=dsn)
    assert found.returncode == 0, found.stderr
    # TimescaleDB greets whoever installs it, and its catalogue has pg_dump warn.
    known = {"psql": b"WELCOME", "pg_dump": b"circular foreign-key constraints"}.get(program_)
    assert not found.stderr or (known is not None and known in found.stderr), found.stderr


def back_up_and_restore(server: Server, live: Place, restore: Restore, tmp_path: Path) -> None:
    requests = usage(150)
    database = str(conninfo_to_dict(live.owner)["dbname"])
    plans = tmp_path / "plans.yaml"
    plans.write_text(PLANS)
    with running(live.writer, *live.keeping) as collector:
        assert program("plans", "apply", str(plans), "--database", live.owner).returncode == 0
        send(collector.port, requests[:DUMPED])
        until(lambda: server.execute("SELECT FROM tallymark.usage_dirty LIMIT 1", dbname=database) == [])
        dump = tmp_path / "during.dump"
        with ThreadPoolExecutor(1) as pool, psycopg.connect(live.owner) as lock:
            # pg_dump has its snapshot by the time that it waits for this table; until then it cannot end.
            lock.execute("LOCK TABLE tallymark.plan_version")
            dumping = pool.submit(done, server, DUMP, f"--file={dump}", dsn=live.owner)
            while not server.execute(WAITING, dbname=database):
                assert not dumping.done(), dumping.exception()
                time.sleep(0.01)
            send(collector.port, requests[DUMPED:])
            lock.rollback()
            dumping.result()
    assert state(live.owner)[1:] == (expected(requests),) * 2
    after = tmp_path / "after.dump"
    done(server, DUMP, f"--file={after}", dsn=live.owner)

    assert state(restore(after, f"{database}_copy").owner) == state(live.owner)

    restored = restore(dump, f"{database}_restored")
    points, total, hourly = state(restored.owner)
    assert (points, total, hourly) == (DUMPED * POINTS, *[expected(requests[:DUMPED])] * 2)
    found = asyncio.run(audited(restored.owner))
    assert (found.clean, found.points) == (True, points)
    assert program("migrate", "--check", "--database", restored.owner).returncode == 0
    assert program("audit", "--database", restored.writer).returncode == 0
    assert "unchanged: 2" in program("plans", "apply", str(plans), "--database", restored.owner).stdout

    with running(restored.writer, *restored.keeping) as collector:
        for _ in range(2):  # what clients still have, and once more what they have sent already
            send(collector.port, requests)
            assert state(restored.owner) == state(live.owner)
        name = str(conninfo_to_dict(restored.owner)["dbname"])
        until(lambda: server.execute("SELECT FROM tallymark.usage_dirty LIMIT 1", dbname=name) == [])
    assert state(restored.owner) == state(live.owner)
    assert asyncio.run(audited(restored.owner)).clean


def test_a_dump_beside_a_writing_collector_is_whole_and_takes_what_is_sent_again(
    own_server: Server, tmp_path: Path
) -> None:
    def restore(dump: Path, name: str) -> Place:
        own_server.execute(f"CREATE DATABASE {name}")
        done(own_server, RESTORE, f"--dbname={name}", str(dump), dsn=own_server.dsn)
        return Place(own_server.to(dbname=name), own_server.to(dbname=name))

    own_server.execute("CREATE DATABASE live")
    live = own_server.to(dbname="live")
    back_up_and_restore(own_server, Place(live, live), restore, tmp_path)


@pytest.fixture
def named_server(server: str, tmp_path: Path) -> Server:
    """The server that a connection string names, as its superuser."""
    with psycopg.connect(server) as connection:
        version = connection.info.server_version // 10000
    if version > POSTGRES_VERSION:
        pytest.skip(f"pg_dump {POSTGRES_VERSION} cannot read PostgreSQL {version}")
    return Server(tmp_path, server, programs())


@pytest.fixture
def deployment(named_server: Server) -> Iterator[str]:
    """The name of a database that deploy/database/roles.sh has made with its roles, all of them under other names than
    its own: others use the server, too."""
    name = f"tallymark_test_{os.getpid()}_backup"
    script = named_server.folder / "roles.sh"
    script.write_text(re.sub(r"\btallymark(?=_|\b)", name, ROLES.read_text()))
    script.chmod(0o755)
    secrets = named_server.folder / "secrets"
    secrets.mkdir()
    for person in ("owner", "writer", "reader"):
        (secrets / f"{person}_password").write_text(f"{person}'s\n")
    try:
        made = make_roles(named_server, secrets, script)
        assert (made.returncode, made.stdout, made.stderr) == (0, b"", b"")
        yield name
    finally:
        for database in (name, f"{name}_copy", f"{name}_restored"):
            named_server.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")
        for person in ("owner", "writer", "reader"):
            named_server.execute(f"DROP ROLE IF EXISTS {name}_{person}")


@pytest.mark.engines("timescale")
def test_the_same_on_timescale_with_an_owner_and_a_writer(named_server: Server, deployment: str) -> None:
    def place(name: str) -> Place:
        return Place(
            *(
                named_server.to(dbname=name, user=f"{deployment}_{who}", password=f"{who}'s")
                for who in ("owner", "writer")
            )
        )

    def migrated(found: Place) -> Place:
        names = ["--writer", f"{deployment}_writer", "--reader", f"{deployment}_reader"]
        migrating = program("migrate", *names, "--database", f"timescale:{found.owner}")
        assert migrating.returncode == 0, migrating.stderr
        return found

    def restore(dump: Path, name: str) -> Place:
        done(named_server, CREATE, f"--owner={deployment}_owner", name, dsn=named_server.dsn)
        new = named_server.to(dbname=name)
        for step in (BEFORE, f"{RESTORE_TIMESCALE} --dbname={name} {dump}", AFTER):
            done(named_server, step, dsn=new)
        return migrated(place(name))

    back_up_and_restore(named_server, migrated(place(deployment)), restore, named_server.folder)


def test_the_page_says_what_was_tested() -> None:
    text = re.sub(r"\s*\\\n\s*", " ", DOCUMENT.read_text())
    assert f"{DUMP} " in text
    assert f"{RESTORE} " in text
    for step in (CREATE, BEFORE, RESTORE_TIMESCALE, AFTER):
        assert re.search(rf"^\$ {re.escape(step)}( |$)", text, re.MULTILINE), step
