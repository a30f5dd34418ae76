"""What an account used in a period, as its plan bills it: the quantities of an invoice's lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeAlias

from tallymark_collector.billing.aggregated import aggregated, levels_beside, quantity_of, remark
from tallymark_collector.billing.errors import BillingError
from tallymark_collector.billing.periods import Period
from tallymark_collector.billing.plans import Plan
from tallymark_collector.store.database import Connection
from tallymark_collector.store.keeping import dropped_before

Key: TypeAlias = tuple[str, str]
"""Meter and unit, the unit as it is metered."""


@dataclass(frozen=True, slots=True)
class Metered:
    """Of each meter and unit that was used."""

    quantities: Mapping[Key, Decimal]
    points: Mapping[Key, int]
    """How many points or levels are behind the quantity."""
    remarks: tuple[str, ...] = ()


async def metered(connection: Connection, tenant: str, account: str, period: Period, plan: Plan) -> Metered:
    """What is stored now of a period that is written down. Raises BillingError where a quantity cannot be told."""
    await _check_kept(connection, period)
    quantities, points = await _summed(connection, tenant, account, period)
    found = await aggregated(connection, tenant, account, period.start, period.end, plan.aggregations)
    billed = [each for each in found if plan.units[each.meter] == each.unit]
    for each in billed:
        quantities[each.meter, each.unit] = quantity_of(each)
        points[each.meter, each.unit] = each.points
    remarks = tuple(filter(None, map(remark, billed)))
    remarks += await levels_beside(connection, tenant, account, period.start, period.end, plan)
    return Metered(quantities, points, remarks)


async def _check_kept(connection: Connection, period: Period) -> None:
    """The pieces of hours at a period's edges are summed from points. Raises BillingError where those are gone."""
    edges = [edge for edge in (period.start, period.end) if edge.minute or edge.second or edge.microsecond]
    dropped = await dropped_before(connection, edges)
    if dropped is not None:
        raise BillingError(
            f"the period from {period.start.isoformat()} to {period.end.isoformat()} begins or ends inside an hour of"
            f" UTC, and points before {dropped.isoformat()} have been dropped: its invoice would be too small. Use the"
            " one that was made while they were kept"
        )


async def _summed(
    connection: Connection, tenant: str, account: str, period: Period
) -> tuple[dict[Key, Decimal], dict[Key, int]]:
    rows = await (
        await connection.execute(
            """SELECT meter, unit, quantity, points FROM usage_by_period
               WHERE tenant = %s AND account = %s AND period_start = %s AND period_end = %s""",
            [tenant, account, period.start, period.end],
        )
    ).fetchall()
    return {(row[0], row[1]): row[2] for row in rows}, {(row[0], row[1]): row[3] for row in rows}
