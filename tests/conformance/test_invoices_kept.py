"""Finalised invoices outlive what they were made of, and what is not finalised is not dropped."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import pytest

from tallymark_collector.aggregates.changed import audit_changed
from tallymark_collector.aggregates.retention import drop_old
from tallymark_collector.aggregates.unfinalized import held_back
from tallymark_collector.billing.errors import BillingError
from tallymark_collector.invoicing import RefusedError, chain, correct, finalize, later
from tallymark_collector.invoicing.documents import Document
from tallymark_collector.model import Batch
from tallymark_collector.settings import Retention
from tallymark_collector.store import Store
from tests.collector.cli.conftest import program
from tests.conformance.test_invoices import asked, changed, execute, subscribe
from tests.support.usage import BASE as ZERO_NS
from tests.support.usage import SECOND, point, stream

PLANS = """currency: EUR
meters: {api.requests: {unit: "{request}"}}
plans: {basic: {charges: [{meter: api.requests, unit_price: "0.5"}]}}
accounts:
  acme: {plan: basic, since: 2026-07-01}
  globex: {plan: basic, since: 2026-07-01, cycle: weekly, anchor_weekday: monday}
"""
NOW = datetime(2026, 11, 20, tzinfo=timezone.utc)
AUGUST = datetime(2026, 8, 10, tzinfo=timezone.utc)
KEEP = Retention(points=timedelta(days=20), billing_grace=timedelta(days=5))


async def used(store: Store, days: int = 130) -> None:
    """A request each six hours from July on, of both accounts; refreshed and audited."""
    begin = datetime(2026, 7, 1, tzinfo=timezone.utc)
    first = round(begin.timestamp()) - ZERO_NS // SECOND
    for account in ("acme", "globex"):
        ends = [first + 6 * 3600 * n + 60 for n in range(4 * days)]
        await store.write(Batch(points=[point(stream(account), end - 5, end, 1) for end in ends]))
    await settle(store)


async def settle(store: Store) -> None:
    while await store.refresh():
        pass
    while (await audit_changed(store, NOW)).hours:
        pass


async def finalized(store: Store, account: str, at: datetime) -> Document:
    return (await finalize(store, "default", account, at, asked(now=NOW))).documents[0]


def oldest(dsn: str) -> datetime:
    [[found]] = execute(dsn, "SELECT min(time) FROM usage_point")
    assert isinstance(found, datetime)
    return found


def month(number: int) -> datetime:
    return datetime(2026, number, 1, tzinfo=timezone.utc)


@pytest.mark.engines("timescale")
async def test_points_stay_until_their_period_is_finalised(store: Store, dsn: str) -> None:
    await subscribe(store, PLANS)
    await used(store)
    assert await held_back(store, KEEP, NOW) is None, "nobody finalises invoices here: age alone decides"

    first = await finalized(store, "acme", month(7))
    # The tenant began to finalise then: of what was not held by the grace any more nothing is asked.
    execute(dsn, "ALTER TABLE invoice_document DISABLE TRIGGER USER; UPDATE invoice_document SET finalized_at ="
                 " '2026-09-04'; ALTER TABLE invoice_document ENABLE TRIGGER USER")  # fmt: skip
    week = datetime(2026, 8, 24, tzinfo=timezone.utc)
    kept = (await drop_old(store, KEEP, NOW)).points_before
    assert kept is not None
    assert month(8) - timedelta(days=7) < kept <= month(8), "acme's August ended three days before that"
    assert oldest(dsn) >= kept
    assert "the first of account 'acme'" in str(await held_back(store, KEEP, NOW))
    august = await finalized(store, "acme", AUGUST)
    kept = (await drop_old(store, KEEP, NOW)).points_before
    assert kept is not None
    assert week - timedelta(days=7) < kept <= week
    assert "the first of account 'globex'" in str(await held_back(store, KEEP, NOW))

    while week + timedelta(days=7) < NOW - timedelta(days=6):
        await finalized(store, "globex", week)
        week += timedelta(days=7)
    kept = (await drop_old(store, KEEP, NOW)).points_before
    assert kept is not None
    assert month(9) - timedelta(days=7) < kept <= month(9), "acme's September is not finalised"
    without = Retention(points=KEEP.points, billing_grace=KEEP.billing_grace, keep_unfinalized=False)
    assert await held_back(store, without, NOW) is None
    kept = (await drop_old(store, without, NOW)).points_before
    assert kept is not None
    assert kept > month(9) + timedelta(days=7), "who does not want to wait does not"
    assert await documents_of(store, "acme", AUGUST) == [august]
    assert [one.content for one in await documents_of(store, "acme", month(7))] == [first.content]


async def documents_of(store: Store, account: str, at: datetime) -> list[Document]:
    async with store.reading() as connection:
        return await chain(connection, "default", account, at)


@pytest.mark.engines("timescale")
async def test_documents_are_whole_after_points_and_hours_were_dropped(store: Store, dsn: str) -> None:
    await subscribe(store, PLANS)
    await used(store)
    document = await finalized(store, "acme", AUGUST)
    assert (document.total, document.stands_on["points"]) == (Decimal("62.00"), 4 * 31)
    loose = Retention(points=timedelta(days=20), billing_grace=timedelta(days=5), keep_unfinalized=False)
    assert (await drop_old(store, loose, NOW)).points_before is not None
    await answerable(store, dsn, document, hours=True)
    for relation in ("usage_day", "usage_hour"):
        if execute(dsn, f"SELECT FROM timescaledb_information.continuous_aggregates WHERE view_name = '{relation}'"):
            execute(dsn, f"SELECT drop_chunks('{relation}', older_than => '2026-10-01'::timestamptz)")
        else:
            execute(dsn, f"DELETE FROM {relation} WHERE bucket < '2026-10-01'")
    await answerable(store, dsn, document, hours=False)


@pytest.mark.engines("embedded", "postgres")
async def test_documents_are_whole_after_somebody_removed_points_and_hours(store: Store, dsn: str) -> None:
    await subscribe(store, PLANS)
    await used(store)
    document = await finalized(store, "acme", AUGUST)
    execute(dsn, "UPDATE usage_kept SET points_from = '2026-10-01'")
    execute(dsn, "DELETE FROM usage_point WHERE time < '2026-10-01'")
    await answerable(store, dsn, document, hours=True)
    execute(
        dsn, "DELETE FROM usage_hour WHERE bucket < '2026-10-01'; DELETE FROM usage_day WHERE bucket < '2026-10-01'"
    )
    await answerable(store, dsn, document, hours=False)


async def answerable(store: Store, dsn: str, document: Document, *, hours: bool) -> None:
    """From SQL, from the command line, and again by --finalize; nothing is corrected by what is gone."""
    assert await documents_of(store, "acme", AUGUST) == [document]
    assert await finalized(store, "acme", AUGUST) == document
    rows = execute(dsn, "SELECT sum(amount), sum(quantity), max(points) FROM invoice_lines WHERE account = 'acme'")
    assert rows == [(Decimal("62.00"), Decimal(124), 124)]
    days = execute(dsn, "SELECT count(*), sum(quantity), min(day)::text FROM invoice_days WHERE account = 'acme'")
    assert days == [(31, Decimal(124), "2026-08-01")]
    with pytest.raises(BillingError, match=f"have been dropped: {document.invoice} stands by itself"):
        await changed(store, document)
    async with store.reading() as connection:
        came = await later(connection, [document])
    if hours:
        assert (came.differences, came.problem) == ((), None)
        return
    assert came.problem == (
        "less is stored of api.requests than was billed: it was dropped or removed, and only the document has it"
    )
    with pytest.raises(BillingError, match="cannot be corrected: less is stored"):
        await correct(store, "default", "acme", AUGUST, asked(now=NOW))
    shown = program("invoice", "--account", "acme", "--at", "2026-08-10", "--json", "--database", dsn)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert (found["status"], found["total"], found["invoice"]) == ("finalized", "62.00", document.invoice)
    assert found["stands_on"] == document.stands_on
    assert "what came later cannot be told" in shown.stderr


@pytest.mark.engines("embedded", "postgres")
async def test_a_period_whose_points_were_dropped_is_finalised_knowingly(store: Store, dsn: str) -> None:
    """Users of before had dropped points when there was no document yet."""
    await subscribe(store, PLANS)
    await used(store)
    execute(dsn, "UPDATE usage_kept SET points_from = '2026-08-20'")
    execute(dsn, "DELETE FROM usage_point WHERE time < '2026-08-20'")
    with pytest.raises(RefusedError, match=r"points of the period before 2026-08-20T.* have been dropped"):
        await finalized(store, "acme", AUGUST)
    how = asked(now=NOW, despite=frozenset({"dropped"}), because="they went in July")
    [document] = (await finalize(store, "default", "acme", AUGUST, how)).documents
    assert (document.total, document.stands_on["digest"]) == (Decimal("62.00"), None)
    assert document.stands_on["sums"][0]["by_points"] is None
    with pytest.raises(BillingError, match="had been dropped before it was finalised"):
        await changed(store, document)
    late = round(datetime(2026, 8, 25, 1, tzinfo=timezone.utc).timestamp()) - ZERO_NS // SECOND
    await store.write(Batch(points=[point(stream("acme"), late - 5, late, 3)]))
    with pytest.raises(RefusedError, match="have been dropped"):
        await correct(store, "default", "acme", AUGUST, asked(now=NOW))
    correction = (await correct(store, "default", "acme", AUGUST, how)).documents[-1]
    assert (correction.kind, correction.total) == ("debit_note", Decimal("1.50"))
