"""Two tenants beside each other: the same account, producer, span and times in both, and nothing ever meets.

What each must see is written down here by hand; it is held against everything that reads.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from typer.testing import CliRunner

from tallymark_collector.access import Scope
from tallymark_collector.access.records import InDatabase, add
from tallymark_collector.aggregates.audit import audit
from tallymark_collector.aggregates.changed import audit_changed
from tallymark_collector.aggregates.completeness import Status, prove
from tallymark_collector.aggregates.days import with_days
from tallymark_collector.aggregates.reconciliation import reconcile
from tallymark_collector.billing import records
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.cli.app import app
from tallymark_collector.model import Attributes, Batch, Closing, Evidence, EvidenceCount, Temporality
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.query.usage import usage
from tallymark_collector.store import Store
from tests.support.control import ORIGIN, producer, told
from tests.support.usage import BASE, SECOND, number, point, request, stream, sum_metric

US, THEM = "acme-corp", "globex"
FACTORS = {US: 1, THEM: 100}
PLANS = """currency: EUR
meters: {{api.requests: {{unit: "{{request}}"}}}}
plans: {{basic: {{charges: [{{meter: api.requests, unit_price: {price}}}]}}}}
accounts: {{acme: {{plan: basic, since: 2026-09-01}}}}
"""
NOW = datetime(2026, 9, 30, 12, tzinfo=timezone.utc)
NEVER = timedelta(seconds=0)


def of(tenant: str) -> Batch:
    """What a tenant sends: 7 requests, 9 more by a cumulative counter of which 4 come late; a span of 2."""
    factor = FACTORS[tenant]
    totals = stream(tenant=tenant, producer="two", temporality=Temporality.CUMULATIVE)
    return Batch(
        points=[
            point(stream(tenant=tenant), 0, 10, 3 * factor),
            point(stream(tenant=tenant), 3600, 3610, 4 * factor),
            point(totals, 0, 20, 5 * factor),
            point(totals, 0, 3620, 9 * factor),
            point(totals, 0, 15, 4 * factor),
        ],
        evidence=[
            Evidence(
                *(tenant, "acme", "api.requests", b"t" * 16, b"s" * 8, BASE, BASE + SECOND, Decimal(2 * factor)),
                *("GET", "shop", None, Attributes()),
            )
        ],
        controls=[told(3610, 7 * factor, tenant=tenant)],
        closings=[Closing(producer("one", tenant), BASE, BASE + 3610 * SECOND)],
        counts=[
            EvidenceCount(
                *(producer("one", tenant), "acme", "api.requests", "{request}", BASE, BASE + SECOND),
                *(Decimal(2 * factor), ORIGIN),
            )
        ],
    )


@pytest.fixture
async def both(store: Store) -> Store:
    async with store.transaction() as connection:
        for tenant, factor in FACTORS.items():
            await add(connection, tenant, [Scope.WRITE])
            await records.apply(connection, tenant, parse_catalog(PLANS.format(price=factor)), NOW)
    results = [await store.write(of(tenant)) for tenant in FACTORS]
    for result in results:
        assert (result.inserted, result.duplicates, result.evidence, result.conflicts) == (5, 0, 1, [])
    return store


async def everything(store: Store, tenant: str) -> dict[str, Any]:
    """What every view and every question says of a tenant's account."""
    found: dict[str, Any] = {}
    async with store.reading() as connection:
        for view in ("usage_hourly", "usage_daily", "usage_by_period", "usage_calls"):
            rows = await connection.execute(
                f"SELECT sum(quantity) FROM {view} WHERE tenant = %s AND account = 'acme'",  # type: ignore[arg-type]
                [tenant],
            )
            found[view] = (await rows.fetchone() or [None])[0]
        found["usage"] = (await usage(connection, tenant=tenant)).total()
        edge = datetime.fromtimestamp(BASE // SECOND + 3605, timezone.utc)
        found["edge"] = (await usage(connection, tenant=tenant, end=edge)).total()
        found["invoice"] = (await records.invoice(connection, tenant, "acme", NOW)).total
        report = await audit(connection, tenant=tenant, account="acme")
        report = await with_days(connection, report, tenant=tenant, account="acme")
        found["audit"] = (report.clean, report.points)
        proof = await prove(connection, tenant=tenant, tolerance=NEVER)
        found["proof"] = [(one.tenant, one.status, one.counted, one.control) for one in proof.producers]
        found["evidence"] = [one[:5] for one in await reconcile(connection, tenant=tenant, tolerance=NEVER)]
    return found


def expected(tenant: str) -> dict[str, Any]:
    factor = FACTORS[tenant]
    return {
        "usage_hourly": 16 * factor,
        "usage_daily": 16 * factor,
        "usage_by_period": 16 * factor,
        "usage_calls": 2 * factor,
        "usage": 16 * factor,
        "edge": 8 * factor,  # 3 and 5 of the first hour; of the second nothing ends in its first 5 s
        "invoice": 16 * factor * factor,
        "audit": (True, 5),
        "proof": [(tenant, Status.COMPLETE, 7 * factor, 7 * factor)],
        "evidence": [(tenant, "acme", "api.requests", 2 * factor, 2 * factor)],
    }


async def refreshed(store: Store) -> None:
    while await store.refresh():
        pass


async def test_every_view_and_every_question_keeps_them_apart(both: Store) -> None:
    for refresh in (False, True):
        if refresh:
            await refreshed(both)
            await audit_changed(both, NOW)
        for tenant in FACTORS:
            assert await everything(both, tenant) == expected(tenant)


async def test_what_one_sends_again_late_or_wrong_is_nothing_to_the_other(both: Store, dsn: str) -> None:
    await refreshed(both)
    assert (await both.write(of(US))).duplicates > 0
    wrong = await both.write(Batch(points=[point(stream(tenant=US), 0, 10, 300), point(stream(tenant=US), 20, 30, 1)]))
    assert [item.tenant for item in wrong.conflicts] == [US], "300 is what the other tenant has at that place"
    contradiction = replace(of(US), points=[], evidence=[], controls=[told(3610, 700, tenant=US)])
    assert [item.tenant for item in (await both.write(contradiction)).conflicts] == [US]
    same_span = of(US).evidence[0]._replace(quantity=Decimal(200))
    assert [item.tenant for item in (await both.write(Batch(evidence=[same_span]))).conflicts] == [US]
    assert await everything(both, THEM) == expected(THEM)
    await refreshed(both)
    assert await everything(both, THEM) == expected(THEM)
    assert (await everything(both, US))["usage_hourly"] == 17
    with psycopg.connect(dsn) as connection:
        kept = connection.execute("SELECT DISTINCT tenant FROM tallymark.usage_quarantine").fetchall()
    assert kept == [(US,)]


@pytest.mark.engines("embedded", "postgres")
async def test_a_wrong_hour_of_one_withholds_nothing_from_the_other(both: Store, dsn: str) -> None:
    await refreshed(both)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("UPDATE tallymark.usage_hour SET quantity = quantity + 1 WHERE tenant = %s", [US])
    assert await everything(both, THEM) == expected(THEM)
    async with both.reading() as connection:
        assert {found.tenant for found in (await audit(connection)).differences} == {US}
        assert (await audit(connection, tenant=THEM)).clean
    invoice = ("invoice", "--account", "acme", "--at", "2026-09-30", "--json", "--tenant")
    theirs = await asyncio.to_thread(run, dsn, *invoice, THEM)
    assert theirs.exit_code == 0
    assert json.loads(theirs.stdout)["total"] == "160000.00"
    ours = await asyncio.to_thread(run, dsn, *invoice, US)
    assert ours.exit_code == 1
    assert {found["tenant"] for found in json.loads(ours.stdout)["differences"]} == {US}


async def test_the_same_bytes_of_two_tenants_are_two_streams(store: Store, dsn: str) -> None:
    body = request(sum_metric([number(BASE, BASE + SECOND, 5, {"tallymark.account.id": "acme"})]))
    bad = request(sum_metric([number(BASE, BASE + SECOND, -5, {"tallymark.account.id": "acme"})]))
    pipeline = Pipeline(store, now_ns=lambda: BASE + 60 * SECOND)
    for _ in range(2):
        for tenant in (US, THEM):
            await pipeline.metrics(tenant, body.SerializeToString())
            await pipeline.metrics(tenant, bad.SerializeToString())
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        for table, key in {"usage_stream": "stream", "usage_series": "series", "usage_quarantine": "digest"}.items():
            rows = connection.execute(f"SELECT tenant, {key} FROM {table} ORDER BY 1").fetchall()  # type: ignore[arg-type]
            assert [tenant for tenant, _ in rows] == [US, THEM]
            assert len({key for _, key in rows}) == 2
        points = connection.execute("SELECT tenant, quantity FROM usage_point ORDER BY 1").fetchall()
    assert points == [(US, 5), (THEM, 5)]


def run(dsn: str, *arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"TALLYMARK_DATABASE": dsn}, prog_name="tallymark")


async def test_commands_show_the_tenant_that_was_asked_for(both: Store, dsn: str) -> None:
    async def ask(*arguments: str) -> Any:
        result = await asyncio.to_thread(run, dsn, *arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    for tenant, factor in FACTORS.items():
        [row] = await ask("usage", "--json", "--tenant", tenant)
        assert (row["account"], row["quantity"]) == ("acme", str(16 * factor))
        status = await ask("status", "--json", "--tenant", tenant, "--endpoint", "127.0.0.1:1")
        assert (status["points"]["count"], status["evidence"]["count"], status["hours_waiting"]) == (5, 1, 2)
        found = await ask("audit", "--json", "--tenant", tenant)
        assert found["points"] == 5
        assert [one["tenant"] for one in found["completeness"]] == [tenant]
        assert [one["tenant"] for one in found["evidence"]] == [tenant]
        [invoice] = await ask("invoice", "--json", "--tenant", tenant, "--at", "2026-09-30")
        assert Decimal(invoice["total"]) == 16 * factor * factor
    assert await ask("usage", "--json") == [], "the default tenant has none"
    assert (await ask("audit", "--json"))["points"] == 10, "all tenants, where none is named"
    assert (await ask("status", "--json", "--endpoint", "127.0.0.1:1"))["points"]["count"] == 10


@pytest.mark.parametrize("command", ["usage", "invoice", "audit", "status", "tokens list", "plans apply"])
async def test_a_tenant_that_is_not_there_is_a_sentence(
    store: Store, dsn: str, command: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("plans") / "plans.yaml"
    file.write_text(PLANS.format(price=1))
    more = [str(file)] if command.startswith("plans") else []
    result = await asyncio.to_thread(run, dsn, *command.split(), *more, "--tenant", "Default")
    assert result.exit_code == 2
    assert "there is no tenant 'Default': there are default" in result.stderr


READER = """
CREATE SCHEMA account_acme;
CREATE VIEW account_acme.usage WITH (security_barrier) AS
SELECT meter, unit, bucket, quantity FROM tallymark.usage_hourly WHERE tenant = 'globex' AND account = 'acme';
GRANT USAGE ON SCHEMA account_acme TO {0};
GRANT SELECT ON account_acme.usage TO {0};
"""


@pytest.fixture
def reader(dsn: str) -> Any:
    name = "tallymark_test_account_reader"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP ROLE IF EXISTS {0}; CREATE ROLE {0} LOGIN").format(sql.Identifier(name)))
        yield make_conninfo(dsn, user=name)
        connection.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(sql.Identifier(name)))


async def test_an_accounts_own_reader_sees_one_tenants_account(both: Store, dsn: str, reader: str) -> None:
    """As docs/operating.md writes it."""
    await both.write(Batch(points=[point(stream("other", tenant=THEM), 0, 10, 12345)]))
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL(READER).format(sql.Identifier("tallymark_test_account_reader")))
    with psycopg.connect(reader, autocommit=True) as connection:
        assert connection.execute("SELECT sum(quantity) FROM account_acme.usage").fetchone() == (1600,)
        # A function that a view without the barrier would call on rows that it filters away afterwards.
        connection.execute(
            "CREATE FUNCTION pg_temp.tell(numeric) RETURNS boolean LANGUAGE plpgsql COST 0.0001"
            " AS $$BEGIN RAISE NOTICE 'seen %', $1; RETURN true; END$$"
        )
        notices: list[str] = []
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
        connection.execute("SELECT count(*) FROM account_acme.usage WHERE pg_temp.tell(quantity)")
        assert sum(int(text.removeprefix("seen ")) for text in notices) == 1600, notices
        for relation in ("usage_hourly", "usage_point", "credential", "tenant"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(f"SELECT FROM tallymark.{relation}")  # type: ignore[arg-type]


async def test_limits_are_read_by_tenant(both: Store, dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("UPDATE tallymark.tenant SET points_per_second = 5 WHERE tenant = %s", [US])
    directory = InDatabase(both)
    assert [(await directory.tenant(name)).points_per_second for name in (US, THEM, "nobody")] == [5, None, None]
