"""The chain of migrations: from nothing, in steps, from several processes, and refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tallymark_collector.errors import UserError
from tallymark_collector.store import Store
from tallymark_collector.store.database import Database
from tallymark_collector.store.migrations import available, migrate, pending

RELATIONS = {
    "migration": "table",
    "usage_series": "table",
    "usage_stream": "table",
    "usage_point": "table",
    "usage_sample": "table",
    "usage_source": "table",
    "usage_source_stream": "table",
    "usage_level": "table",
    "usage_levels": "view",
    "usage_evidence": "table",
    "usage_quarantine": "table",
    "quarantine_action": "table",
    "usage_quarantine_open": "view",
    "usage_quarantine_history": "view",
    "usage_hour": "table",
    "usage_day": "table",
    "usage_dirty": "table",
    "usage_day_dirty": "table",
    "usage_unaudited": "table",
    "usage_day_unaudited": "table",
    "usage_kept": "table",
    "usage_edge": "table",
    "audit_finding": "table",
    "plan_version": "table",
    "subscription": "table",
    "billing_period": "table",
    "invoice_document": "table",
    "invoices": "view",
    "invoice_lines": "view",
    "invoice_days": "view",
    "usage_producer": "table",
    "usage_control": "table",
    "usage_closed": "table",
    "usage_evidence_count": "table",
    "tenant": "table",
    "credential": "table",
    "usage_hour_current": "view",
    "usage_day_marked": "view",
    "usage_day_current": "view",
    "usage_hourly": "view",
    "usage_daily": "view",
    "usage_by_period": "view",
    "usage_by_period_aggregated": "view",
    "usage_calls": "view",
    "usage_import_source": "table",
    "usage_import_file": "table",
    "usage_import_line": "table",
    "usage_import_mapping": "table",
    "usage_lines": "view",
    "account_reader": "table",
    "own_usage_hourly": "view",
    "own_usage_daily": "view",
    "own_usage_by_period": "view",
    "own_usage_levels": "view",
    "own_usage_calls": "view",
}

DIMENSIONS = "plan route method status_code error_type attributes quantity points"
COLUMNS = {
    "usage_hourly": f"tenant account meter unit bucket {DIMENSIONS}",
    "usage_daily": f"tenant account meter unit bucket {DIMENSIONS}",
    "usage_by_period": "tenant account period_start period_end plan meter unit quantity points",
    "usage_by_period_aggregated": "tenant account period_start period_end plan meter unit aggregation quantity points"
    " problem",
    "usage_levels": "tenant account meter unit time value attributes stream recorded_at",
    "usage_calls": "tenant account meter time quantity trace_id span_id name service user_id attributes duration",
    "usage_quarantine_open": "id tenant account meter reason detail signal time recorded_at metered",
    "usage_quarantine_history": "id tenant account meter reason signal time number action acted_at database_user"
    " acted_by because changed billed_to quantity inserted duplicates evidence",
    "usage_lines": "tenant account meter unit time quantity source file line attributes",
    "invoices": "tenant account period_start period_end invoice number kind corrects plan plan_version currency total"
    " finalized_at finalized_by database_user because recorded_until points digest document",
    "invoice_lines": "tenant account period_start period_end invoice number line description meter unit aggregation"
    " quantity unit_price amount currency points",
    "invoice_days": "tenant account period_start period_end invoice number meter unit day quantity points",
    "own_usage_hourly": f"tenant account meter unit bucket {DIMENSIONS}",
    "own_usage_daily": f"tenant account meter unit bucket {DIMENSIONS}",
    "own_usage_by_period": "tenant account period_start period_end plan meter unit quantity points",
    "own_usage_levels": "tenant account meter unit time value attributes",
    "own_usage_calls": "tenant account meter time quantity trace_id span_id name user_id duration",
}
"""The public interface: a column may be added at a release, none may go or change its name."""


@pytest.fixture
def empty(server: str) -> Iterator[str]:
    """A database with nothing in it."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("CREATE DATABASE tallymark_test_empty")
        yield make_conninfo(server, dbname="tallymark_test_empty")
        connection.execute("DROP DATABASE tallymark_test_empty WITH (FORCE)")


@pytest.fixture
async def database(empty: str) -> AsyncIterator[Database]:
    found = Database(empty)
    await found.open()
    yield found
    await found.close()


async def test_the_chain_reaches_the_intended_schema(database: Database) -> None:
    async with database.connection() as connection:
        assert await pending(connection) == available()
        for step in range(1, len(available()) + 1):
            assert await migrate(connection, available()[:step]) == [available()[step - 1].name]
        assert await migrate(connection) == []
        assert await pending(connection) == []
        relations = await (
            await connection.execute(
                """SELECT relname, CASE relkind WHEN 'v' THEN 'view' ELSE 'table' END FROM pg_class
                   WHERE relnamespace = 'tallymark'::regnamespace AND relkind IN ('r', 'p', 'v')"""
            )
        ).fetchall()
        assert dict(relations) == RELATIONS
        for view, columns in COLUMNS.items():
            rows = await (
                await connection.execute(
                    "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum",
                    [view],
                )
            ).fetchall()
            assert [row[0] for row in rows] == columns.split()


async def test_every_key_has_the_account_and_growing_ones_the_time(store: Store) -> None:
    """What distribution and partitioning will need, from the first day."""
    async with store.reading() as connection:
        rows = await (
            await connection.execute(
                """SELECT c.relname, array_agg(a.attname::text)
                   FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
                   JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY (i.indkey)
                   WHERE i.indisunique AND c.relnamespace = 'tallymark'::regnamespace GROUP BY i.indexrelid, 1"""
            )
        ).fetchall()
    keys = {name: set(columns) for name, columns in rows}
    of_producers = {"usage_producer", "usage_control", "usage_closed"}
    # A role reads one account's usage, so its name is the key.
    others = {"migration", "plan_version", "tenant", "credential", "account_reader"}
    # Whom the file of meters bills for a source may change.
    of_sources = {"usage_source", "usage_source_stream"}
    # That a line comes again with another account or time has to be found: see the comments of its migration.
    of_imports = {"usage_import_source", "usage_import_file", "usage_import_line", "usage_import_mapping"}
    without = {name for name, columns in keys.items() if "account" not in columns}
    assert without == others | of_producers | of_imports | of_sources
    assert {"producer", "tenant"} <= set.intersection(*(keys[name] for name in of_producers))
    growing = ("usage_point", "usage_level", "usage_evidence", "usage_control", "usage_closed", "usage_evidence_count")
    assert "time" in set.intersection(*(keys[name] for name in growing))


async def test_many_at_once_migrate_once(empty: str) -> None:
    stores = [Store(empty) for _ in range(5)]
    for store in stores:
        await store.open()
    results = await asyncio.gather(*(store.migrate() for store in stores))
    assert sorted(results, key=len) == [[], [], [], [], [migration.name for migration in available()]]
    for store in stores:
        await store.close()


async def test_a_failing_step_leaves_nothing_of_itself(database: Database) -> None:
    broken = replace(available()[1], sql="CREATE TABLE half (a int); SELECT 1/0")
    async with database.connection() as connection:
        with pytest.raises(psycopg.errors.DivisionByZero):
            await migrate(connection, [available()[0], broken])
        row = await (await connection.execute("SELECT to_regclass('half'), max(version) FROM migration")).fetchone()
        assert row == (None, 1)
        assert await migrate(connection) == [step.name for step in available()[1:]]


async def test_an_edited_migration_is_refused(database: Database) -> None:
    async with database.connection() as connection:
        await migrate(connection)
        edited = [replace(step, sql=step.sql + "--") for step in available()]
        with pytest.raises(UserError, match="0001_usage was changed after"):
            await migrate(connection, edited)


async def test_a_newer_database_is_refused(database: Database) -> None:
    async with database.connection() as connection:
        await migrate(connection)
        await connection.execute("INSERT INTO migration (version, name, checksum) VALUES (9999, '9999_future', '')")
        with pytest.raises(UserError, match="9999_future, which this version of Tallymark does not know"):
            await migrate(connection)


async def test_no_server_is_a_sentence() -> None:
    with pytest.raises(UserError, match="cannot connect to the database"):
        await Store("postgresql://127.0.0.1:1/nothing?connect_timeout=2").open()


async def test_whoever_prepared_finds_the_schema(empty: str) -> None:
    """A session that first looked names up while another committed CREATE SCHEMA does not see it, for good: its path
    reads as it should and resolves as if it were this one."""
    store = Store(empty)
    await store.open()
    try:
        for _ in range(2):  # the schema made by us; then found there
            async with store.session() as only:
                await only.execute("SET search_path = public")
            await store.prepare()
            async with store.session() as same:
                assert same is only, "until it is prepared the store has one connection"
                await same.execute("SELECT FROM subscription")
    finally:
        await store.close()
