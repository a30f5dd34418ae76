"""What a database is and what it holds, quick at any size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

from tallymark_collector.store.database import Connection

EXACT_UP_TO: Final = 1_000_000
"""Rows that are counted; beyond them the planner's statistics have to do."""


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
    """What is stored, of all tenants."""

    points: Count
    oldest: datetime | None
    newest: datetime | None
    waiting: int
    """Account-hours that wait for a refresh."""
    quarantine: Mapping[str, int]
    """Open items by reason."""
    evidence: Count


# By account, because that is how the key of usage_point begins: two look-ups each, however many points there are.
_SPAN_SQL: Final = """
SELECT min(ends.oldest), max(ends.newest)
FROM (SELECT DISTINCT account FROM usage_series) a
CROSS JOIN LATERAL (
    SELECT min(p.time) AS oldest, max(p.time) AS newest FROM usage_point p WHERE p.account = a.account
) ends"""

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


async def contents(connection: Connection, exact_up_to: int = EXACT_UP_TO) -> Contents:
    """What a migrated database holds."""
    oldest, newest = await (await connection.execute(_SPAN_SQL)).fetchone() or (None, None)
    [waiting] = await (
        await connection.execute("SELECT count(*) FROM (SELECT DISTINCT account, tenant, bucket FROM usage_dirty) d")
    ).fetchone() or [0]
    quarantine = await (
        await connection.execute("SELECT reason, count(*) FROM usage_quarantine_open GROUP BY reason ORDER BY reason")
    ).fetchall()
    return Contents(
        points=await _count(connection, "usage_point", exact_up_to),
        oldest=oldest,
        newest=newest,
        waiting=waiting,
        quarantine=dict(quarantine),
        evidence=await _count(connection, "usage_evidence", exact_up_to),
    )


async def _count(connection: Connection, table: str, limit: int) -> Count:
    [rows] = await (
        await connection.execute(
            f"SELECT count(*) FROM (SELECT FROM {table} LIMIT %s) counted",  # noqa: S608 - a constant of ours
            [limit + 1],
        )
    ).fetchone() or [0]
    if rows <= limit:
        return Count(rows, exact=True)
    [estimate] = await (await connection.execute(_ESTIMATE_SQL, {"table": table})).fetchone() or [0]
    return Count(max(estimate, rows), exact=False)
