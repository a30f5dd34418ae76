"""What a database is and what it holds, quick at any size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

from tallymark_collector.model import Reason
from tallymark_collector.store.database import Connection

EXACT_UP_TO: Final = 1_000_000
"""Rows that are counted; beyond them the planner's statistics have to do."""


UNATTRIBUTED: Final = [Reason.ACCOUNT_MISSING.value, Reason.ATTRIBUTE_OVERFLOW.value]
"""Reasons of usage whose account is not known. How much it is, the payloads know: here the items are counted."""

# The SDK's spans are evidence of usage that its metrics hold.
_UNATTRIBUTED_SQL: Final = """
SELECT meter, count(*) FROM usage_quarantine_open
WHERE reason = ANY(%(reasons)s) AND (signal = 'metrics' OR metered)
  AND (%(tenant)s::text IS NULL OR tenant = %(tenant)s) AND (%(meter)s::text IS NULL OR meter = %(meter)s)
  AND (%(start)s::timestamptz IS NULL OR time IS NULL OR time >= %(start)s)
  AND (%(end)s::timestamptz IS NULL OR time IS NULL OR time < %(end)s)
GROUP BY meter ORDER BY count(*) DESC, meter"""


class Server(NamedTuple):
    """The PostgreSQL behind a connection."""

    version: str
    timescaledb_license: str | None
    """None where TimescaleDB is not there."""


class Count(NamedTuple):
    """Rows of a table, counted or estimated."""

    rows: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Contents:
    """What is stored, of all tenants or of one."""

    points: Count
    oldest: datetime | None
    newest: datetime | None
    waiting: int
    """Account-hours that wait for a refresh."""
    quarantine: Mapping[str, int]
    """Open items by reason."""
    unattributed: Mapping[str, int]
    """Open items of usage that names no account, by meter."""
    evidence: Count


# By account, because that is how the key of usage_point begins: two look-ups each, however many points there are.
_SPAN_SQL: Final = """
SELECT min(ends.oldest), max(ends.newest)
FROM (SELECT DISTINCT account FROM usage_series WHERE %(tenant)s::text IS NULL OR tenant = %(tenant)s) a
CROSS JOIN LATERAL (
    SELECT min(p.time) AS oldest, max(p.time) AS newest FROM usage_point p
    WHERE p.account = a.account AND (%(tenant)s::text IS NULL OR p.tenant = %(tenant)s)
) ends"""

# Of one tenant the hours know, which are fewer than the points.
_POINTS_SQL: Final = "SELECT coalesce(sum(points), 0)::bigint FROM usage_hour_current WHERE tenant = %s"

# A partitioned table's rows are in the tables that inherit from it.
_ESTIMATE_SQL: Final = """
SELECT coalesce(sum(greatest(reltuples, 0)), 0)::bigint FROM pg_class
WHERE oid = %(table)s::regclass OR oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = %(table)s::regclass)"""


async def server(connection: Connection) -> Server:
    """The server's version, and TimescaleDB's license where that is loaded."""
    row = await (
        await connection.execute(
            "SELECT current_setting('server_version'), nullif(current_setting('timescaledb.license', true), '')"
        )
    ).fetchone()
    return Server(*row or ("unknown", None))


async def contents(connection: Connection, tenant: str | None = None, exact_up_to: int = EXACT_UP_TO) -> Contents:
    """What a migrated database holds, or what it holds of one tenant."""
    whose = {"tenant": tenant}
    oldest, newest = await (await connection.execute(_SPAN_SQL, whose)).fetchone() or (None, None)
    [waiting] = await (
        await connection.execute(
            """SELECT count(*) FROM (
                   SELECT DISTINCT account, tenant, bucket FROM usage_dirty
                   WHERE %(tenant)s::text IS NULL OR tenant = %(tenant)s
               ) d""",
            whose,
        )
    ).fetchone() or [0]
    quarantine = await (
        await connection.execute(
            """SELECT reason, count(*) FROM usage_quarantine_open WHERE %(tenant)s::text IS NULL OR tenant = %(tenant)s
               GROUP BY reason ORDER BY reason""",
            whose,
        )
    ).fetchall()
    return Contents(
        points=await _points(connection, tenant, exact_up_to),
        oldest=oldest,
        newest=newest,
        waiting=waiting,
        quarantine=dict(quarantine),
        unattributed=await unattributed(connection, tenant),
        evidence=await _count(connection, "usage_evidence", exact_up_to, tenant),
    )


async def unattributed(
    connection: Connection,
    tenant: str | None = None,
    *,
    meter: str | None = None,
    start: datetime | None = None,
    end: datetime | None = None,
) -> dict[str, int]:
    """How many open items of each meter are usage that nobody is billed for until somebody names the account."""
    wanted = {"tenant": tenant, "meter": meter, "start": start, "end": end, "reasons": UNATTRIBUTED}
    return dict(await (await connection.execute(_UNATTRIBUTED_SQL, wanted)).fetchall())


async def _points(connection: Connection, tenant: str | None, limit: int) -> Count:
    if tenant is None:
        return await _count(connection, "usage_point", limit)
    [points] = await (await connection.execute(_POINTS_SQL, [tenant])).fetchone() or [0]
    return Count(points, exact=True)


async def _count(connection: Connection, table: str, limit: int, tenant: str | None = None) -> Count:
    [rows] = await (
        await connection.execute(
            f"""SELECT count(*) FROM (
                    SELECT FROM {table} WHERE %(tenant)s::text IS NULL OR tenant = %(tenant)s LIMIT %(most)s
                ) counted""",  # noqa: S608 - a constant of ours
            {"tenant": tenant, "most": None if tenant is not None else limit + 1},
        )
    ).fetchone() or [0]
    if tenant is not None or rows <= limit:
        return Count(rows, exact=True)
    [estimate] = await (await connection.execute(_ESTIMATE_SQL, {"table": table})).fetchone() or [0]
    return Count(max(estimate, rows), exact=False)
