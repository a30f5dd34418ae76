"""An account's own reader sees that account's usage, and no row of another tenant or account, however it asks."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from decimal import Decimal

import psycopg
import pytest
from psycopg import sql

from tallymark_collector.application import opened
from tallymark_collector.billing import records
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.errors import UserError
from tallymark_collector.model import Attributes, Batch, Evidence, Temporality
from tallymark_collector.store import Store, roles
from tallymark_collector.store.roles import AccountReader
from tests.collector.cli.conftest import program
from tests.conformance.test_roles import Roles, people  # noqa: F401 - a fixture
from tests.support.usage import point, stream

NOW = datetime(2026, 9, 20, 12, tzinfo=timezone.utc)
PLANS = """currency: EUR
meters:
  api.requests: {unit: "{request}"}
  users: {unit: "{request}", aggregation: unique, of: user}
plans: {basic: {charges: [{meter: api.requests, unit_price: 1}, {meter: users, unit_price: 1}]}}
accounts: {acme: {plan: basic, since: 2026-09-01}, %s: {plan: basic, since: 2026-09-01}}
"""
FOREIGN = "foreign"
"""Stands in the name of each tenant and account but the reader's own, and so in each of their rows."""
WHOSE = [("default", "acme"), ("default", f"{FOREIGN}-account"), (f"{FOREIGN}-tenant", "acme")]
SEPTEMBER = ["2026-09-01Z", "2026-10-01Z"]
DECLARED = json.dumps({"users": {"aggregation": "unique", "of": "user"}, "level": {"aggregation": "max"}})


def usage_of(tenant: str, account: str) -> Batch:
    span = Evidence(
        tenant, account, "api.requests", b"t" * 16, b"s" * 8, 1, 2, Decimal(1), "GET", "shop", None, Attributes()
    )
    return Batch(
        points=[
            point(stream(account, "api.requests", tenant=tenant, **{"http.route": f"/{tenant}/{account}"}), 0, 10, 5),
            point(stream(account, "users", tenant=tenant, user=f"{tenant} {account}"), 0, 10, 2),
            point(stream(account, "level", temporality=Temporality.LEVEL, tenant=tenant), 0, 10, 3),
        ],
        evidence=[span],
    )


@pytest.fixture
async def granted(people: Roles) -> Roles:  # noqa: F811 - the fixture
    """`reader` reads the default tenant's acme, `stranger` the other tenant's; half of the hours are refreshed."""
    async with opened(people.owner) as store:
        await store.migrate()
        for number, (tenant, account) in enumerate(WHOSE):
            async with store.transaction() as connection:
                await records.apply(connection, tenant, parse_catalog(PLANS % f"{FOREIGN}-account"), NOW)
            await store.write(usage_of(tenant, account))
            if number == 1:
                while await store.refresh():
                    pass
        await store.grant(writer=people.name(people.writer))
        for role, tenant in ((people.reader, "default"), (people.stranger, f"{FOREIGN}-tenant")):
            await store.grant(account_reader=AccountReader(people.name(role), tenant, "acme"))
    return people


def asking(dsn: str) -> psycopg.Connection:
    return psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark")


def catalogued(dsn: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Every relation, and every function with its arguments' types, that the schema has."""
    with asking(dsn) as owner:
        relations = owner.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'tallymark'::regnamespace"
            " AND relkind IN ('r', 'p', 'v', 'm', 'f')"
        ).fetchall()
        functions = owner.execute(
            "SELECT proname, ARRAY(SELECT format_type(t, NULL) FROM unnest(proargtypes) t) FROM pg_proc"
            " WHERE pronamespace = 'tallymark'::regnamespace AND prorettype <> 'trigger'::regtype"
        ).fetchall()
    return [name for (name,) in relations], functions  # type: ignore[return-value]


def arguments(types: list[str]) -> Iterator[tuple[object, ...]]:
    """What somebody would try who looks for other people's usage."""
    names = sorted({name for pair in WHOSE for name in pair})
    tried = {
        "text": names,
        "timestamp with time zone": ["2020-01-01Z", "2030-01-01Z"],
        "jsonb": [DECLARED],
    }
    return itertools.product(*(tried[each] for each in types))


async def test_every_view_and_function_gives_nothing_of_others(granted: Roles) -> None:
    relations, functions = catalogued(granted.owner)
    read, called = set(), set()
    with asking(granted.reader) as reader:
        for relation in relations:
            for condition in ("", f" WHERE t::text LIKE '%%{FOREIGN}%%'"):
                query = sql.SQL("SELECT t::text FROM {} t" + condition).format(sql.Identifier(relation))  # type: ignore[arg-type]
                try:
                    rows = [row for (row,) in reader.execute(query).fetchall()]
                except psycopg.errors.InsufficientPrivilege:
                    continue
                read.add(relation)
                assert bool(rows) is not bool(condition), relation
                assert FOREIGN not in repr(rows), relation
        for function, types in functions:
            for given in arguments(types):
                query = sql.SQL("SELECT f::text FROM {}({}) f").format(
                    sql.Identifier(function),
                    sql.SQL(", ").join(sql.SQL("%s::{}").format(sql.SQL(each)) for each in types),  # type: ignore[arg-type]
                )
                try:
                    rows = [row for (row,) in reader.execute(query, given).fetchall()]
                except psycopg.errors.InsufficientPrivilege:
                    continue
                called.add(function)
                assert FOREIGN not in repr(rows), function
    assert read == set(roles.OWN)
    assert called == {name.partition("(")[0] for name in roles.OWN_FUNCTIONS}
    others = {"usage_aggregated", "invoice_points", "invoice_levels"}
    assert {*others, *called} == {function for function, _ in functions}, "think of what else is there now"


async def test_what_is_ones_own_is_all_there(granted: Roles) -> None:
    for dsn, tenant in ((granted.reader, "default"), (granted.stranger, f"{FOREIGN}-tenant")):
        with asking(dsn) as reader, asking(granted.owner) as owner:
            for view in roles.OWN:
                behind = view.removeprefix("own_")
                counted = "SELECT count(*), min(tenant), max(tenant), min(account), max(account) FROM {}"
                query = sql.SQL(counted + " WHERE tenant = %s AND account = 'acme'").format(sql.Identifier(behind))  # type: ignore[arg-type]
                [all_of_it] = owner.execute(query, [tenant]).fetchall()
                assert reader.execute(sql.SQL(counted).format(sql.Identifier(view))).fetchall() == [all_of_it]  # type: ignore[arg-type]
                assert all_of_it[0] > 0
            aggregated = (
                "SELECT account, meter, quantity, problem FROM own_usage_aggregated('2026-09-01Z', '2026-10-01Z')"
            )
            assert reader.execute(aggregated).fetchall() == [("acme", "users", 1, None)]
            assert reader.execute("SELECT * FROM own_usage_aggregated('2020-01-01Z', '2026-09-01Z')").fetchall() == []


async def test_no_row_of_others_reaches_what_a_reader_computes(granted: Roles) -> None:
    """An error in a condition would tell of each row that it was worked out for."""
    with asking(granted.reader) as reader:
        for view in roles.OWN:
            query = sql.SQL("SELECT count(*) > 0 FROM {} WHERE 1 / (tenant = 'default' AND account = 'acme')::int = 1")
            assert reader.execute(query.format(sql.Identifier(view))).fetchone() == (True,)


async def test_who_takes_a_role_on_reads_as_that_role(granted: Roles, unmigrated: str) -> None:
    """A login that is a member: by SET ROLE it is that reader, as itself it is nobody."""
    ours, login = sql.Identifier(granted.name(granted.reader)), granted.name(granted.writer)
    with psycopg.connect(unmigrated, autocommit=True) as administrator:
        administrator.execute(sql.SQL("GRANT {} TO {}").format(ours, sql.Identifier(login)))
    both = (
        "SELECT (SELECT sum(quantity) FROM own_usage_hourly), (SELECT sum(quantity) FROM own_usage_aggregated(%s, %s))"
    )
    with asking(granted.writer) as connection:
        assert connection.execute(both, SEPTEMBER).fetchone() == (None, None)
        connection.execute(sql.SQL("SET ROLE {}").format(ours))
        assert connection.execute(both, SEPTEMBER).fetchone() == (7, 1)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT FROM usage_hourly")


async def test_who_may_see_more_is_refused(granted: Roles, unmigrated: str) -> None:
    reader, clerk = granted.name(granted.reader), granted.name(granted.stranger)
    with psycopg.connect(unmigrated, autocommit=True) as administrator:
        administrator.execute(
            sql.SQL("GRANT {} TO {}").format(sql.Identifier(granted.name(granted.writer)), sql.Identifier(clerk))
        )
    async with opened(granted.owner) as store:
        with pytest.raises(UserError, match=r"may also .* as PUBLIC or as a member of another role"):
            await store.grant(account_reader=AccountReader(clerk, "default", "acme"))
        with pytest.raises(UserError, match="cannot be both"):
            await store.grant(reader=reader, account_reader=AccountReader(reader, "default", "acme"))
        # Who becomes a reader of all is nobody's own any more.
        await store.grant(reader=reader)
        async with store.reading() as connection:
            rows = await (await connection.execute("SELECT role, tenant, account FROM account_reader")).fetchall()
    assert rows == [(clerk, f"{FOREIGN}-tenant", "acme")], "what was refused changed nothing"
    with asking(granted.reader) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("SELECT FROM own_usage_hourly")


@pytest.mark.engines("embedded")
async def test_migrate_names_an_accounts_reader(granted: Roles) -> None:
    role = granted.name(granted.reader)
    named = ("migrate", "--database", granted.owner, "--account-reader", role)
    done = program(*named, "--account", f"{FOREIGN}-account")
    assert (done.returncode, done.stderr) == (0, "")
    with asking(granted.reader) as reader:
        assert reader.execute("SELECT DISTINCT tenant, account FROM own_usage_daily").fetchall() == [
            ("default", f"{FOREIGN}-account")
        ]
    for wrong, sentence in (
        ((*named, "--account", "acme", "--tenant", "nobody"), "there is no tenant 'nobody'"),
        (named, "--account-reader needs --account"),
        (("migrate", "--database", granted.owner, "--account", "acme"), "--account without --account-reader"),
    ):
        refused = program(*wrong)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert sentence in refused.stderr


@pytest.mark.engines("embedded")
async def test_a_reader_looks_its_own_up(store: Store) -> None:
    """The account is a condition on the tables' indexes, not on what was read of all accounts."""
    async with store.transaction() as connection:
        await connection.execute("INSERT INTO account_reader VALUES (current_user, 'default', 'acme')")
    for number in range(20):
        await store.write(Batch(points=[point(stream(f"account-{number}"), 0, 10 * (number + 1), 1)]))
    while await store.refresh():
        pass
    async with store.reading() as connection:
        await connection.execute("SET LOCAL enable_seqscan = off")
        plan = await (await connection.execute("EXPLAIN SELECT * FROM own_usage_hourly")).fetchall()
    text = "\n".join(line for (line,) in plan)
    assert re.search(r"Index Cond: .*account = (\(InitPlan|\$)", text), text
