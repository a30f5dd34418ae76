"""Increases that a file of meters takes: each is one account's, whatever files collectors have.

An account stands in a point's key, so that the same increase under another account is no duplicate to the database.
Whom the file bills for a source is nearly always the same for good. So a transaction with such increases does one thing
more, whatever their number: it shares a lock, and asks whether any source has got a second stream since the last time.
Whoever registers a second stream has that lock alone: all increases from before are committed then and can be seen, and
everybody who comes after knows that this source has several. Of such a source each increase is looked up in the other
streams, while its row is locked.

The order of locks is this module's, dictionaries, totals, points, levels; within each by key: none waits in a circle.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, NamedTuple
from uuid import UUID

from tallymark_collector.model import Point, Stream, Temporality
from tallymark_collector.store import locks, rows
from tallymark_collector.store.database import Connection

MAX_REMEMBERED: Final = 500_000
"""Streams, and sources with several, that a process remembers; at the limit it forgets all and asks the database."""

_LATEST_SQL: Final = "SELECT NULL::uuid, coalesce(max(later), 0) FROM usage_source_stream"

_NEWS_SQL: Final = "SELECT source, later FROM usage_source_stream WHERE later > %s"

_STREAMS_SQL: Final = "SELECT source, stream, later FROM usage_source_stream WHERE source = ANY (%s::uuid[])"

# All writers insert in one order, so that none waits for another that waits for it.
_FIRST_SQL: Final = """
INSERT INTO usage_source_stream (source, account, stream, tenant)
SELECT * FROM unnest(%s::uuid[], %s::text[], %s::uuid[], %s::text[]) ORDER BY 1
ON CONFLICT DO NOTHING
RETURNING source"""

_FURTHER_SQL: Final = """
INSERT INTO usage_source_stream (source, account, stream, tenant, later)
SELECT n.*, (SELECT coalesce(max(later), 0) FROM usage_source_stream) + row_number() OVER (ORDER BY n.source, n.stream)
FROM unnest(%s::uuid[], %s::text[], %s::uuid[], %s::text[]) AS n (source, account, stream, tenant)"""

_LOCK_SQL: Final = """
SELECT FROM usage_source_stream WHERE source = ANY (%s::uuid[]) AND later IS NULL ORDER BY source FOR NO KEY UPDATE"""

# The times between which they all are leave out other pieces of the table. Of several the one that came first.
_ELSEWHERE_SQL: Final = """
SELECT DISTINCT ON (n.position) n.position - 1, s.account, p.quantity
FROM unnest(%(sources)s::uuid[], %(streams)s::uuid[], %(times)s::timestamptz[], %(starts)s::timestamptz[],
            %(parts)s::bigint[])
     WITH ORDINALITY AS n (source, stream, time, start_time, part, position)
JOIN usage_source_stream s ON s.source = n.source AND s.stream <> n.stream
CROSS JOIN LATERAL (
    SELECT quantity, recorded_at FROM usage_point
    WHERE account = s.account AND time = n.time AND stream = s.stream AND start_time = n.start_time AND part = n.part
      AND time BETWEEN %(first)s AND %(last)s
    LIMIT 1
) p
ORDER BY n.position, p.recorded_at"""


class FurtherStreamError(Exception):
    """A source gets a further stream: the transaction has to begin again, with the lock alone."""


class Elsewhere(NamedTuple):
    """What an increase was billed as before, by another stream of its source."""

    account: str
    quantity: Decimal


@dataclass(slots=True)
class Known:
    """What a process knows to be committed."""

    streams: set[int] = field(default_factory=set)
    """Each by itself and its source."""
    several: set[UUID] = field(default_factory=set)
    """Sources with more than one stream: of those in `streams`, and all that became so after `base`."""
    base: int | None = None
    """`later` where this process began to know; what it learned before that it cannot keep."""
    seen: int = 0
    """`later` up to which `several` is complete."""


@dataclass(slots=True)
class Taken:
    """What a transaction found out."""

    several: Collection[UUID]
    """Those of its sources whose increases have to be looked up."""
    known: Known
    version: int
    streams: Collection[int]

    def remember(self) -> None:
        """The transaction is committed."""
        known = self.known
        if known.base is None or self.version < known.base:
            return  # what became several in between is not known
        if len(known.streams) + len(known.several) > MAX_REMEMBERED:
            known.streams.clear()
            known.several.clear()
            return
        known.streams.update(self.streams)


def of_sources(streams: Iterable[Stream]) -> list[Stream]:
    """Those whose increases belong to a source."""
    return [one for one in streams if one.source is not None and one.temporality is Temporality.DELTA]


async def take(connection: Connection, streams: Sequence[Stream], known: Known, *, alone: bool) -> Taken:
    """To be called first in a transaction that writes increases of these streams, all of `of_sources`. From here to its
    end nobody else adds increases to those of their sources that have several streams, and no source gets a further one
    but ours.

    Raises FurtherStreamError where it is not `alone`.
    """
    # Both are 128 bits of a hash, so what they make is one of the pair.
    wanted = {stream.id.int ^ _source(stream).int: stream for stream in streams}
    new = [stream for identity, stream in wanted.items() if identity not in known.streams]
    base = known.base
    async with connection.pipeline():
        await (locks.taken if alone else locks.shared)(connection, locks.SOURCES)
        # Its snapshot is taken when the lock is there.
        asked = await (connection.execute(_LATEST_SQL) if base is None else connection.execute(_NEWS_SQL, [known.seen]))
    version = known.seen
    for source, later in await asked.fetchall():
        version = max(version, later)
        if source is not None:
            known.several.add(source)
    if known.base is None:
        known.base = known.seen = version
    elif base is not None:
        known.seen = max(known.seen, version)
    further = await _register(connection, new, known, alone=alone) if new else set()
    several = {_source(stream) for stream in streams} & (known.several | further)
    if several and not alone:
        await connection.execute(_LOCK_SQL, [sorted(several)])
    return Taken(several, known, version, [*wanted])


async def _register(connection: Connection, new: Sequence[Stream], known: Known, *, alone: bool) -> set[UUID]:
    """Adds those streams that are not there. Returns the sources that have several by that."""
    found = await (await connection.execute(_STREAMS_SQL, [sorted({_source(one) for one in new})])).fetchall()
    there = {(source, stream) for source, stream, _ in found}
    known.several.update(source for source, _, later in found if later is not None)
    billed = {source for source, _, _ in found}
    firsts: dict[UUID, Stream] = {}
    further: list[Stream] = []
    for stream in new:
        source = _source(stream)
        if (source, stream.id) in there:
            continue
        if source in billed or source in firsts:
            further.append(stream)
        else:
            firsts[source] = stream
    if further and not alone:
        raise FurtherStreamError
    if firsts:
        added = set(await (await connection.execute(_FIRST_SQL, _columns(firsts.values()))).fetchall())
        raced = {source: one.id for source, one in firsts.items() if (source,) not in added}
        if raced:
            # Another collector's came first: the same stream, or another one of the source.
            others = await (await connection.execute(_STREAMS_SQL, [sorted(raced)])).fetchall()
            if raced.items() - {(source, stream) for source, stream, _ in others}:
                raise FurtherStreamError
    if further:
        await connection.execute(_FURTHER_SQL, _columns(further))
    return {_source(stream) for stream in further}


async def elsewhere(connection: Connection, points: Sequence[Point], several: Collection[UUID]) -> dict[int, Elsewhere]:
    """What each increase of a source with several streams was billed as before by another of them, or is by one before
    it among these, by its position."""
    positions = [
        place
        for place, point in enumerate(points)
        if point.stream.source is not None and point.stream.source.id in several
    ]
    if not positions:
        return {}
    ours = [points[position] for position in positions]
    times = [rows.timestamp(point.time_ns) for point in ours]
    arguments = {
        "sources": [_source(point.stream) for point in ours],
        "streams": [point.stream.id for point in ours],
        "times": times,
        "starts": [rows.timestamp(point.start_ns) for point in ours],
        "parts": [rows.part(point) for point in ours],
        "first": min(times),
        "last": max(times),
    }
    found = await (await connection.execute(_ELSEWHERE_SQL, arguments)).fetchall()
    there = {positions[place]: Elsewhere(account, quantity) for place, account, quantity in found}
    firsts: dict[tuple[UUID, int, int, int], Point] = {}
    for position, point in zip(positions, ours, strict=True):
        if position not in there:
            key = (_source(point.stream), point.start_ns, point.time_ns, point.cause)
            first = firsts.setdefault(key, point)
            if first.stream.id != point.stream.id:
                there[position] = Elsewhere(first.stream.series.account, first.value)
    return there


async def billed_to(connection: Connection, point: Point) -> str | None:
    """Whom an increase is billed to by another stream of its source; None where that is nobody."""
    found: Mapping[int, Elsewhere] = await elsewhere(connection, [point], {_source(point.stream)})
    return found[0].account if found else None


def _source(stream: Stream) -> UUID:
    assert stream.source is not None, "only streams of sources come here"
    return stream.source.id


def _columns(streams: Iterable[Stream]) -> list[list[object]]:
    found = list(streams)
    return [
        [_source(one) for one in found],
        [one.series.account for one in found],
        [one.id for one in found],
        [one.series.tenant for one in found],
    ]
