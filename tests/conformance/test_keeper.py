"""A writer that takes requests and an owner that keeps what is stored: who does what, what is refused at the start."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import grpc
import psycopg
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc
from psycopg.conninfo import make_conninfo

from tallymark_collector.aggregates.audit import audit
from tallymark_collector.aggregates.changed import audit_changed
from tallymark_collector.aggregates.days import with_days
from tallymark_collector.aggregates.keeper import check_keeper
from tallymark_collector.aggregates.reconciliation import reconcile
from tallymark_collector.aggregates.retention import drop_old
from tallymark_collector.errors import UserError
from tallymark_collector.model import Batch, Reason
from tallymark_collector.settings import Retention
from tallymark_collector.store.engines.capabilities import state
from tests.collector.cli.conftest import program
from tests.conformance.test_completeness import span
from tests.conformance.test_roles import Roles, granted, is_native, opened, people
from tests.support.collector import running
from tests.support.control import on_spans
from tests.support.usage import BASE, SECOND, number, point, request, stream, sum_metric

__all__ = ["granted", "people"]

ZERO = datetime.fromtimestamp(BASE // SECOND, timezone.utc)
DAY = 86_400

WATCH = """
CREATE TABLE public.done (what text, who text);
CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN INSERT INTO public.done VALUES (TG_OP || ' ' || TG_TABLE_NAME, session_user); RETURN NULL; END $$;
CREATE TRIGGER note AFTER INSERT ON usage_stream FOR EACH STATEMENT EXECUTE FUNCTION public.note();
CREATE TRIGGER note AFTER DELETE ON usage_dirty FOR EACH STATEMENT EXECUTE FUNCTION public.note();
CREATE TRIGGER note AFTER DELETE ON usage_unaudited FOR EACH STATEMENT EXECUTE FUNCTION public.note();
CREATE TRIGGER note AFTER INSERT ON audit_finding FOR EACH STATEMENT EXECUTE FUNCTION public.note();
SELECT 1"""


def ask(dsn: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark,public") as connection:
        cursor = connection.execute(statement)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


def export(port: int, quantity: int) -> None:
    end = time.time_ns()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = metrics_service_pb2_grpc.MetricsServiceStub(channel)
        sent = number(end - SECOND, end, quantity, {"tallymark.account.id": "globex"})
        assert not stub.Export(request(sum_metric([sent])), timeout=60).HasField("partial_success")


def until(holds: Callable[[], bool]) -> None:
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to that")


async def test_requests_come_in_as_the_writer_and_the_loops_work_as_the_owner(granted: Roles, unmigrated: str) -> None:
    async with opened(granted.owner) as store:
        await store.write(Batch(points=[point(stream(), 0, 10, 5)]))
        while await store.refresh():
            pass
    # What the audit beside the collector has to find.
    ask(unmigrated, "UPDATE usage_hour SET quantity = 99")
    ask(unmigrated, WATCH)
    with running(granted.writer, "--owner-database", granted.owner) as collector:
        await asyncio.to_thread(export, collector.port, 7)
        hours = "SELECT account, sum(quantity) FROM usage_hour GROUP BY 1 ORDER BY 1"
        await asyncio.to_thread(until, lambda: ask(unmigrated, hours) == [("acme", 5), ("globex", 7)])
        await asyncio.to_thread(until, lambda: ask(unmigrated, "SELECT count(*) FROM usage_dirty") == [(0,)])
    writer, owner = granted.name(granted.writer), granted.name(granted.owner)
    assert set(ask(unmigrated, "SELECT what, who FROM public.done")) == {
        ("INSERT usage_stream", writer),
        ("DELETE usage_dirty", owner),
        ("DELETE usage_unaudited", owner),
        ("INSERT audit_finding", owner),
    }
    assert ask(unmigrated, "SELECT raw, aggregated FROM audit_finding WHERE width = '1 hour'") == [(5, 99)]


async def test_an_owner_that_is_none_or_of_another_database_is_refused(granted: Roles) -> None:
    async with opened(granted.writer) as writer, opened(granted.owner) as owner:
        await check_keeper(owner, writer, Retention())
        await check_keeper(owner, owner, Retention())
        for stranger in (granted.stranger, granted.writer):
            async with opened(stranger) as other:
                with pytest.raises(UserError, match=f"and its user '{granted.name(stranger)}' is not: name"):
                    await check_keeper(other, writer, Retention())
        async with opened(make_conninfo(granted.owner, dbname="postgres")) as elsewhere:
            with pytest.raises(UserError, match="are not the same database"):
                await check_keeper(elsewhere, writer, Retention())
    refusal = program("serve", "--port", "0", "--database", granted.writer, "--owner-database", granted.writer)
    assert (refusal.returncode, refusal.stdout) == (2, "")
    assert "--owner-database is for the owner of the database's tables" in refusal.stderr
    assert "secret" not in refusal.stderr


async def test_work_that_takes_the_owner_is_refused_to_a_writer_alone(granted: Roles) -> None:
    async with opened(granted.writer) as writer:
        async with writer.session() as connection:
            used = await state(connection)
        keeping = Retention(points=timedelta(days=30), evidence=timedelta(days=9))
        if used.continuous_aggregates:
            refused = {Retention(): "keeping continuous aggregates takes the owner", keeping: "takes the owner"}
        elif used.hypertables:
            refused = {keeping: "--keep-points and --keep-evidence takes the owner"}
        else:
            refused = {keeping: "leave out --keep-points and --keep-evidence"}
        for retention, sentence in refused.items():
            with pytest.raises(UserError, match=sentence):
                await check_keeper(writer, writer, retention)
        if Retention() not in refused:
            await check_keeper(writer, writer, Retention())
    if used.continuous_aggregates:
        refusal = program("serve", "--port", "0", "--database", granted.writer)
        assert (refusal.returncode, refusal.stdout) == (2, "")
        assert "give the owner's connection string as --owner-database (or TALLYMARK_OWNER_DATABASE)" in refusal.stderr


@pytest.mark.engines("timescale")
async def test_a_writer_and_an_owner_go_through_everything_that_happens_to_points(granted: Roles) -> None:
    """Ingest, refresh, columns, late and repeated points, dropping, auditing, each as who does it in `serve`."""
    retention = Retention(timedelta(days=10), timedelta(days=10), billing_grace=timedelta(0))
    now = ZERO + timedelta(days=40)
    async with opened(granted.writer) as writer, opened(granted.owner) as owner:
        await check_keeper(owner, writer, retention)
        native = await is_native(owner)

        async def keep() -> None:
            while await owner.refresh():
                pass
            while (looked := await audit_changed(owner, now)).hours:
                assert looked.differences == []

        async def totals() -> set[tuple[object, ...]]:
            async with writer.reading() as connection:
                assert (await with_days(connection, await audit(connection))).clean
                return {
                    tuple(await (await connection.execute(f"SELECT sum(quantity) FROM {view}")).fetchone() or ())
                    for view in ("usage_hourly", "usage_daily")
                }

        points = [point(stream(), DAY * day, DAY * day + 10, 1) for day in range(40)]
        evidence = [span(10, 1), span(DAY * 39 + 10, 1, n=2)]
        counts = [on_spans(10, 1), on_spans(DAY * 39 + 10, 1)]
        assert (await writer.write(Batch(points=list(points), evidence=evidence, counts=counts))).inserted == 40
        await keep()
        assert await totals() == {(40,)}
        if native:
            assert await owner.lay_out(now) > 1
        late = [point(stream(), DAY * day + 100, DAY * day + 110, 1) for day in range(40)]
        again = await writer.write(Batch(points=[*points, *late]))
        assert (again.inserted, again.duplicates) == (40, 40)
        assert await totals() == {(80,)}
        await keep()
        dropped = await drop_old(owner, retention, now)
        assert (dropped.points_before is not None, dropped.evidence) == (True, 1)
        async with writer.reading() as connection:
            assert [(one.shown, one.missing, one.more) for one in await reconcile(connection)] == [(1, 0, 0)]
        assert await totals() == {(80,)}
        refused = await writer.write(Batch(points=[point(stream(), 500, 510, 1)]))
        assert [one.refusal.reason for one in refused.conflicts] == [Reason.NOT_STORABLE]
        if native:
            await writer.mark([(ZERO + timedelta(days=39), "acme", "default")])
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                await writer.refresh()
            await keep()
    done = program("audit", "--json", "--database", granted.writer)
    assert (done.returncode, json.loads(done.stdout)["clean"]) == (0, True), done.stderr
