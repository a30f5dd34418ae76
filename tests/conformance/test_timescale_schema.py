"""TimescaleDB's functions are in a schema that some role may not use, or that is in nobody's search path."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import psycopg
import pytest
from psycopg import sql

from tallymark_collector.aggregates.changed import audit_changed
from tallymark_collector.aggregates.keeper import check_keeper
from tallymark_collector.aggregates.retention import drop_old
from tallymark_collector.errors import UserError
from tallymark_collector.model import Batch
from tallymark_collector.settings import Retention
from tallymark_collector.store.engines.capabilities import capabilities, state
from tests.collector.cli.conftest import program
from tests.conformance.test_roles import Roles, owned
from tests.conformance.test_timescale import DAY, ZERO, clean, execute, opened
from tests.support.collector import running
from tests.support.usage import point, stream

pytestmark = pytest.mark.engines("timescale")


@pytest.fixture
def elsewhere(unmigrated: str) -> Iterator[Roles]:
    """As `people`, with the extension in a schema that only its administrator may use."""
    with owned(unmigrated, "CREATE SCHEMA extensions; CREATE EXTENSION timescaledb SCHEMA extensions") as found:
        yield found


def let_use(dsn: str, role: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("GRANT USAGE ON SCHEMA extensions TO {}").format(sql.Identifier(role)))


async def test_an_owner_who_may_not_use_it_is_told_so_and_nothing_is_made_plain(
    elsewhere: Roles, unmigrated: str
) -> None:
    owner = elsewhere.name(elsewhere.owner)
    for wanted in (True, False):
        async with opened(elsewhere.owner, wants_timescale=wanted) as store:
            for work in (store.migrate, store.prepare):
                with pytest.raises(UserError, match="schema 'extensions' of this database, which the user") as told:
                    await work()
                assert f'run GRANT USAGE ON SCHEMA "extensions" TO "{owner}"' in str(told.value)
    assert execute(unmigrated, "SELECT to_regclass('tallymark.usage_point')") == [(None,)]
    refusal = program("migrate", "--database", elsewhere.owner)
    assert (refusal.returncode, refusal.stdout) == (2, "")
    assert "which the user" in refusal.stderr
    let_use(unmigrated, owner)
    async with opened(elsewhere.owner) as store:
        assert "timescale_hypertables" in await store.migrate()


async def test_a_schema_in_no_search_path_serves_as_well(elsewhere: Roles, unmigrated: str) -> None:
    """Move, refresh, columns, what is dropped."""
    let_use(unmigrated, elsewhere.name(elsewhere.owner))
    now = ZERO + timedelta(days=40)
    retention = Retention(timedelta(days=10), timedelta(days=10), billing_grace=timedelta(0))
    async with opened(elsewhere.owner, wants_timescale=True) as store:
        await store.migrate()
        assert await store.pending() == []
        async with store.session() as connection:
            used = await state(connection)
        assert used.hypertables
        await check_keeper(store, store, retention)
        points = [point(stream(), DAY * day, DAY * day + 10, 1) for day in range(40)]
        assert (await store.write(Batch(points=points))).inserted == 40
        while await store.refresh():
            pass
        if used.continuous_aggregates:
            assert await store.lay_out(now) > 1
        assert (await audit_changed(store, now)).differences == []
        assert (await drop_old(store, retention, now)).points_before is not None
        assert await clean(store)
        assert execute(unmigrated, "SELECT sum(quantity) FROM usage_daily") == [(40,)]
        execute(unmigrated, f'REVOKE USAGE ON SCHEMA extensions FROM "{elsewhere.name(elsewhere.owner)}"')
        with pytest.raises(UserError, match="run GRANT USAGE ON SCHEMA"):
            await check_keeper(store, store, retention)


async def test_a_writer_needs_nothing_of_it(elsewhere: Roles, unmigrated: str) -> None:
    """Also with `timescale:` before the database's name, and where nobody may use the schema public either."""
    execute(unmigrated, "REVOKE ALL ON SCHEMA public FROM PUBLIC")
    let_use(unmigrated, elsewhere.name(elsewhere.owner))
    writer = elsewhere.name(elsewhere.writer)
    async with opened(elsewhere.writer, wants_timescale=True) as store:
        with pytest.raises(UserError, match=rf"lacks 0001_usage, .*`tallymark migrate --writer {writer}`, then"):
            await store.prepare()
    names = ["--writer", writer, "--reader", elsewhere.name(elsewhere.reader)]
    done = program("migrate", *names, "--database", f"timescale:{elsewhere.owner}")
    assert done.returncode == 0, done.stderr
    async with opened(elsewhere.writer, wants_timescale=True) as store, opened(elsewhere.owner) as owner:
        async with store.session() as connection, owner.session() as own:
            assert await capabilities(connection) == await capabilities(own)
            assert await state(connection) == await state(own)
        assert await store.pending() == []
        assert await store.prepare() == []
        assert (await store.write(Batch(points=[point(stream(), 0, 10, 5)]))).inserted == 1
    check = program("migrate", "--check", "--database", f"timescale:{elsewhere.writer}")
    assert (check.returncode, check.stdout) == (0, "nothing is pending: the database is at this version\n")
    owners = ("--owner-database", f"timescale:{elsewhere.owner}")
    with running(f"timescale:{elsewhere.writer}", *owners) as collector:
        assert program("health", "--port", str(collector.port)).returncode == 0


async def test_a_writer_who_wants_it_where_it_is_not_is_told_how_the_owner_asks_for_it(
    unmigrated: str,
) -> None:
    with owned(unmigrated, "SELECT") as people:
        async with opened(people.owner) as owner:
            await owner.migrate()
            await owner.grant(writer=people.name(people.writer))
        async with opened(people.writer, wants_timescale=True) as store:
            sentence = "lacks timescaledb and .*` with 'timescale:' before the database's name, then start again"
            with pytest.raises(UserError, match=sentence):
                await store.prepare()
