"""Quantities of what is not summed, as the database tells them (`usage_aggregated` in store/sql).

One function there serves invoices, `tallymark usage` and the public view: there is one meaning of each aggregation.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from psycopg.types.json import Jsonb

from tallymark_collector.billing.errors import BillingError
from tallymark_collector.billing.fields import OF_LEVELS
from tallymark_collector.billing.money import grouped
from tallymark_collector.billing.plans import Aggregation, Plan
from tallymark_collector.store.database import Connection


class Aggregated(NamedTuple):
    """A meter's usage in one unit, of one account and range, by its aggregation."""

    account: str
    meter: str
    unit: str
    """As it is metered; `how.unit()` is what the quantity counts."""
    how: Aggregation
    quantity: Decimal | None
    """None where there is a problem."""
    points: int
    unnamed: Decimal
    """Of `unique`: the quantity of usage that lacks the attribute, and so is none of the values."""
    problem: str | None
    """Why there is no quantity."""


async def aggregated(
    connection: Connection,
    tenant: str,
    account: str | None,
    start: datetime,
    end: datetime,
    declared: Mapping[str, Aggregation],
) -> list[Aggregated]:
    """What the account (each, where None) used of the declared meters in `[start, end)`, by account, meter and unit.

    What had no usage there has no entry.
    """
    if not declared:
        return []
    document = {meter: how.model_dump(mode="json", exclude_defaults=True) for meter, how in declared.items()}
    rows = await (
        await connection.execute(
            """SELECT a.account, u.meter, u.unit, u.quantity, u.points, u.unnamed, u.problem
               FROM (SELECT account FROM usage_series
                     WHERE tenant = %(tenant)s AND meter = ANY (%(meters)s)
                       AND (%(account)s::text IS NULL OR account = %(account)s)
                     GROUP BY account) a
               CROSS JOIN LATERAL usage_aggregated(%(tenant)s, a.account, %(start)s, %(end)s, %(declared)s) u
               ORDER BY a.account, u.meter, u.unit""",
            {
                "tenant": tenant,
                "account": account,
                "meters": list(declared),
                "start": start,
                "end": end,
                "declared": Jsonb(document),
            },
        )
    ).fetchall()
    return [Aggregated(account, meter, unit, declared[meter], *rest) for account, meter, unit, *rest in rows]


async def in_force(connection: Connection, tenant: str) -> dict[str, Aggregation]:
    """The meters that are not summed, as the plan says that was applied last of those that charge for the meter."""
    rows = await (
        await connection.execute(
            """SELECT DISTINCT ON (u.meter) u.meter, v.document #> ARRAY['aggregations', u.meter]
               FROM plan_version v, jsonb_object_keys(v.document -> 'units') AS u (meter)
               WHERE v.tenant = %s ORDER BY u.meter, v.applied_at DESC, v.version DESC""",
            [tenant],
        )
    ).fetchall()
    return {meter: Aggregation.model_validate(how) for meter, how in rows if how is not None}


def quantity_of(found: Aggregated) -> Decimal:
    """The quantity. Raises BillingError where there is none."""
    if found.quantity is None:
        raise BillingError(
            f"account {found.account!r}: the meter {found.meter!r} cannot be billed by its {found.how}: {found.problem}"
        )
    return found.quantity


def remark(found: Aggregated) -> str | None:
    """What somebody should know beside the quantity."""
    if not found.unnamed:
        return None
    return (
        f"{grouped(found.unnamed)} of meter {found.meter!r} (unit {found.unit!r}) have no attribute {found.how.of!r}"
        " and are in no value that was counted"
    )


async def levels_beside(
    connection: Connection, tenant: str, account: str, start: datetime, end: datetime, plan: Plan
) -> tuple[str, ...]:
    """A sentence for each meter whose levels in `[start, end)` are on no line of the plan: they are no amounts, so they
    are not among what is unpriced."""
    rows = await (
        await connection.execute(
            """SELECT s.meter, s.unit, count(*)
               FROM usage_level l JOIN usage_series s ON s.account = l.account AND s.series = l.series
               WHERE l.account = %s AND l.tenant = %s AND l.time >= %s AND l.time < %s
               GROUP BY s.meter, s.unit ORDER BY s.meter, s.unit""",
            [account, tenant, start, end],
        )
    ).fetchall()
    found = []
    for meter, unit, samples in rows:
        how, priced_in = plan.aggregations.get(meter), plan.units.get(meter)
        if priced_in == unit and how is not None and how.aggregation in OF_LEVELS:
            continue
        why = "the plan has no charge for it"
        if priced_in is not None and priced_in != unit:
            why = f"the plan's price is per {priced_in or 'unit'}"
        elif priced_in is not None:
            why = f"levels have no {how or 'sum'}; declare `aggregation: integral`, `average`, `max` or `latest`"
        found.append(f"{samples:,} levels of meter {meter!r} (unit {unit!r}) are on no line: {why}")
    return tuple(found)
