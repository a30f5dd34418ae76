"""Levels: what gauges and UpDownCounters stood at. Never amounts, and so never among the points that are summed.

A level is identified by its stream and time; one that a file of meters took by its source and time, whoever is billed.
The same again is a duplicate, another value goes to quarantine, as with points.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Final
from uuid import UUID

from tallymark_collector.model import Point, Quarantined, Reason, Refusal, Stream
from tallymark_collector.processors.levels import Told, source_of, succeed
from tallymark_collector.store import rows, sources, staging
from tallymark_collector.store.database import Connection
from tallymark_collector.store.samples import conflict

_KEYS: Final = (
    "unnest(%s::text[], %s::timestamptz[], %s::uuid[], %s::smallint[], %s::uuid[], %s::text[], %s::numeric[],"
    " %s::uuid[], %s::numeric[]) WITH ORDINALITY"
    " AS n (account, time, stream, part, series, tenant, value, source, factor, position)"
)
_COLUMNS: Final = "account, time, stream, part, series, tenant, value, source, factor"

# All writers insert in one order, so that none waits for another that waits for it. Which of them were there already.
_INSERT_SQL: Final = f"""
WITH n AS MATERIALIZED (
    SELECT {_COLUMNS}, position FROM {_KEYS}
), inserted AS (
    INSERT INTO usage_level ({_COLUMNS})
    SELECT {_COLUMNS} FROM n
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

_ENDED: Final = -1001
"""`part` of a row that says that its stream, or source, has ended, less the time's nanoseconds: see the migration
`level_ends`."""

_TOLD: Final = (
    f"(extract(epoch FROM time) * 1000000)::bigint * 1000 + CASE WHEN part < 0 THEN {_ENDED} - part ELSE part END"
    f" AS time_ns, value, factor, account, stream, series, part <= {_ENDED} AS ended"
)

# Of each source: the levels between the neighbours of the incoming ones, the neighbours included. A row that says that
# it has ended has its part below all others of its time, and a level of that very time is the neighbour.
_KNOWN_SQL: Final = f"""
SELECT k.place - 1, l.*
FROM unnest(%s::uuid[], %s::timestamptz[], %s::smallint[], %s::timestamptz[], %s::smallint[])
     WITH ORDINALITY AS k (source, first, first_part, last, last_part, place)
CROSS JOIN LATERAL (
    (SELECT {_TOLD} FROM usage_level
     WHERE source = k.source AND (time, part) < (k.first, k.first_part) AND (part >= 0 OR time < k.first)
     ORDER BY time DESC, part DESC LIMIT 1)
    UNION ALL
    SELECT {_TOLD} FROM usage_level
    WHERE source = k.source AND time >= k.first AND (time, part) <= (k.last, k.last_part)
      AND (part < 0 OR (time, part) >= (k.first, k.first_part))
    UNION ALL
    (SELECT {_TOLD} FROM usage_level
     WHERE source = k.source AND (time, part) > (k.last, k.last_part)
     ORDER BY time, part < 0, part LIMIT 1)
) l
ORDER BY k.place, l.time_ns, l.ended DESC"""  # noqa: S608 - a constant of ours

_BILLED_SQL: Final = """
SELECT account FROM usage_level WHERE source = %s AND time = %s::timestamptz AND part >= 0 LIMIT 1"""

_Row = tuple[str, str, UUID, int, UUID, str, Decimal, UUID | None, Decimal | None]


@dataclass(slots=True)
class _Writing:
    """What is to be inserted, and which of the levels each row is."""

    rows: list[_Row] = field(default_factory=list)
    positions: list[int | None] = field(default_factory=list)
    """None for a row that ends a level: it is none that came."""

    def add(self, row: _Row, position: int | None = None) -> None:
        """A row, of the level at this position."""
        self.rows.append(row)
        self.positions.append(position)


def part(level: Point) -> int:
    """What timestamptz cannot hold of the level's time."""
    return level.time_ns % 1000


async def insert(connection: Connection, batches: Sequence[Sequence[Point]]) -> dict[int, Decimal]:
    """Adds levels, whoever's, one batch after the other. Their streams must be registered. Returns what stood there
    before for each that was not new, by its position among all of them; of several of one stream, or source, and time,
    the first counts."""
    levels = [level for batch in batches for level in batch]
    if not levels:
        return {}
    there: dict[int, Decimal] = {}
    writing = _Writing()
    for position, level in enumerate(levels):
        if level.stream.source is None and level.is_end:
            writing.add(_ended(Told(level.time_ns, level.value, Decimal(1), level.stream, ended=True)))
        elif level.stream.source is None:
            writing.add(_row(level.stream, level.time_ns, level.value), position)
    await _succeed(connection, batches, writing, there)
    keys = [row[:4] for row in writing.rows]
    found = staging.distinct(keys, range(len(keys)))
    columns = [list(column) for column in zip(*(writing.rows[place] for place in found.firsts), strict=True)]
    known: dict[int, Decimal] = {}
    if columns:
        old = {place for (place,) in await (await connection.execute(_INSERT_SQL, columns)).fetchall()}
        if old:
            rows_there = await (await connection.execute(_THERE_SQL, columns)).fetchall()
            known = {place: value for place, value in rows_there if place in old}
    already = staging.already_there(found, known, [row[6] for row in writing.rows])
    for place, value in already.items():
        if (came := writing.positions[place]) is not None:
            there[came] = value
    return there


async def _succeed(
    connection: Connection, batches: Sequence[Sequence[Point]], writing: _Writing, there: dict[int, Decimal]
) -> None:
    """Puts the levels that a file of meters took where they belong, with the rows that end others. From here to the end
    of the transaction nobody else adds to their sources."""
    by_source: dict[UUID, list[Point]] = defaultdict(list)
    for batch in batches:
        for level in batch:
            if level.stream.source is not None:
                by_source[level.stream.source.id].append(level)
    timelines = await _known(connection, by_source)
    first = 0
    for batch in batches:
        incoming: dict[UUID, list[tuple[int, Point]]] = defaultdict(list)
        for position, level in enumerate(batch, first):
            if level.stream.source is not None:
                incoming[level.stream.source.id].append((position, level))
        first += len(batch)
        for source, several in incoming.items():
            found = succeed(timelines[source], several)
            there |= found.there
            for position, told in found.told.items():
                writing.add(_row(told.stream, told.time_ns, told.value, source, told.factor), position)
            for ended in found.ended:
                writing.add(_ended(ended, source))
            for end in found.ends:
                writing.add(_end(end.stream, end.time_ns))


async def _known(connection: Connection, by_source: Mapping[UUID, Sequence[Point]]) -> dict[UUID, list[Told]]:
    found: dict[UUID, list[Told]] = {source: [] for source in by_source}
    if not by_source:
        return found
    await sources.lock(connection, {source: levels[0] for source, levels in by_source.items()})
    keys = list(by_source)
    first = [min(level.time_ns for level in levels) for levels in by_source.values()]
    last = [max(level.time_ns for level in levels) for levels in by_source.values()]
    arguments: list[list[object]] = [[*keys]]
    for times in (first, last):
        arguments += [[rows.timestamp(time_ns) for time_ns in times], [time_ns % 1000 for time_ns in times]]
    streams: dict[tuple[str, UUID, UUID], Stream] = {}
    for place, time_ns, value, factor, account, stream, series, ended in await (
        await connection.execute(_KNOWN_SQL, arguments)
    ).fetchall():
        billed_as = streams.get((account, stream, series))
        if billed_as is None:
            like = by_source[keys[place]][0].stream
            billed_as = replace(like, id=stream, series=like.series.stored(account, series))
            streams[account, stream, series] = billed_as
        timeline = found[keys[place]]
        if timeline and timeline[-1].ended and timeline[-1].time_ns == time_ns:
            del timeline[-1]  # a level of that very time counts instead
        timeline.append(Told(time_ns, value, factor, billed_as, ended))
    return found


def _row(
    stream: Stream, time_ns: int, value: Decimal, source: UUID | None = None, factor: Decimal | None = None
) -> _Row:
    series = stream.series
    return (
        series.account,
        rows.timestamp(time_ns),
        stream.id,
        time_ns % 1000,
        series.id,
        series.tenant,
        value,
        source,
        factor,
    )


def _end(stream: Stream, time_ns: int) -> _Row:
    """The row that ends a level: see the migration `level_sources`."""
    account, time, identity, nanoseconds, *rest = _row(stream, time_ns, Decimal(0))
    return (account, time, identity, -1 - nanoseconds, *rest)  # type: ignore[return-value]


def _ended(told: Told, source: UUID | None = None) -> _Row:
    """The row of a stream that has ended: see the migration `level_ends`."""
    factor = None if source is None else told.factor
    account, time, identity, nanoseconds, *rest = _row(told.stream, told.time_ns, told.value, source, factor)
    return (account, time, identity, _ENDED - nanoseconds, *rest)  # type: ignore[return-value]


async def billed_to(connection: Connection, level: Point) -> str | None:
    """Whom a level of this one's source and time was billed to; None where there is none. Nobody else adds to the
    source from here on."""
    source = source_of(level).id
    await sources.lock(connection, {source: level})
    found = await (await connection.execute(_BILLED_SQL, [source, rows.timestamp(level.time_ns)])).fetchone()
    return None if found is None else found[0]


def contradiction(level: Point, there: Decimal) -> Quarantined:
    """A level of a time at which the stream stood at another one."""
    detail = f"the level at this time was {there:f} before and is {level.value:f} now"
    return conflict(level, Refusal(Reason.VALUE_CONFLICT, detail))
