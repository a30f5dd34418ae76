"""Points into usage_point, with the marks of their hours, in the caller's transaction or one of their own.

The way is COPY straight into the table, of points that are new. Those that may be there already are looked up before.
If one is there that was taken for new, that transaction is over. Where that happens again and again, the points go
through a staging table, where the database tells new from old and waits for whoever inserts the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Final

from tallymark_collector.model import Point
from tallymark_collector.store import rows, staging
from tallymark_collector.store.copying import Copy, copy
from tallymark_collector.store.database import Connection

_COPY_SQL: Final = f"COPY usage_point ({rows.POINT_COLUMNS}) FROM STDIN (FORMAT binary)"

_MARK_SQL: Final = "COPY usage_dirty (bucket, account, tenant) FROM STDIN (FORMAT binary)"

_STAGE_KEYS_SQL: Final = """
CREATE TEMPORARY TABLE IF NOT EXISTS staged_key (
    position int, account text, time timestamptz, stream uuid, start_time timestamptz, part bigint
) ON COMMIT DELETE ROWS;
COPY staged_key (position, account, time, stream, start_time, part) FROM STDIN (FORMAT binary)"""

# LIMIT has each key looked up by the index, whatever the statistics say of a table that has just been filled. The
# times between which they all are leave out other pieces of the table.
_THERE_SQL: Final = """
SELECT k.position, p.quantity
FROM staged_key k
CROSS JOIN LATERAL (
    SELECT quantity FROM usage_point
    WHERE account = k.account AND time = k.time AND stream = k.stream AND start_time = k.start_time AND part = k.part
      AND time BETWEEN %s AND %s
    LIMIT 1
) p"""

_STAGE_SQL: Final = f"""
CREATE TEMPORARY TABLE IF NOT EXISTS staged_point (
    position int, account text, time timestamptz, stream uuid, start_time timestamptz, part bigint, series uuid,
    tenant text, quantity numeric
) ON COMMIT DELETE ROWS;
COPY staged_point (position, {rows.POINT_COLUMNS}) FROM STDIN (FORMAT binary)"""

# Which of them were there already.
_UNSTAGE_SQL: Final = f"""
WITH inserted AS (
    INSERT INTO usage_point ({rows.POINT_COLUMNS})
    SELECT {rows.POINT_COLUMNS} FROM staged_point ORDER BY position
    ON CONFLICT DO NOTHING
    RETURNING account, time, stream, start_time, part, tenant
), marked AS (
    INSERT INTO usage_dirty (bucket, account, tenant)
    SELECT DISTINCT date_bin('1 hour', time, 'epoch'), account, tenant FROM inserted
)
SELECT s.position
FROM staged_point s LEFT JOIN inserted i USING (account, time, stream, start_time, part)
WHERE i.account IS NULL"""  # noqa: S608 - a constant of ours

# A statement of its own: it must see what others committed while the insertion waited for them.
_DIFFERENT_SQL: Final = """
SELECT s.position, p.quantity
FROM staged_point s
JOIN usage_point p USING (account, time, stream, start_time, part)
WHERE %s OR p.quantity <> s.quantity"""


async def insert(connection: Connection, lines: Sequence[bytes], marks: set[bytes]) -> None:
    """Inserts points that are all new, and their marks, with one message: a transaction of its own where none is under
    way. Raises psycopg.errors.UniqueViolation where one is not new, or two are one.

    `lines` are their rows, `marks` those of their hours.
    """
    if not lines:
        return
    # All writers insert in one order, so that none waits for another that waits for it.
    await copy(connection, Copy(_COPY_SQL, sorted(lines)), Copy(_MARK_SQL, sorted(marks)))


async def there(
    connection: Connection, points: Sequence[Point], lines: Sequence[bytes], late: Sequence[int], close: Sequence[int]
) -> dict[int, Decimal]:
    """The quantity that was stored before, for each of some points that is there already or repeats another one, by its
    position. Of several with one key, the first is the one that may become a row.

    `late` are positions of those that are looked up, `close` of those that are held against each other only.
    """
    keys = {position: rows.key(lines[position]) for positions in (late, close) for position in positions}
    found = staging.distinct(keys, sorted(keys))
    # Late ones and close ones have no key in common, so what is the first of late ones is a late one.
    looked_up = set(late)
    staged = sorted((keys[position], place) for place, position in enumerate(found.firsts) if position in looked_up)
    known: dict[int, Decimal] = {}
    if staged:
        times = [points[position].time_ns for position in late]
        await copy(connection, Copy(_STAGE_KEYS_SQL, [rows.staged_key(place, key) for key, place in staged]))
        within = [rows.timestamp(min(times)), rows.timestamp(max(times))]
        known = dict(await (await connection.execute(_THERE_SQL, within)).fetchall())
    return staging.already_there(found, known, [point.value for point in points])


async def insert_new(connection: Connection, points: Sequence[Point], lines: Sequence[bytes]) -> dict[int, Decimal]:
    """Inserts those points that are new, and their marks. Returns the stored quantity for each that was not, by its
    position. Of several with one key, the first counts."""
    if not points:
        return {}
    keys = [rows.key(line) for line in lines]
    # The same order as above, and of equal keys that of their arrival. A row is staged with its place in `firsts`.
    found = staging.distinct(keys, sorted(range(len(keys)), key=keys.__getitem__))
    staged = [rows.staged(place, lines[position]) for place, position in enumerate(found.firsts)]
    await copy(connection, Copy(_STAGE_SQL, staged))
    old = [place for (place,) in await (await connection.execute(_UNSTAGE_SQL)).fetchall()]
    known = {place: points[found.firsts[place]].value for place in old}
    if old:
        # 1.0 says the same as a stored 1, but what repeats it is held against what is stored, to the letter.
        there = await (await connection.execute(_DIFFERENT_SQL, [bool(found.repeats)])).fetchall()
        known.update((place, quantity) for place, quantity in there if place in known)
    return staging.already_there(found, known, [point.value for point in points])
