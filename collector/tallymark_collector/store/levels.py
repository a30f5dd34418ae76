"""Levels: what gauges and UpDownCounters stood at. Never amounts, and so never among the points that are summed.

A level is identified by its stream and time. The same again is a duplicate, another value goes to quarantine, as with
points.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Final

from tallymark_collector.model import Point, Quarantined, Reason, Refusal
from tallymark_collector.store import rows
from tallymark_collector.store.database import Connection
from tallymark_collector.store.samples import conflict

# All writers insert in one order, so that none waits for another that waits for it.
_INSERT_SQL: Final = """
INSERT INTO usage_level (account, time, stream, part, series, tenant, value)
SELECT * FROM unnest(%s::text[], %s::timestamptz[], %s::uuid[], %s::smallint[], %s::uuid[], %s::text[], %s::numeric[])
ORDER BY 1, 2, 3, 4
ON CONFLICT DO NOTHING
RETURNING stream, (extract(epoch FROM time) * 1000000)::bigint * 1000 + part"""

_THERE_SQL: Final = """
SELECT n.position, l.value
FROM unnest(%s::text[], %s::timestamptz[], %s::uuid[], %s::smallint[])
     WITH ORDINALITY AS n (account, time, stream, part, position)
JOIN usage_level l USING (account, time, stream, part)"""


async def insert_new(connection: Connection, levels: Sequence[Point]) -> dict[int, Decimal]:
    """Adds those that are new. Of the others: by their position, the value that is stored. Their streams must be
    registered."""
    if not levels:
        return {}
    # Of several of one stream and time, the first that came is the one that may be new.
    firsts = {(level.stream.id, level.time_ns): position for position, level in reversed([*enumerate(levels)])}
    some = [levels[position] for position in firsts.values()]
    series = [level.stream.series for level in some]
    more = [[each.id for each in series], [each.tenant for each in series], [level.value for level in some]]
    added = await (await connection.execute(_INSERT_SQL, [*_keys(some), *more])).fetchall()
    new = {firsts[stream, time_ns] for stream, time_ns in added}
    others = [position for position in range(len(levels)) if position not in new]
    if not others:
        return {}
    there = await (await connection.execute(_THERE_SQL, _keys([levels[position] for position in others]))).fetchall()
    return {others[number - 1]: value for number, value in there}


def _keys(levels: Sequence[Point]) -> list[list[object]]:
    return [
        [level.stream.series.account for level in levels],
        [rows.timestamp(level.time_ns) for level in levels],
        [level.stream.id for level in levels],
        [level.time_ns % 1000 for level in levels],
    ]


def conflicting(level: Point, there: Decimal) -> Quarantined:
    """A level that is another than what is stored."""
    detail = f"the level at this time was {there} before and is {level.value} now"
    return conflict(level, Refusal(Reason.VALUE_CONFLICT, detail))
