"""Levels: what gauges and UpDownCounters stood at. Never amounts, and so never among the points that are summed.

A level is identified by its stream and time. The same again is a duplicate, another value goes to quarantine, as with
points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from tallymark_collector.model import Point, Quarantined, Reason, Refusal
from tallymark_collector.store import rows
from tallymark_collector.store.database import Connection
from tallymark_collector.store.samples import conflict

# All writers insert in one order, so that none waits for another that waits for it.
_INSERT_SQL: Final = """
INSERT INTO usage_level (account, time, stream, part, series, tenant, value)
SELECT * FROM unnest(%s::text[], %s::timestamptz[], %s::uuid[], %s::smallint[], %s::uuid[], %s::text[], %s::numeric[])
ORDER BY 1, 2, 3, 4
ON CONFLICT DO NOTHING"""

# After the insertion each of them is in the table: with its own value, or with another's.
_DIFFERENT_SQL: Final = """
SELECT n.position, l.value
FROM unnest(%s::text[], %s::timestamptz[], %s::uuid[], %s::smallint[], %s::numeric[])
     WITH ORDINALITY AS n (account, time, stream, part, value, position)
JOIN usage_level l USING (account, time, stream, part)
WHERE l.value <> n.value
ORDER BY n.position"""


class Told(NamedTuple):
    """What became of levels."""

    inserted: int
    duplicates: int
    conflicts: list[Quarantined]


async def insert(connection: Connection, levels: Sequence[Point]) -> Told:
    """Adds levels. Their streams must be registered."""
    if not levels:
        return Told(0, 0, [])
    keys = [
        [level.stream.series.account for level in levels],
        [rows.timestamp(level.time_ns) for level in levels],
        [level.stream.id for level in levels],
        [level.time_ns % 1000 for level in levels],
    ]
    values = [level.value for level in levels]
    series = [level.stream.series for level in levels]
    more = [[each.id for each in series], [each.tenant for each in series], values]
    inserted = (await connection.execute(_INSERT_SQL, [*keys, *more])).rowcount
    different = []
    if inserted < len(levels):
        different = await (await connection.execute(_DIFFERENT_SQL, [*keys, values])).fetchall()
    conflicts = []
    for position, there in different:
        level = levels[position - 1]
        detail = f"the level at this time was {there} before and is {level.value} now"
        conflicts.append(conflict(level, Refusal(Reason.VALUE_CONFLICT, detail)))
    return Told(inserted, len(levels) - inserted - len(conflicts), conflicts)
