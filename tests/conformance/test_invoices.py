"""Finalised invoices: made once, never changed, and together with their corrections what brute force says."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest

from tallymark_collector.billing import records
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.billing.errors import BillingError
from tallymark_collector.errors import UserError
from tallymark_collector.invoicing import (
    Asked,
    RefusedError,
    chain,
    correct,
    finalize,
    finalizing,
    later,
    unchanged,
)
from tallymark_collector.invoicing.documents import Document
from tallymark_collector.model import Batch, Point, Quarantined, Reason, Refusal, Source, Temporality, fingerprint
from tallymark_collector.store import Store
from tests.support.control import closed, told
from tests.support.usage import BASE, SECOND, point, stream

ZONE = ZoneInfo("Asia/Kolkata")
START = datetime(2026, 8, 15, tzinfo=ZONE)
END = datetime(2026, 9, 15, tzinfo=ZONE)
INSIDE = START + timedelta(days=3)
NOW = datetime(2026, 9, 20, tzinfo=timezone.utc)
PLANS = """currency: EUR
meters:
  api.requests: {unit: "{request}"}
  users: {unit: "{request}", aggregation: unique, of: user.id}
plans:
  basic:
    name: Basic
    charges:
      - {flat: "10.00", name: Base fee}
      - meter: api.requests
        included: 3
        graduated: [{up_to: 10, unit_price: "0.333"}, {unit_price: "0.1111", flat: "2.00"}]
      - {meter: users, unit_price: "1.005"}
accounts:
  acme: {plan: basic, since: 2026-06-15, anchor_day: 15, time_zone: Asia/Kolkata}
  globex: {plan: basic, since: 2026-06-15, anchor_day: 15, time_zone: Asia/Kolkata}
"""


def asked(**how: Any) -> Asked:
    return Asked(**{"by": "anne", "now": NOW, "settled": timedelta(0), **how})


async def subscribe(store: Store, plans: str = PLANS) -> None:
    async with store.transaction() as connection:
        await records.apply(connection, "default", parse_catalog(plans), NOW)


def at(when: datetime, value: str | int, of: Any = None, microseconds: int = 0) -> Point:
    end = round(when.timestamp()) * SECOND + microseconds * 1000
    return Point(of or stream(), end - 5 * SECOND, end, Decimal(value))


def execute(dsn: str, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark,public -c timezone=utc") as connection:
        cursor = connection.execute(statement, parameters or None)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


async def documents(store: Store, account: str = "acme") -> list[Document]:
    async with store.reading() as connection:
        return await chain(connection, "default", account, INSIDE)


async def changed(store: Store, document: Document) -> str | None:
    async with store.reading() as connection:
        return await unchanged(connection, document)


def digest(dsn: str) -> str:
    """The digest as docs/invoices.md says it, by Python."""
    epoch = datetime(1970, 1, 1, tzinfo=timezone.utc)
    rows = execute(
        dsn,
        """SELECT p.time, p.start_time, p.part, p.stream, s.meter, s.unit, p.quantity
           FROM usage_point p JOIN usage_series s USING (account, series)
           WHERE p.account = 'acme' AND p.time >= %s AND p.time < %s""",
        [START, END],
    )
    hours: dict[datetime, list[tuple[Any, ...]]] = {}
    for row in sorted(rows, key=lambda row: (row[0], row[3].bytes, row[1], row[2])):
        hours.setdefault(row[0].replace(minute=0, second=0, microsecond=0), []).append(row)
    whole = hashlib.sha256()
    for hour in sorted(hours):
        lines = [
            json.dumps(
                [
                    *((each - epoch) // timedelta(microseconds=1) for each in row[:2]),
                    row[2],
                    str(row[3]),
                    *row[4:6],
                    format(row[6].normalize(), "f"),
                ],
                ensure_ascii=False,
            )
            for row in hours[hour]
        ]
        whole.update(hashlib.sha256("\n".join(lines).encode()).digest())
    return whole.hexdigest()


USERS = [stream(meter="users", **{"user.id": name}) for name in ("u1", "u2", "ü")]
EDGE = stream(route="/edge")
USED = [
    at(START, 4),
    at(START, 100, EDGE, microseconds=-1),  # the period before
    at(START + timedelta(minutes=10), "0.50"),  # inside the first hour (UTC), of which a half is the period's
    at(INSIDE, 9),
    at(END, 2, EDGE, microseconds=-1),
    at(END, 200),  # the period after
    *(at(INSIDE + timedelta(hours=n), 1, of) for n, of in enumerate(USERS)),
]


async def test_a_document_has_all_that_it_stands_on(store: Store, dsn: str) -> None:
    await subscribe(store)
    await store.write(Batch(points=USED))
    outcome = await finalize(store, "default", "acme", INSIDE, asked())
    [document] = outcome.documents
    assert (outcome.new, document.kind, document.number, document.corrects) == (True, "invoice", 0, None)
    assert (document.period_start, document.period_end, document.finalized_by) == (START, END, "anne")
    content = document.content
    # 15.5 requests: 3 are included, 10 at 0.333, 2.5 at 0.1111 and the tier's fee; three users at 1.005.
    assert [(line["description"], line["quantity"], line["amount"], line["points"]) for line in content["lines"]] == [
        ("Base fee", "1", "10.00", None),
        ("api.requests, included (3 per period)", "3", "0.00", 4),
        ("api.requests, up to 10", "10", "3.33", 4),
        ("api.requests, above 10", "2.50", "0.28", 4),
        ("api.requests, above 10, tier fee", "1", "2.00", None),
        ("users", "3", "3.02", 3),
    ]
    assert (content["total"], document.total) == ("18.63", Decimal("18.63"))
    assert content["lines"][2]["charge"]["graduated"][0] == {"up_to": "10", "unit_price": "0.333"}
    assert content["prices"]["version"] == 1
    assert content["prices"]["document"]["charges"][2] == {"meter": "users", "unit_price": "1.005"}
    assert content["plan_version"] == document.prices.version
    basis = content["stands_on"]
    assert (basis["points"], basis["digest"]) == (7, digest(dsn))
    assert basis["audit"] == {"hours": 8, "points": 9, "differences": 0, "drifts": 0, "overlaps": 0}
    assert basis["sums"] == [
        {"meter": "api.requests", "unit": "{request}", "points": 4, **dict.fromkeys(SUMS, "15.50")},
        {"meter": "users", "unit": "{request}", "points": 3, **dict.fromkeys(SUMS, "3")},
    ]
    assert [(day["day"], day["quantity"]) for day in basis["days"] if day["meter"] == "api.requests"] == [
        ("2026-08-14", "4.50"),
        ("2026-08-17", "9"),
        ("2026-09-14", "2"),
    ]
    assert (basis["in_quarantine"], basis["accepted"]) == ({"account": 0, "no_account": 0}, [])
    assert await changed(store, document) is None


SUMS = ("by_points", "by_hours", "by_days")


async def test_the_digest_tells_what_was_changed_and_not_what_came_later(store: Store, dsn: str) -> None:
    await subscribe(store)
    await store.write(Batch(points=USED))
    [document] = (await finalize(store, "default", "acme", INSIDE, asked())).documents
    await store.write(Batch(points=[at(INSIDE + timedelta(hours=1), 7), at(START + timedelta(days=9), 1)]))
    assert await changed(store, document) is None, "late usage is not a change"
    for table, assignment, was in [
        ("point", "quantity = 8", "quantity = 9"),
        ("series", "meter = 'x'", "meter = 'users'"),
    ]:
        change, back = (
            f"UPDATE usage_{table} SET {to} WHERE {of}" for to, of in ((assignment, was), (was, assignment))
        )
        execute(dsn, change)
        assert "points were 7 with the digest" in str(await changed(store, document))
        execute(dsn, back)
        assert await changed(store, document) is None
    execute(dsn, "DELETE FROM usage_point WHERE quantity = 9")
    assert "and are 6 with" in str(await changed(store, document))


async def test_again_is_the_same_document(store: Store) -> None:
    await subscribe(store)
    await store.write(Batch(points=USED))
    first = await finalize(store, "default", "acme", INSIDE, asked())
    await store.write(Batch(points=[at(INSIDE + timedelta(hours=1), 7)]))
    await subscribe(store, PLANS.replace("10.00", "99.00"))
    again = await finalize(store, "default", "acme", END - timedelta(seconds=1), asked(by="bert"))
    assert (first.new, again.new) == (True, False)
    assert again.documents == first.documents
    next_period = await finalize(store, "default", "acme", END, asked(now=NOW + timedelta(days=60)))
    assert next_period.new
    assert next_period.documents[0].invoice != first.documents[0].invoice


async def test_many_at_once_make_one_document(store: Store, dsn: str) -> None:
    await subscribe(store)
    await store.write(Batch(points=USED))
    other = Store(dsn)
    await other.open()
    both = [store, other] * 5
    try:
        outcomes = await asyncio.gather(
            *(finalize(each, "default", "acme", INSIDE, asked(by=str(n))) for n, each in enumerate(both))
        )
        assert sorted(outcome.new for outcome in outcomes) == [False] * 9 + [True]
        assert len({str(outcome.documents) for outcome in outcomes}) == 1
        await store.write(Batch(points=[at(INSIDE + timedelta(hours=1), 7)]))
        outcomes = await asyncio.gather(*(correct(each, "default", "acme", INSIDE, asked()) for each in both))
        assert sorted(outcome.new for outcome in outcomes) == [False] * 9 + [True]
    finally:
        await other.close()
    assert [document.number for document in await documents(store)] == [0, 1]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE invoice_document SET total = 0",
        "DELETE FROM invoice_document",
        "TRUNCATE invoice_document",
        "UPDATE invoices SET plan = 'x'",
    ],
)
async def test_nobody_changes_a_document(store: Store, dsn: str, statement: str) -> None:
    await subscribe(store)
    await finalize(store, "default", "acme", INSIDE, asked())
    with pytest.raises(psycopg.Error, match=r"never changed nor removed: correct it by a document of its own"):
        execute(dsn, statement)
    assert len(await documents(store)) == 1


async def test_a_document_that_does_not_add_up_is_refused_by_the_database(store: Store, dsn: str) -> None:
    await subscribe(store)
    await finalize(store, "default", "acme", INSIDE, asked())
    copied = """INSERT INTO invoice_document SELECT (jsonb_populate_record(d, %s)).* FROM invoice_document d"""
    for change, refusal in [
        ({"account": "x", "total": 5}, "is not the sum of its lines"),
        ({"number": 2, "kind": "debit_note", "corrects": "x"}, "does not follow the document"),
        ({"period_start": "2026-08-20T00:00:00Z"}, "is on a finalised invoice already"),
        ({"account": "x", "kind": "debit_note"}, "invoice_document_kind"),
    ]:
        with pytest.raises(psycopg.Error, match=refusal):
            execute(dsn, copied, [json.dumps(change)])


async def kinds(store: Store, **how: Any) -> list[str]:
    with pytest.raises(RefusedError) as refused:
        await finalize(store, "default", "acme", INSIDE, asked(**how))
    assert await documents(store) == []
    return [obstacle.kind for obstacle in refused.value.obstacles]


async def test_a_period_is_finalised_after_its_end_and_the_grace(store: Store) -> None:
    await subscribe(store)
    assert await kinds(store, now=END - timedelta(microseconds=1)) == ["open"]
    assert await kinds(store, now=END) == ["grace"]
    assert await kinds(store, now=END + timedelta(hours=24) - timedelta(microseconds=1)) == ["grace"]
    assert await kinds(store, now=END, grace=timedelta(microseconds=1)) == ["grace"]
    assert (await finalize(store, "default", "acme", INSIDE, asked(now=END, grace=timedelta(0)))).new
    with pytest.raises(UserError, match="grace is negative"):
        asked(grace=timedelta(-1))


async def test_what_arrives_just_now_is_waited_for(store: Store, dsn: str) -> None:
    """Else a transaction that began before and commits after could not be told from what was billed."""
    await subscribe(store)
    await store.write(Batch(points=USED))
    assert await kinds(store, settled=timedelta(seconds=60)) == ["arriving"]
    execute(dsn, "UPDATE usage_point SET recorded_at = recorded_at - interval '61 seconds'")
    assert (await finalize(store, "default", "acme", INSIDE, asked(settled=timedelta(seconds=60)))).new


async def test_no_invoice_is_finalised_on_a_difference(store: Store, dsn: str) -> None:
    await subscribe(store)
    cumulative = stream(producer="two", temporality=Temporality.CUMULATIVE)
    await store.write(Batch(points=[*USED, at(INSIDE, 5, cumulative)]))
    execute(
        dsn,
        "INSERT INTO usage_sample SELECT account, stream, 1, 2, 99 FROM usage_stream WHERE temporality = 2",
    )
    assert await kinds(store) == ["drift"]
    despite = {"despite": frozenset({"overlap", "missing", "quarantine", "dropped"}), "because": "we know"}
    assert await kinds(store, **despite) == ["drift"], "nobody can accept that"
    execute(dsn, "DELETE FROM usage_sample WHERE value = 99")
    execute(dsn, "UPDATE usage_series SET meter = 'elsewhere' WHERE account = 'globex'")
    assert (await finalize(store, "default", "acme", INSIDE, asked())).new


@pytest.mark.engines("embedded", "postgres")
@pytest.mark.parametrize("table", ["usage_hour", "usage_day"])
async def test_hours_and_days_have_to_say_what_the_points_say(store: Store, dsn: str, table: str) -> None:
    await subscribe(store)
    await store.write(Batch(points=USED))
    while await store.refresh():
        pass
    execute(dsn, f"UPDATE {table} SET quantity = quantity + 1 WHERE quantity = 9")
    assert await kinds(store, despite=frozenset({"missing"}), because="we know") == ["difference"]
    async with store.session() as connection:
        await store.mark_in(connection, [(INSIDE.astimezone(timezone.utc).replace(minute=0), "acme", "default")])
    while await store.refresh():
        pass
    assert (await finalize(store, "default", "acme", INSIDE, asked())).new


async def test_what_may_be_accepted_is_accepted_knowingly_and_on_the_document(store: Store) -> None:
    await subscribe(store)
    first = at(INSIDE, 1)
    overlapping = first._replace(start_ns=first.start_ns - SECOND, time_ns=first.time_ns - SECOND)
    await store.write(Batch(points=[*USED, overlapping]))
    inside = int(INSIDE.timestamp()) - BASE // SECOND
    refusal = Refusal(Reason.VALUE_CONFLICT, "x")
    items = [
        Quarantined(
            "default", account, "api.requests", (BASE // SECOND + inside) * SECOND, refusal, "metrics", b"%d" % n
        )
        for n, account in enumerate(("acme", "", "globex"))
    ]
    await store.write(
        Batch(
            quarantined=items,
            points=[point(stream(producer="three"), inside, inside + 10, 4)],
            controls=[told(inside + 10, 6, of="three"), told(inside + 20, 6, of="three")],
            closings=[closed(inside + 20, of="three")],
        )
    )
    async with store.session() as connection:
        await connection.execute("UPDATE usage_control SET recorded_at = recorded_at - interval '1 hour'")
    assert await kinds(store) == ["overlap", "missing", "quarantine"]
    assert await kinds(store, despite=frozenset({"overlap", "missing"}), because="known") == ["quarantine"]
    with pytest.raises(UserError, match="needs a reason"):
        asked(despite=frozenset({"overlap"}))
    with pytest.raises(UserError, match="drift cannot be accepted; what can is overlap, missing, quarantine, dropped"):
        asked(despite=frozenset({"drift"}), because="x")
    everything = asked(despite=frozenset({"overlap", "missing", "quarantine"}), because="agreed with acme")
    [document] = (await finalize(store, "default", "acme", INSIDE, everything)).documents
    assert document.because == "agreed with acme"
    assert [one["kind"] for one in document.stands_on["accepted"]] == ["overlap", "missing", "quarantine"]
    assert document.stands_on["in_quarantine"] == {"account": 1, "no_account": 1}
    [missing] = document.stands_on["completeness"]["of_billed_meters"]
    assert (missing["producer"], missing["difference"], missing["status"]) == ("three", "2", "missing")


async def test_periods_that_are_none(store: Store) -> None:
    await subscribe(store)
    for work in (finalize, correct):
        with pytest.raises(BillingError, match="has no"):
            await work(store, "default", "nobody", INSIDE, asked())
    with pytest.raises(BillingError, match="there is nothing to correct"):
        await correct(store, "default", "acme", INSIDE, asked())


async def test_what_came_later_is_shown_and_billed_by_a_document_of_its_own(store: Store) -> None:
    await subscribe(store)
    await store.write(Batch(points=USED))
    [invoice] = (await finalize(store, "default", "acme", INSIDE, asked())).documents
    assert not (await correct(store, "default", "acme", INSIDE, asked())).new, "nothing came"
    await store.write(Batch(points=[at(INSIDE + timedelta(hours=5), "4.5"), at(INSIDE, 3, stream(meter="other"))]))
    await subscribe(store, PLANS.replace("0.1111", "9.99"))
    async with store.reading() as connection:
        found = await later(connection, [invoice])
    assert [tuple(one) for one in found.differences] == [
        ("api.requests", "{request}", Decimal("4.5"), 1),
        ("other", "{request}", Decimal(3), 1),
    ]
    outcome = await correct(store, "default", "acme", INSIDE, asked(by="bert"))
    assert outcome.documents[0] == invoice
    correction = outcome.documents[1]
    # 7.0 above 10 instead of 2.5, at the period's prices: 0.78 - 0.28.
    assert [(line.description, line.quantity, line.amount) for line in correction.lines] == [
        ("api.requests, above 10", Decimal("4.50"), Decimal("0.50"))
    ]
    assert (correction.kind, correction.corrects, correction.number) == ("debit_note", invoice.invoice, 1)
    assert (correction.total, correction.content["period_total"]) == (Decimal("0.50"), "19.13")
    assert correction.content["unpriced"][0]["meter"] == "other"
    assert not (await correct(store, "default", "acme", INSIDE, asked())).new
    assert await documents(store) == [invoice, correction]
    assert await changed(store, correction) is None


async def test_usage_that_turns_out_to_be_anothers_is_credited(store: Store) -> None:
    """A total that comes late takes back from the period what belongs to the one before."""
    await subscribe(store)
    cumulative = stream(producer="two", temporality=Temporality.CUMULATIVE)
    begin = round((START - timedelta(hours=1)).timestamp()) * SECOND

    def total(seconds: int, value: int) -> Point:
        return Point(cumulative, begin, begin + seconds * SECOND, Decimal(value))

    await store.write(Batch(points=[total(7200, 20)]))
    await finalize(store, "default", "acme", INSIDE, asked())
    await store.write(Batch(points=[total(1800, 12)]))
    correction = (await correct(store, "default", "acme", INSIDE, asked())).documents[-1]
    assert (correction.kind, correction.total) == ("credit_note", Decimal("-4.44"))
    # 20: 3.33 + 0.78 + 2.00; 8: 1.67
    assert sum((line.amount for line in correction.lines), Decimal(0)) == Decimal("1.67") - Decimal("6.11")


def bill(requests: Fraction, users: int) -> Decimal:
    """The plan above by fractions, rounded half up at the line."""
    rest = max(requests - 3, Fraction(0))
    amounts = [Fraction(10), min(rest, Fraction(10)) * Fraction("0.333"), users * Fraction("1.005")]
    if rest > 10:
        amounts += [(rest - 10) * Fraction("0.1111"), Fraction(2)]
    return sum((Decimal(int(amount * 100 + Fraction(1, 2))) / 100 for amount in amounts), Decimal(0))


@pytest.mark.parametrize("seed", range(4))
async def test_the_document_and_its_corrections_are_the_price_of_all_that_came(
    store: Store, dsn: str, seed: int
) -> None:
    """Random late batches: increases, running totals out of order, other periods' usage, repetitions."""
    rng = random.Random(f"invoices {seed}")
    await subscribe(store)
    totals = stream(producer="two", temporality=Temporality.CUMULATIVE)
    begin = round((START - timedelta(days=1)).timestamp()) * SECOND
    length = round((END - START + timedelta(days=2)).total_seconds())
    told_at = sorted(rng.sample(range(60, length), 12))
    grown = sorted(rng.randint(0, 40) for _ in told_at)
    waiting = [Point(totals, begin, begin + s * SECOND, Decimal(v)) for s, v in zip(told_at, grown, strict=True)]
    for n in range(60):
        of = rng.choice([stream(), stream(route="/b"), *USERS])
        end = begin + rng.randint(60, length) * SECOND
        waiting.append(Point(of, end - 1000 * (n + 1), end, Decimal(rng.randint(1, 400)) / 100))
    rng.shuffle(waiting)
    low, high = (round(edge.timestamp()) * SECOND for edge in (START, END))
    written: list[Point] = []
    for n in range(6):
        batch = waiting[n * 12 : n * 12 + 12] + rng.sample(written, min(len(written), 3))
        written += waiting[n * 12 : n * 12 + 12]
        await store.write(Batch(points=batch))
        for _ in range(rng.randint(0, 3)):
            await store.refresh()
        work = finalize if n == 0 else correct
        if n == 0 or rng.random() < 0.7:
            await work(store, "default", "acme", INSIDE, asked(despite=frozenset({"overlap"}), because="random"))
    found = (
        await correct(store, "default", "acme", INSIDE, asked(despite=frozenset({"overlap"}), because="random"))
    ).documents
    inside = [p for p in written if p.stream is not totals and low <= p.time_ns < high]
    steps = zip([0, *grown], grown, told_at, strict=False)
    requests = sum(Fraction(p.value) for p in inside if p.stream not in USERS) + sum(
        Fraction(after - before) for before, after, s in steps if low <= begin + s * SECOND < high
    )
    users = len({p.stream.id for p in inside if p.stream in USERS})
    assert sum((document.total for document in found), Decimal(0)) == bill(requests, users)
    assert found[-1].quantities["api.requests", "{request}"] == requests
    by_meter: dict[str, Decimal] = {}
    for line in (line for document in found for line in document.lines if line.meter):
        by_meter[line.meter] = by_meter.get(line.meter, Decimal(0)) + line.quantity
    assert by_meter == {"api.requests": requests, "users": users}
    assert [await changed(store, document) for document in found] == [None] * len(found)
    lines = execute(dsn, "SELECT sum(amount) FROM invoice_lines WHERE account = 'acme'")
    assert lines == execute(dsn, "SELECT sum(total) FROM invoices WHERE account = 'acme'")
    assert lines == [(bill(requests, users),)]


LEVELS = """currency: EUR
meters: {storage: {unit: "{request}", aggregation: integral, stale_after: 30m}}
plans: {basic: {charges: [{meter: storage, unit_price: "0.5"}]}}
accounts: {acme: {plan: basic, since: 2026-06-15, anchor_day: 15, time_zone: Asia/Kolkata}}
"""


async def test_levels_are_billed_digested_and_corrected(store: Store, dsn: str) -> None:
    """5 from ten minutes before the period hold for twenty minutes of it, 6 hold for half an hour."""
    of = stream(meter="storage", temporality=Temporality.LEVEL)
    await subscribe(store, LEVELS)
    before = at(START - timedelta(minutes=10), 5, of)._replace(start_ns=0)
    await store.write(Batch(points=[before, at(INSIDE, 6, of)._replace(start_ns=0)]))
    [invoice] = (await finalize(store, "default", "acme", INSIDE, asked())).documents
    quantity = Decimal(5) / 3 + 3
    assert invoice.lines[0].quantity.quantize(Decimal("0.000001")) == quantity.quantize(Decimal("0.000001"))
    assert invoice.total == Decimal("2.33")
    assert (invoice.stands_on["points"], invoice.stands_on["levels"]) == (0, 2)
    await store.write(Batch(points=[at(INSIDE + timedelta(minutes=15), 2, of)._replace(start_ns=0)]))
    assert await changed(store, invoice) is None
    correction = (await correct(store, "default", "acme", INSIDE, asked())).documents[-1]
    # 6 for a quarter of an hour and 2 for half of one instead of 6 for half an hour: half a unit less.
    assert (correction.kind, correction.total) == ("credit_note", Decimal("-0.25"))
    execute(dsn, "UPDATE usage_level SET value = 7 WHERE value = 5")
    assert str(await changed(store, invoice)).startswith("levels were 2 with the digest")


async def test_a_level_that_turns_out_to_be_anothers_is_credited(store: Store) -> None:
    """A file of meters takes it: the level that ends it is another account's, and comes after the invoice."""
    await subscribe(store, LEVELS)
    source = Source(fingerprint("seats"), Decimal(1))
    acme, globex = (
        replace(stream(account, "storage", temporality=Temporality.LEVEL), source=source)
        for account in ("acme", "globex")
    )
    await store.write(Batch(points=[at(INSIDE, 6, acme)._replace(start_ns=0)]))
    [invoice] = (await finalize(store, "default", "acme", INSIDE, asked())).documents
    assert (invoice.total, invoice.stands_on["levels"]) == (Decimal("1.50"), 1)
    await store.write(Batch(points=[at(INSIDE + timedelta(minutes=15), 6, globex)._replace(start_ns=0)]))
    assert await changed(store, invoice) is None
    correction = (await correct(store, "default", "acme", INSIDE, asked())).documents[-1]
    assert (correction.kind, correction.total) == ("credit_note", Decimal("-0.75"))


async def test_two_tenants_accounts_of_one_name_have_documents_of_their_own(store: Store) -> None:
    for tenant, price in (("default", "0.5"), ("other", "7")):
        async with store.transaction() as connection:
            plans = LEVELS.replace(", aggregation: integral, stale_after: 30m", "").replace("0.5", price)
            await records.apply(connection, tenant, parse_catalog(plans), NOW)
        await store.write(Batch(points=[at(INSIDE, 2, stream(meter="storage", tenant=tenant))]))
    totals, names = [], set()
    for tenant in ("default", "other"):
        [document] = (await finalize(store, tenant, "acme", INSIDE, asked())).documents
        totals.append(document.total)
        names.add(document.invoice)
        async with store.reading() as connection:
            assert await chain(connection, tenant, "acme", INSIDE) == [document]
    assert (totals, len(names)) == ([Decimal("1.00"), Decimal("14.00")], 2)


async def test_a_transaction_that_fails_leaves_nothing_and_the_next_one_works(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the lock of the account is free again."""
    await subscribe(store)
    await store.write(Batch(points=USED))
    real = finalizing.documents.add

    async def killed(connection: Any, document: Document) -> Document:
        await real(connection, document)
        raise RuntimeError("killed before the commit")

    monkeypatch.setattr(finalizing.documents, "add", killed)
    with pytest.raises(RuntimeError, match="killed"):
        await finalize(store, "default", "acme", INSIDE, asked())
    monkeypatch.undo()
    assert await documents(store) == []
    assert (await finalize(store, "default", "acme", INSIDE, asked())).new


async def test_a_document_of_an_overlapping_period_is_a_sentence(store: Store, dsn: str) -> None:
    """Periods that follow from other time zone data, say: no call is billed twice."""
    await subscribe(store)
    await finalize(store, "default", "acme", INSIDE, asked())
    execute(
        dsn,
        """INSERT INTO invoice_document
           SELECT (jsonb_populate_record(d, '{"account": "globex"}')).* FROM invoice_document d""",
    )
    execute(dsn, "ALTER TABLE invoice_document DISABLE TRIGGER invoice_document_stays")
    execute(dsn, "UPDATE invoice_document SET period_start = period_start + interval '1 day'")
    with pytest.raises(BillingError, match="is on a finalised invoice already"):
        await finalize(store, "default", "globex", START, asked())
