"""Owner, writer and reader as connections of their own: what each needs works, anything else is refused."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from itertools import count

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tallymark_collector.access import Authenticator
from tallymark_collector.access.records import InDatabase
from tallymark_collector.aggregates.audit import audit
from tallymark_collector.aggregates.changed import audit_changed
from tallymark_collector.application import opened
from tallymark_collector.billing import records
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.errors import UserError
from tallymark_collector.invoicing import Asked, finalize
from tallymark_collector.model import Attributes, Batch, Evidence, Temporality
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.store import Store, keeping, roles
from tallymark_collector.store.migrations import available
from tests.collector.cli.conftest import program
from tests.support.collector import running
from tests.support.usage import BASE, SECOND, number, point, request, stream, sum_metric

NOW = datetime(2026, 9, 20, 12, tzinfo=timezone.utc)
PLANS = """currency: EUR
meters: {api.requests: {unit: "{request}"}}
plans: {basic: {charges: [{meter: api.requests, unit_price: 1}]}}
accounts: {acme: {plan: basic, since: 2026-09-01}}
"""
_numbers = count()


@dataclass(frozen=True)
class Roles:
    """Connection strings of a database that belongs to a role without any other rights."""

    owner: str
    writer: str
    reader: str
    stranger: str

    @staticmethod
    def name(dsn: str) -> str:
        return str(conninfo_to_dict(dsn)["user"])


@contextmanager
def owned(unmigrated: str, install: str = "CREATE EXTENSION timescaledb") -> Iterator[Roles]:
    """A database of a role's own, in which an administrator has done `install` where the server loads TimescaleDB."""
    names = [f"tallymark_test_{os.getpid()}_{next(_numbers)}" for _ in range(4)]
    database = sql.Identifier(str(conninfo_to_dict(unmigrated)["dbname"]))
    with psycopg.connect(unmigrated, autocommit=True) as connection:
        loaded = "SELECT current_setting('timescaledb.disable_load', true) IS NOT NULL"
        if connection.execute(loaded).fetchone() == (True,):
            connection.execute(install)  # type: ignore[arg-type]
        for name in names:
            connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'secret'").format(sql.Identifier(name)))
        connection.execute(sql.SQL("ALTER DATABASE {} OWNER TO {}").format(database, sql.Identifier(names[0])))
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database))
        for name in names[1:]:
            connection.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(database, sql.Identifier(name)))
        yield Roles(*(make_conninfo(unmigrated, user=name, password="secret") for name in names))
        me = sql.Identifier(connection.info.user)
        connection.execute(sql.SQL("ALTER DATABASE {} OWNER TO {}").format(database, me))
        for name in names:
            connection.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(sql.Identifier(name)))


@pytest.fixture
def people(unmigrated: str) -> Iterator[Roles]:
    """A database of a role's own; with TimescaleDB, which an administrator installs, where the server loads it."""
    with owned(unmigrated) as found:
        yield found


@pytest.fixture
async def granted(people: Roles) -> Roles:
    async with opened(people.owner) as store:
        await store.migrate()
        await store.grant(writer=people.name(people.writer), reader=people.name(people.reader))
        async with store.transaction() as connection:
            await records.apply(connection, "default", parse_catalog(PLANS), NOW)
    return people


async def is_native(store: Store) -> bool:
    """Whether the database keeps the hours, which takes the owner."""
    async with store.session() as connection:
        return await keeping.is_native(connection)


BATCH = Batch(
    points=[
        point(stream(), 0, 10, "1.5"),
        point(stream(), 10, 20, 2),
        point(stream(producer="two", temporality=Temporality.CUMULATIVE), 0, 30, 7),
    ],
    evidence=[
        Evidence(
            "default", "acme", "api.requests", b"t" * 16, b"s" * 8, 1, 2, Decimal(1), "GET", "shop", None, Attributes()
        )
    ],
)
TOTAL = Decimal("10.5")


async def test_the_writer_can_do_all_that_serving_takes(granted: Roles) -> None:
    async with opened(granted.writer) as store:
        assert await store.prepare() == []
        assert (await store.write(BATCH)).inserted == 3
        again = await store.write(BATCH)
        assert (again.inserted, again.duplicates) == (0, 3)
        contradiction = await store.write(Batch(points=[point(stream(), 0, 10, 99)]))
        assert len(contradiction.conflicts) == 1
        late = point(stream(producer="two", temporality=Temporality.CUMULATIVE), 0, 20, 3)
        await store.write(Batch(points=[late]))
        async with opened(granted.owner if await is_native(store) else granted.writer) as keeper:
            while await keeper.refresh():
                pass
            assert (await audit_changed(keeper, NOW)).differences == []
        async with store.transaction() as connection:
            assert await records.extend_periods(connection, "default", datetime(2027, 3, 1, tzinfo=timezone.utc)) > 0
        async with store.reading() as connection:
            assert (await audit(connection)).clean
            row = await (await connection.execute("SELECT sum(quantity) FROM usage_hourly")).fetchone()
            assert (await records.invoice(connection, "default", "acme", NOW)).total == TOTAL
    assert row == (TOTAL,)


FORBIDDEN = [
    "UPDATE usage_point SET quantity = 0",
    "DELETE FROM usage_point",
    "TRUNCATE usage_point",
    "DELETE FROM usage_sample",
    "DELETE FROM usage_evidence",
    "DELETE FROM usage_quarantine",
    "UPDATE usage_quarantine SET reason = ''",
    "INSERT INTO quarantine_action (account, digest, number, action, tenant, acted_by)"
    " VALUES ('', '', 1, 'released', '', '')",
    "DELETE FROM quarantine_action",
    "UPDATE quarantine_action SET acted_by = 'somebody else'",
    "INSERT INTO invoice_document SELECT * FROM invoice_document",
    "UPDATE invoice_document SET total = 0",
    "DELETE FROM invoice_document",
    "DELETE FROM audit_finding",
    "DELETE FROM usage_import_line",
    "UPDATE usage_import_line SET account = 'other'",
    "UPDATE usage_import_source SET mapping = '{}'",
    "DELETE FROM usage_import_file",
    "DELETE FROM usage_import_mapping",
    "UPDATE usage_import_mapping SET mapping = '{}'",
    "UPDATE usage_kept SET points_from = now()",
    "UPDATE usage_unaudited SET account = 'other'",
    "UPDATE usage_stream SET tenant = 'other'",
    "DELETE FROM usage_stream",
    "UPDATE usage_series SET unit = 'By'",
    "INSERT INTO plan_version (tenant, plan, version, content, document) VALUES ('default', 'basic', 9, '', '{}')",
    "UPDATE plan_version SET document = '{}'",
    "DELETE FROM subscription",
    "INSERT INTO tenant (tenant) VALUES ('mine')",
    "UPDATE tenant SET points_per_second = NULL",
    "INSERT INTO credential (credential, kind, tenant, scopes, verifier)"
    " VALUES ('mine', 'token', 'default', '{write}', decode(repeat('00', 32), 'hex'))",
    "UPDATE credential SET revoked_at = NULL",
    "UPDATE credential SET verifier = decode(repeat('00', 32), 'hex')",
    "DELETE FROM credential",
    "INSERT INTO migration VALUES (9999, 'x', 'x')",
    "ALTER TABLE usage_point DROP COLUMN quantity",
    "DROP TABLE usage_dirty",
    "CREATE TABLE tallymark.mine (a int)",
    "CREATE SCHEMA mine",
    "CREATE OR REPLACE VIEW usage_hourly AS SELECT 1 AS a",
]


def refused(dsn: str, statement: str) -> None:
    with (
        psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(statement)  # type: ignore[arg-type]


async def test_the_writer_can_do_nothing_else(granted: Roles) -> None:
    async with opened(granted.writer) as store:
        await store.write(BATCH)
    for statement in FORBIDDEN:
        refused(granted.writer, statement)


async def test_settling_the_quarantine_takes_one_right_more_than_the_writer_has(
    granted: Roles, unmigrated: str
) -> None:
    """As docs/quarantine.md says: a member of the writer's role that may add to the trail."""
    nobodys = request(sum_metric([number(BASE, BASE + SECOND, 4, {})])).SerializeToString()
    async with opened(granted.writer) as store:
        await Pipeline(store, now_ns=lambda: BASE + SECOND).metrics("default", nobodys)
    listed = program("quarantine", "list", "--json", "--database", granted.writer)
    [entry] = json.loads(listed.stdout)["items"]
    attribute = ("quarantine", "attribute", entry["id"], "--account", "acme", "--by", "anne", "--database")
    refusal = program(*attribute, granted.writer)
    assert (refusal.returncode, refusal.stdout) == (2, "")
    assert "may not do this (permission denied for table quarantine_action)" in refusal.stderr
    clerk, writer = granted.name(granted.stranger), granted.name(granted.writer)
    with psycopg.connect(granted.owner, autocommit=True) as owner:
        owner.execute(sql.SQL("GRANT INSERT ON tallymark.quarantine_action TO {}").format(sql.Identifier(clerk)))
    with psycopg.connect(unmigrated, autocommit=True) as administrator:
        administrator.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(writer), sql.Identifier(clerk)))
    async with opened(granted.owner) as store:
        await store.grant(writer=writer)  # the next version's `migrate` leaves the other's right alone
    done = program(*attribute, granted.stranger)
    assert done.returncode == 0, done.stderr
    with psycopg.connect(granted.reader, autocommit=True, options="-c search_path=tallymark") as reader:
        trail = reader.execute("SELECT action, acted_by, database_user, quantity FROM usage_quarantine_history")
        assert trail.fetchall() == [("attributed", "anne", clerk, 4)]
        assert reader.execute("SELECT account, quantity FROM usage_hourly").fetchall() == [("acme", 4)]
        assert reader.execute("SELECT count(*) FROM usage_quarantine_open").fetchone() == (0,)
    refused(granted.stranger, "DELETE FROM quarantine_action")
    refused(granted.stranger, "DELETE FROM usage_quarantine")


async def test_a_writer_knows_tokens_and_makes_none(granted: Roles) -> None:
    create = ("tokens", "create", "--tenant", "default", "--scope", "write", "--database")
    refused = await asyncio.to_thread(program, *create, granted.writer)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "the database user may not do this" in refused.stderr
    made = await asyncio.to_thread(program, *create, granted.owner)
    async with opened(granted.writer) as store:
        principal = await Authenticator(InDatabase(store)).authenticate(f"Bearer {made.stdout.strip()}")
    assert principal.may_write()


async def test_the_reader_reads_the_public_views_and_nothing_else(granted: Roles) -> None:
    async with opened(granted.writer) as store:
        await store.write(BATCH)
        async with store.reading() as connection:
            relations = [
                row[0]
                for row in await (
                    await connection.execute(
                        "SELECT relname FROM pg_class WHERE relnamespace = 'tallymark'::regnamespace"
                        " AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')"
                    )
                ).fetchall()
            ]
    with psycopg.connect(granted.reader, autocommit=True, options="-c search_path=tallymark") as reader:
        for view, quantity in [("usage_hourly", TOTAL), ("usage_daily", TOTAL), ("usage_calls", 1)]:
            assert reader.execute(f"SELECT sum(quantity) FROM {view}").fetchone() == (quantity,)  # type: ignore[arg-type]
        assert reader.execute("SELECT count(*) FROM usage_by_period").fetchone() == (1,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            reader.execute("CREATE TEMPORARY TABLE mine (a int)")
    for relation in set(relations) - set(roles.READER):
        refused(granted.reader, f"SELECT FROM {relation}")
    for statement in [*FORBIDDEN, "INSERT INTO usage_dirty VALUES (now(), 'a', 't')"]:
        refused(granted.reader, statement)
    with psycopg.connect(granted.writer, autocommit=True) as writer:
        writer.execute("GRANT SELECT ON tallymark.usage_hourly TO PUBLIC")  # a warning: nothing was granted
    refused(granted.stranger, "SELECT FROM tallymark.usage_hourly")


async def test_what_is_no_sum_is_told_to_writer_and_reader_and_to_nobody_else(granted: Roles) -> None:
    """The function behind it has its owner's rights."""
    async with opened(granted.owner) as store, store.transaction() as connection:
        catalog = parse_catalog(PLANS.replace('"{request}"', '"{request}", aggregation: unique, of: http.route'))
        await records.apply(connection, "default", catalog, NOW)
    async with opened(granted.writer) as store:
        assert await store.prepare() == []
        routes = [stream("acme", **{"http.route": route}) for route in ("/a", "/b")]
        await store.write(Batch(points=[point(each, 0, 10, 4) for each in routes]))
        async with store.reading() as connection:
            made = await records.invoice(
                connection, "default", "acme", datetime.fromtimestamp(BASE // SECOND, timezone.utc)
            )
            assert [line.quantity for line in made.lines] == [2]
    view = "SELECT quantity FROM usage_by_period_aggregated"
    with psycopg.connect(granted.reader, autocommit=True, options="-c search_path=tallymark") as reader:
        assert reader.execute(view).fetchall() == [(2,)]
    refused(granted.stranger, "SELECT * FROM tallymark.usage_aggregated('default', 'acme', now(), now(), '{}')")
    with psycopg.connect(granted.owner, autocommit=True) as owner:
        owner.execute(f"GRANT USAGE ON SCHEMA tallymark TO {granted.name(granted.stranger)}")
    refused(granted.stranger, "SELECT * FROM tallymark.usage_aggregated('default', 'acme', now(), now(), '{}')")
    with psycopg.connect(granted.owner, autocommit=True) as owner:
        owner.execute(
            "REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA tallymark FROM " + granted.name(granted.writer)  # type: ignore[arg-type]
        )
    async with opened(granted.writer) as store:
        with pytest.raises(UserError, match=r"lacks .*EXECUTE on tallymark.usage_aggregated\(.*: as the schema's"):
            await store.prepare()


async def test_every_relation_has_been_thought_of(store: Store) -> None:
    """Whoever adds a table says what the writer may do with it, else `serve` would fail where roles are used."""
    async with store.reading() as connection:
        rows = await (
            await connection.execute(
                "SELECT relname FROM pg_class WHERE relnamespace = 'tallymark'::regnamespace"
                " AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')"
            )
        ).fetchall()
        assert {row[0] for row in rows} == set(await roles.privileges(connection))


async def test_granting_again_takes_back_what_is_too_much(granted: Roles) -> None:
    writer = granted.name(granted.writer)
    with psycopg.connect(granted.owner, autocommit=True) as owner:
        owner.execute(
            sql.SQL(
                "GRANT DELETE, UPDATE ON tallymark.usage_point TO {0};"
                " GRANT UPDATE (quantity) ON tallymark.usage_evidence TO {0}"
            ).format(sql.Identifier(writer))
        )
    async with opened(granted.owner) as store:
        await store.grant(writer=writer)
    refused(granted.writer, "DELETE FROM usage_point")
    refused(granted.writer, "UPDATE usage_evidence SET quantity = 0")
    async with opened(granted.writer) as store:
        assert await store.prepare() == []


async def test_grants_that_would_be_wrong_are_refused(granted: Roles, unmigrated: str) -> None:
    async with opened(granted.owner) as store:
        for role, sentence in [
            ("nobody here", "there is no role 'nobody here': make it first, e.g. CREATE ROLE \"nobody here\" LOGIN"),
            (granted.name(granted.owner), "owns the schema and may do everything already"),
            (str(psycopg.conninfo.conninfo_to_dict(unmigrated).get("user", "postgres")), "is a superuser or a member"),
        ]:
            with pytest.raises(UserError, match=sentence):
                await store.grant(writer=role)
        with pytest.raises(UserError, match="cannot be both"):
            await store.grant(writer="a", reader="a")
    async with opened(granted.writer) as store:
        with pytest.raises(UserError, match="does not own the schema"):
            await store.grant(reader=granted.name(granted.stranger))


async def test_a_right_that_is_missing_is_named(granted: Roles) -> None:
    with psycopg.connect(granted.owner, autocommit=True) as owner:
        owner.execute(
            sql.SQL(
                "REVOKE INSERT, DELETE ON tallymark.usage_dirty FROM {0};"
                " REVOKE UPDATE (recorded_at) ON tallymark.usage_stream FROM {0}"
            ).format(sql.Identifier(granted.name(granted.writer)))
        )
    async with opened(granted.writer) as store:
        with pytest.raises(
            UserError, match=r"lacks DELETE, INSERT on tallymark.usage_dirty; UPDATE on tallymark.usage_stream: as the"
        ):
            await store.prepare()


@pytest.mark.parametrize("left_out", [1, len(available())])
async def test_serving_as_writer_says_what_is_pending(people: Roles, left_out: int) -> None:
    steps = available()[: len(available()) - left_out]
    if steps:
        async with opened(people.owner) as store:
            await store.migrate()
        # As if the last migrations were not there yet.
        with psycopg.connect(people.owner, autocommit=True) as owner:
            owner.execute("DELETE FROM tallymark.migration WHERE version > %s", [steps[-1].version])
            for grant in ("USAGE ON SCHEMA tallymark", "SELECT ON ALL TABLES IN SCHEMA tallymark"):
                owner.execute(
                    sql.SQL("GRANT {} TO {}").format(sql.SQL(grant), sql.Identifier(people.name(people.writer)))
                )
    async with opened(people.owner) as store:
        pending = await store.pending()
    assert pending[:left_out] == [step.name for step in available()[len(steps) :]]
    refusal = program("serve", "--port", "0", "--database", people.writer)
    assert (refusal.returncode, refusal.stdout) == (2, "")
    assert f"lacks {', '.join(pending)} and the user" in refusal.stderr
    assert "run `tallymark migrate --writer" in refusal.stderr
    assert "secret" not in refusal.stderr


async def test_migrate_grants_and_serve_runs_as_writer(people: Roles) -> None:
    names = ["--writer", people.name(people.writer), "--reader", people.name(people.reader)]
    async with opened(people.owner) as store:
        everything = await store.pending()
    for applied in (everything, []):
        done = program("migrate", "--json", *names, "--database", people.owner)
        assert (done.returncode, json.loads(done.stdout)) == (0, {"applied": applied})
    with running(people.writer, "--owner-database", people.owner) as collector:
        healthy = program("health", "--port", str(collector.port))
        assert (healthy.returncode, healthy.stdout) == (0, f"127.0.0.1:{collector.port} serving\n")
    gone = program("health", "--port", str(collector.port))
    assert (gone.returncode, gone.stdout) == (1, f"127.0.0.1:{collector.port} not reachable\n")
    refusal = program("usage", "--database", people.reader)
    assert (refusal.returncode, refusal.stdout) == (2, "")
    assert "the database user may not do this" in refusal.stderr


async def test_the_owner_serves_as_before(people: Roles) -> None:
    """Who does not care for roles needs none: the first user that serves makes the schema and owns it."""
    async with opened(people.owner) as store:
        pending = await store.pending()
        assert pending[: len(available())] == [step.name for step in available()]
        assert await store.prepare() == pending
        assert await store.prepare() == []
        assert (await store.write(BATCH)).inserted == 3
        assert await store.refresh() == 1


async def test_finalising_takes_one_right_more_than_the_writer_has(granted: Roles, unmigrated: str) -> None:
    """As docs/invoices.md says: a member of the writer's role that may add documents."""
    clerk, writer = granted.name(granted.stranger), granted.name(granted.writer)
    with psycopg.connect(granted.owner, autocommit=True) as owner:
        owner.execute(sql.SQL("GRANT INSERT ON tallymark.invoice_document TO {}").format(sql.Identifier(clerk)))
    with psycopg.connect(unmigrated, autocommit=True) as administrator:
        administrator.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(writer), sql.Identifier(clerk)))
    asked = Asked("anne", NOW + timedelta(days=20), settled=timedelta(0))
    async with opened(granted.writer) as store:
        await store.write(BATCH)
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for table invoice_document"):
            await finalize(store, "default", "acme", NOW, asked)
    async with opened(granted.stranger) as store:
        [document] = (await finalize(store, "default", "acme", NOW, asked)).documents
    assert (document.total, document.database_user) == (Decimal("10.50"), clerk)
    for statement in ("UPDATE invoice_document SET total = 0", "DELETE FROM invoice_document"):
        refused(granted.stranger, statement)
    with psycopg.connect(granted.reader, autocommit=True, options="-c search_path=tallymark") as reader:
        assert reader.execute("SELECT total, finalized_by FROM invoices").fetchall() == [(Decimal("10.50"), "anne")]
        assert reader.execute("SELECT sum(amount) FROM invoice_lines").fetchone() == (Decimal("10.50"),)
        assert reader.execute("SELECT sum(quantity) FROM invoice_days").fetchone() == (TOTAL,)
    refused(granted.reader, "SELECT FROM invoice_points('default', 'acme', now(), now(), now())")
