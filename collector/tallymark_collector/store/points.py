"""Points into usage_point, with the marks of their hours, in the caller's transaction.

The fast way is COPY straight into the table. If a point is there already, that transaction is over: in another one the
same points go through a staging table, where the database tells new from old.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Final

from tallymark_collector.model import Point
from tallymark_collector.store import binary, rows, staging
from tallymark_collector.store.database import Connection

_CHUNK: Final = 2048
"""Rows handed to the connection at once: the server works on them while the next are put together."""

_COPY_SQL: Final = f"COPY usage_point ({rows.POINT_COLUMNS}) FROM STDIN (FORMAT binary)"

_MARK_SQL: Final = "COPY usage_dirty (bucket, account, tenant) FROM STDIN (FORMAT binary)"

_STAGE_SQL: Final = """
CREATE TEMPORARY TABLE IF NOT EXISTS staged_point (
    position int, account text, time timestamptz, stream uuid, start_time timestamptz, part bigint, series uuid,
    tenant text, quantity numeric
) ON COMMIT DELETE ROWS"""

_COPY_STAGED_SQL: Final = f"COPY staged_point (position, {rows.POINT_COLUMNS}) FROM STDIN (FORMAT binary)"

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


async def insert(
    connection: Connection, points: Sequence[Point], lines: Sequence[bytes], marks: Iterable[tuple[int, str, str]]
) -> None:
    """Inserts points that are all new. Raises psycopg.errors.UniqueViolation where one is not.

    `lines` are their rows, `marks` their hours since the Unix epoch with account and tenant.
    """
    if not points:
        return
    # All writers insert in one order, so that none waits for another that waits for it.
    await _copy(connection, _COPY_SQL, sorted(lines))
    await _copy(connection, _MARK_SQL, [rows.mark_row(*mark) for mark in sorted(marks)])


async def insert_new(connection: Connection, points: Sequence[Point], lines: Sequence[bytes]) -> dict[int, Decimal]:
    """Inserts those points that are new, and their marks. Returns the stored quantity for each that was not, by its
    position. Of several with one key, the first counts."""
    if not points:
        return {}
    keys = [rows.key(line) for line in lines]
    # The same order as above, and of equal keys that of their arrival. A row is staged with its place in `firsts`.
    found = staging.distinct(keys, sorted(range(len(keys)), key=keys.__getitem__))
    await connection.execute(_STAGE_SQL)
    staged = [rows.staged(place, lines[position]) for place, position in enumerate(found.firsts)]
    await _copy(connection, _COPY_STAGED_SQL, staged)
    old = [place for (place,) in await (await connection.execute(_UNSTAGE_SQL)).fetchall()]
    known = {place: points[found.firsts[place]].value for place in old}
    if old:
        # 1.0 says the same as a stored 1, but what repeats it is held against what is stored, to the letter.
        there = await (await connection.execute(_DIFFERENT_SQL, [bool(found.repeats)])).fetchall()
        known.update((place, quantity) for place, quantity in there if place in known)
    return staging.already_there(found, known, [point.value for point in points])


async def _copy(connection: Connection, statement: str, lines: Sequence[bytes]) -> None:
    async with connection.cursor() as cursor, cursor.copy(statement) as copy:
        await copy.write(binary.HEADER)
        for start in range(0, len(lines), _CHUNK):
            await copy.write(b"".join(lines[start : start + _CHUNK]))
        await copy.write(binary.TRAILER)
