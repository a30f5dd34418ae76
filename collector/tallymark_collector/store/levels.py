"""Levels: what gauges and UpDownCounters stood at. Never amounts, and so never among the points that are summed.

A level is identified by its stream and time. The same again is a duplicate, another value goes to quarantine, as with
points.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Final

from tallymark_collector.model import Point, Quarantined, Reason, Refusal
from tallymark_collector.store import rows, staging
from tallymark_collector.store.database import Connection
from tallymark_collector.store.samples import conflict

_KEYS: Final = (
    "unnest(%s::text[], %s::timestamptz[], %s::uuid[], %s::smallint[], %s::uuid[], %s::text[], %s::numeric[])"
    " WITH ORDINALITY AS n (account, time, stream, part, series, tenant, value, position)"
)

# All writers insert in one order, so that none waits for another that waits for it. Which of them were there already.
_INSERT_SQL: Final = f"""
WITH n AS MATERIALIZED (
    SELECT account, time, stream, part, series, tenant, value, position FROM {_KEYS}
), inserted AS (
    INSERT INTO usage_level (account, time, stream, part, series, tenant, value)
    SELECT account, time, stream, part, series, tenant, value FROM n
    ORDER BY account, time, stream, part
    ON CONFLICT DO NOTHING
    RETURNING account, time, stream, part
)
SELECT n.position - 1
FROM n LEFT JOIN inserted i USING (account, time, stream, part)
WHERE i.account IS NULL"""  # noqa: S608 - a constant of ours

# A statement of its own: it must see what others committed while the insertion waited for them.
_THERE_SQL: Final = f"""
SELECT n.position - 1, l.value
FROM {_KEYS}
JOIN usage_level l USING (account, time, stream, part)"""  # noqa: S608 - a constant of ours


def part(level: Point) -> int:
    """What timestamptz cannot hold of the level's time."""
    return level.time_ns % 1000


async def insert(connection: Connection, levels: Sequence[Point]) -> dict[int, Decimal]:
    """Adds levels, whoever's, in one statement. Their streams must be registered. Returns what stood there before for
    each that was not new, by its position; of several of one stream and time, the first counts."""
    if not levels:
        return {}
    keys = [(level.stream.series.account, level.time_ns, level.stream.id) for level in levels]
    found = staging.distinct(keys, range(len(levels)))
    firsts = [levels[position] for position in found.firsts]
    columns = [
        [level.stream.series.account for level in firsts],
        [rows.timestamp(level.time_ns) for level in firsts],
        [level.stream.id for level in firsts],
        [part(level) for level in firsts],
        [level.stream.series.id for level in firsts],
        [level.stream.series.tenant for level in firsts],
        [level.value for level in firsts],
    ]
    old = {place for (place,) in await (await connection.execute(_INSERT_SQL, columns)).fetchall()}
    known: dict[int, Decimal] = {}
    if old:
        there = await (await connection.execute(_THERE_SQL, columns)).fetchall()
        known = {place: value for place, value in there if place in old}
    return staging.already_there(found, known, [level.value for level in levels])


def contradiction(level: Point, there: Decimal) -> Quarantined:
    """A level of a time at which the stream stood at another one."""
    detail = f"the level at this time was {there} before and is {level.value} now"
    return conflict(level, Refusal(Reason.VALUE_CONFLICT, detail))
