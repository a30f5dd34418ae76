"""The catalogue in the database: versions of plans, subscriptions, and the periods that follow from them.

What has been closed stays as it was. A plan that changes gets a new version, which prices the periods that end after
it was applied; a subscription whose change would move or reprice a closed period is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from psycopg.types.json import Jsonb

from tallymark_collector.billing.errors import BillingError
from tallymark_collector.billing.fields import WEEKDAYS
from tallymark_collector.billing.invoice import Invoice, build_invoice
from tallymark_collector.billing.metered import metered
from tallymark_collector.billing.periods import Period, period_containing, periods_between
from tallymark_collector.billing.plans import Catalog, Plan, Subscription
from tallymark_collector.store.database import Connection

AHEAD: Final = timedelta(days=62)
"""How far beyond now periods are written down: two of the longest months."""

_SUBSCRIPTION: Final = (
    "account",
    "plan",
    "time_zone",
    "cycle",
    "anchor_day",
    "anchor_month",
    "anchor_weekday",
    "since",
    "until",
)
"""Columns, which are the fields of `Subscription`."""

_LOCK: Final = "SELECT pg_advisory_xact_lock(hashtextextended('tallymark.billing', 0))"


class ClosedPeriodError(BillingError):
    """A change would rewrite what has been billed."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What applying a catalogue changed."""

    new_versions: tuple[str, ...]
    """Plans that were added or changed, as `plan v3`."""
    unchanged_plans: tuple[str, ...]
    changed_accounts: tuple[str, ...]
    """Accounts whose subscriptions were added or changed."""
    unchanged_accounts: int
    only_in_database: tuple[str, ...]
    """Accounts with subscriptions that the file does not name; they were left alone."""


async def apply(connection: Connection, tenant: str, catalog: Catalog, now: datetime) -> Applied:
    """Writes a catalogue: all of it or, with ClosedPeriodError, nothing. Applying the same again changes nothing.

    The connection must be in a transaction.
    """
    await connection.execute(_LOCK)
    versions, same = [], []
    for plan in catalog.plans.values():
        version = await _apply_plan(connection, tenant, plan, now)
        if version is None:
            same.append(plan.id)
        else:
            versions.append(f"{plan.id} v{version}")
    stored = await subscriptions(connection, tenant)
    wanted: dict[str, list[Subscription]] = defaultdict(list)
    for subscription in catalog.subscriptions:
        wanted[subscription.account].append(subscription)
    changed = [account for account, terms in wanted.items() if stored.get(account) != terms]
    for account in changed:
        await _replace(connection, tenant, account, wanted[account], now)
    return Applied(
        tuple(versions),
        tuple(same),
        tuple(changed),
        len(wanted) - len(changed),
        tuple(sorted(set(stored) - set(wanted))),
    )


async def subscriptions(
    connection: Connection, tenant: str, account: str | None = None
) -> dict[str, list[Subscription]]:
    """Subscriptions by account, an account's by time."""
    rows = await (
        await connection.execute(
            f"""SELECT {", ".join(_SUBSCRIPTION)} FROM subscription
                WHERE tenant = %s AND (%s::text IS NULL OR account = %s) ORDER BY account, since""",  # noqa: S608
            [tenant, account, account],
        )
    ).fetchall()
    found: dict[str, list[Subscription]] = defaultdict(list)
    for row in rows:
        found[row[0]].append(_from_row(row))
    return dict(found)


def _from_row(row: Sequence[object]) -> Subscription:
    terms = dict(zip(_SUBSCRIPTION, row, strict=True))
    weekday = terms["anchor_weekday"]
    if isinstance(weekday, int):
        terms["anchor_weekday"] = WEEKDAYS[weekday - 1]
    return Subscription.model_validate(terms)


def _to_row(s: Subscription) -> tuple[object, ...]:
    weekday = None if s.anchor_weekday is None else WEEKDAYS.index(s.anchor_weekday) + 1
    return (s.account, s.plan, s.time_zone, s.cycle, s.anchor_day, s.anchor_month, weekday, s.since, s.until)


async def subscribed_tenants(connection: Connection) -> list[str]:
    """Tenants that bill anybody."""
    rows = await (await connection.execute("SELECT DISTINCT tenant FROM subscription ORDER BY tenant")).fetchall()
    return [tenant for (tenant,) in rows]


async def extend_periods(connection: Connection, tenant: str, now: datetime) -> int:
    """Writes down the periods that have come within `AHEAD` of now; returns how many were new."""
    await connection.execute(_LOCK)
    added = 0
    for terms in (await subscriptions(connection, tenant)).values():
        added += await _write_periods(connection, tenant, terms, now)
    return added


async def invoice(connection: Connection, tenant: str, account: str, at: datetime) -> Invoice:
    """The invoice of the account's period that contains `at`, from the usage that is stored now.

    Raises BillingError where the account has no period then, or a quantity cannot be told by the meter's aggregation.
    Periods must have been extended up to `at`.
    """
    subscription, period = await period_at(connection, tenant, account, at)
    plan = await plan_for(connection, tenant, subscription.plan, period)
    used = await metered(connection, tenant, account, period, plan)
    return build_invoice(subscription, plan, period, used.quantities, used.remarks)


async def period_at(connection: Connection, tenant: str, account: str, at: datetime) -> tuple[Subscription, Period]:
    """The account's period that contains `at`, and its subscription. Raises BillingError where there is none, or it was
    not written down as it is."""
    terms = (await subscriptions(connection, tenant, account)).get(account, [])
    if not terms:
        raise BillingError(f"account {account!r} has no subscription: add it to the plans file and apply that")
    for subscription in terms:
        period = period_containing(subscription, at)
        if period is not None:
            await _check_written_down(connection, tenant, subscription, period)
            return subscription, period
    first = terms[0].since
    raise BillingError(f"account {account!r} has no period at {at.isoformat()}: it is subscribed since {first}")


class Version(NamedTuple):
    """A plan as it was applied."""

    number: int
    applied_at: datetime
    plan: Plan


async def plan_for(connection: Connection, tenant: str, plan: str, period: Period) -> Plan:
    """The plan as it prices the period: the newest version applied before the period's end, or else the first."""
    return (await version_for(connection, tenant, plan, period)).plan


async def version_for(connection: Connection, tenant: str, plan: str, period: Period) -> Version:
    """The same, with which version that is."""
    row = await (
        await connection.execute(
            """SELECT version, applied_at, document FROM plan_version WHERE tenant = %s AND plan = %s
               ORDER BY applied_at < %s DESC, CASE WHEN applied_at < %s THEN -version ELSE version END LIMIT 1""",
            [tenant, plan, period.end, period.end],
        )
    ).fetchone()
    if row is None:
        raise BillingError(f"plan {plan!r} is in no catalogue that was applied")
    return Version(row[0], row[1], Plan.from_document(row[2]))


async def _check_written_down(connection: Connection, tenant: str, subscription: Subscription, period: Period) -> None:
    """Usage is summed over the period's row. A row that is not there, or another one, must not read as "no usage"."""
    row = await (
        await connection.execute(
            """SELECT period_start, period_end FROM billing_period
               WHERE tenant = %s AND account = %s AND since = %s AND number = %s""",
            [tenant, subscription.account, subscription.since, period.index],
        )
    ).fetchone()
    name = f"account {subscription.account!r}: its period from {period.start.isoformat()} to {period.end.isoformat()}"
    if row is None:
        raise BillingError(f"{name} is not written down yet: run `tallymark serve`, or apply the plans file again")
    if row != (period.start, period.end):
        raise BillingError(
            f"{name} was written down as {row[0].isoformat()} to {row[1].isoformat()}: this machine's time zone data"
            f" says otherwise about {subscription.time_zone}. Use the data that the period was made with"
        )


async def _apply_plan(connection: Connection, tenant: str, plan: Plan, now: datetime) -> int | None:
    row = await (
        await connection.execute(
            "SELECT version, content FROM plan_version WHERE tenant = %s AND plan = %s ORDER BY version DESC LIMIT 1",
            [tenant, plan.id],
        )
    ).fetchone()
    if row is not None and row[1] == plan.version:
        return None
    version = 1 if row is None else int(row[0]) + 1
    await connection.execute(
        "INSERT INTO plan_version (tenant, plan, version, content, document, applied_at)"
        " VALUES (%s, %s, %s, %s, %s, %s)",
        [tenant, plan.id, version, plan.version, Jsonb(plan.to_document()), now],
    )
    return version


async def _replace(
    connection: Connection, tenant: str, account: str, terms: Sequence[Subscription], now: datetime
) -> None:
    closed = await (
        await connection.execute(
            """SELECT period_start, period_end, plan FROM billing_period
               WHERE tenant = %s AND account = %s AND period_end <= %s ORDER BY period_start""",
            [tenant, account, now],
        )
    ).fetchall()
    for start, end, plan in closed:
        became = [(p.start, p.end, s.plan) for s in terms for p in periods_between(s, start, end)]
        if became != [(start, end, plan)]:
            raise ClosedPeriodError(
                f"account {account!r}: the period from {start.isoformat()} to {end.isoformat()} on plan {plan!r} is"
                " closed and would change. Give the old subscription an `until` and add a second one from that day"
            )
    await connection.execute("DELETE FROM subscription WHERE tenant = %s AND account = %s", [tenant, account])
    await connection.execute(
        "DELETE FROM billing_period WHERE tenant = %s AND account = %s AND period_end > %s", [tenant, account, now]
    )
    async with connection.cursor() as cursor:
        await cursor.executemany(
            f"INSERT INTO subscription ({', '.join(_SUBSCRIPTION)}, tenant)"  # noqa: S608
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            [(*_to_row(s), tenant) for s in terms],
        )
    await _write_periods(connection, tenant, terms, now)


async def _write_periods(connection: Connection, tenant: str, terms: Sequence[Subscription], now: datetime) -> int:
    rows = [
        (period.start, period.end, s.account, tenant, s.since, period.index, s.plan)
        for s in terms
        for period in periods_between(s, _beginning(s, now), now + AHEAD)
    ]
    if not rows:
        return 0
    # What has not ended yet follows the time zone data of today; what has ended stays.
    await connection.execute(
        """DELETE FROM billing_period WHERE tenant = %s AND account = %s AND period_end > %s
           AND (since, number, period_start, period_end) NOT IN (
               SELECT * FROM unnest(%s::date[], %s::int[], %s::timestamptz[], %s::timestamptz[]))""",
        [tenant, terms[0].account, now, *([row[i] for row in rows] for i in (4, 5, 0, 1))],
    )
    columns = [list(column) for column in zip(*rows, strict=True)]
    result = await connection.execute(
        """INSERT INTO billing_period (period_start, period_end, account, tenant, since, number, plan)
           SELECT * FROM unnest(%s::timestamptz[], %s::timestamptz[], %s::text[], %s::text[], %s::date[], %s::int[],
                                %s::text[])
           ON CONFLICT DO NOTHING""",
        columns,
    )
    return result.rowcount


def _beginning(subscription: Subscription, now: datetime) -> datetime:
    """An instant before the subscription's first, as far back as its day can lie in any time zone."""
    begin = datetime(subscription.since.year, subscription.since.month, subscription.since.day, tzinfo=now.tzinfo)
    return min(begin - timedelta(days=2), now + AHEAD)
