"""Usage as plans bill it: sums of what is summed, and beside them what is billed by another aggregation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Final

from tallymark_collector.billing.aggregated import Aggregated, aggregated, in_force, remark
from tallymark_collector.errors import UserError
from tallymark_collector.query.pages import Page
from tallymark_collector.query.usage import Usage, usage
from tallymark_collector.settings import SETTLED
from tallymark_collector.store.database import Connection

_GROUPS: Final = frozenset({"account", "meter", "unit"})
"""What can be told apart where quantities are not sums."""
_FIRST: Final = datetime(1, 1, 2, tzinfo=timezone.utc)
_LAST: Final = datetime(9999, 12, 31, tzinfo=timezone.utc)


@dataclass(frozen=True, slots=True)
class Billed:
    """Rows of usage. Where any meter is billed by something else than a sum there is a column `aggregation`."""

    usage: Usage
    remarks: tuple[str, ...] = ()
    """What is left out, cannot be told, or should be known beside it."""


async def usage_as_billed(
    connection: Connection,
    *,
    tenant: str,
    by: Sequence[str] = ("account", "meter"),
    start: datetime | None = None,
    end: datetime | None = None,
    account: str | None = None,
    meter: str | None = None,
    as_of: datetime | None = None,
    settled: timedelta = SETTLED,
    page: Page | None = None,
) -> Billed:
    """Usage of `[start, end)` as `query.usage.usage` has it, and each meter by its aggregation in the plans in force.

    What is no sum can be grouped by account, meter and unit alone: with other dimensions, and over several accounts, it
    is left out and named. Its quantity is None where it cannot be told. `as_of`: what was recorded until then, of sums
    alone. `page`: that part of the sums; what is no sum comes with the first, of one account alone. Raises UserError as
    `usage` does, and where `meter` is such a meter and would be left out.
    """
    sums = await usage(
        connection,
        tenant=tenant,
        by=by,
        start=start,
        end=end,
        account=account,
        meter=meter,
        as_of=as_of,
        settled=settled,
        page=page,
    )
    declared = await in_force(connection, tenant)
    if not declared:
        return Billed(sums)
    where = sums.columns.index("meter")
    position = len(sums.columns) - 2
    columns = (*sums.columns[:position], "aggregation", *sums.columns[position:])
    rows = [(*row[:position], "sum", *row[position:]) for row in sums.rows if row[where] not in declared]
    wanted = {name: how for name, how in declared.items() if meter in (None, name)}
    grouped = not {*sums.columns[:position]} <= _GROUPS or ("account" not in sums.columns and account is None)
    later = page is not None and page.after is not None
    if grouped or as_of is not None or (page is not None and account is None):
        left_out = [] if later else await _known(connection, tenant, account, wanted)
        why = "quantities that are no sums can only be grouped by account, meter and unit"
        if not grouped:
            why = "only sums can be asked for as of a moment of the past"
            if as_of is None:
                why = "quantities that are no sums can only be asked for of one account, page by page"
        if meter in left_out:
            raise UserError(f"the meter {meter!r} is billed by its {declared[meter]}: {why}")
        remarks = (f"left out: {', '.join(left_out)}: {why}",) if left_out else ()
        return Billed(Usage(columns, rows, sums.last), remarks)
    if later:
        return Billed(Usage(columns, rows, sums.last))
    found = await aggregated(connection, tenant, account, start or _FIRST, end or _LAST, wanted)
    rows += [tuple(_cells(each)[column] for column in columns) for each in found]
    keys = [columns.index(name) for name in sums.columns[:position]]
    rows.sort(key=lambda row: [str(row[key]) for key in keys])
    return Billed(Usage(columns, rows, sums.last), tuple(filter(None, map(_remark, found))))


async def _known(connection: Connection, tenant: str, account: str | None, meters: Iterable[str]) -> list[str]:
    """Those of the meters that were ever used: what stands at a level is in no sum."""
    rows = await connection.execute(
        """SELECT m.meter FROM unnest(%(meters)s::text[]) AS m (meter)
           WHERE EXISTS (SELECT FROM usage_series s WHERE s.tenant = %(tenant)s AND s.meter = m.meter
                         AND (%(account)s::text IS NULL OR s.account = %(account)s))
           ORDER BY m.meter""",
        {"meters": [*meters], "tenant": tenant, "account": account},
    )
    return [meter for (meter,) in await rows.fetchall()]


def _cells(found: Aggregated) -> dict[str, object]:
    return {
        "account": found.account,
        "meter": found.meter,
        "unit": found.how.unit(found.unit),
        "aggregation": str(found.how),
        "quantity": found.quantity,
        "points": found.points,
    }


def _remark(found: Aggregated) -> str | None:
    if found.problem is not None:
        return f"account {found.account!r}: no {found.how} of meter {found.meter!r}: {found.problem}"
    text = remark(found)
    return None if text is None else f"account {found.account!r}: {text}"
