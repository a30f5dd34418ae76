"""Totals that a file of meters takes: kept by their source, each with how the increase that ends in it is billed.

Whoever holds the row of a source decides what its totals mean, whomever the file bills for them: collectors with
different files take turns, and see each other's totals. So it is with levels (`store.levels`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeAlias
from uuid import UUID

from tallymark_collector.model import Point, Source, Stream
from tallymark_collector.processors.temporality import Billing, Sample
from tallymark_collector.store.database import Connection

_REGISTER_SQL: Final = """
INSERT INTO usage_source (source, tenant)
SELECT * FROM unnest(%s::uuid[], %s::text[]) ORDER BY 1
ON CONFLICT DO NOTHING"""

_LOCK_SQL: Final = """
SELECT FROM usage_source WHERE source = ANY (%s::uuid[]) ORDER BY source FOR NO KEY UPDATE"""

_COLUMNS: Final = "time_ns, value, account, stream, series, factor, since_ns"

# Of each epoch: the totals between the neighbours of the incoming ones, the neighbours included.
_KNOWN_SQL: Final = f"""
SELECT k.epoch - 1, s.*
FROM unnest(%s::uuid[], %s::bigint[], %s::bigint[], %s::bigint[])
     WITH ORDINALITY AS k (source, start_ns, first_ns, last_ns, epoch)
CROSS JOIN LATERAL (
    (SELECT {_COLUMNS} FROM usage_sample
     WHERE source = k.source AND start_ns = k.start_ns AND time_ns < k.first_ns
     ORDER BY time_ns DESC LIMIT 1)
    UNION ALL
    SELECT {_COLUMNS} FROM usage_sample
    WHERE source = k.source AND start_ns = k.start_ns AND time_ns BETWEEN k.first_ns AND k.last_ns
    UNION ALL
    (SELECT {_COLUMNS} FROM usage_sample
     WHERE source = k.source AND start_ns = k.start_ns AND time_ns > k.last_ns
     ORDER BY time_ns LIMIT 1)
) s
ORDER BY k.epoch, s.time_ns"""  # noqa: S608 - a constant of ours

# What an earlier version kept by account: the last total of the epoch. It had put epochs from before `since` into one
# without a start, of which those that came after this one had begun are its own.
_EARLIER_SQL: Final = """
SELECT k.epoch - 1, s.time_ns, s.value
FROM unnest(%s::text[], %s::uuid[], %s::bigint[], %s::uuid[])
     WITH ORDINALITY AS k (account, stream, start_ns, earlier, epoch)
CROSS JOIN LATERAL (
    SELECT time_ns, value FROM (
        (SELECT time_ns, value FROM usage_sample
         WHERE account = k.account AND stream = k.stream AND start_ns = k.start_ns AND source IS NULL
         ORDER BY time_ns DESC LIMIT 1)
        UNION ALL
        (SELECT time_ns, value FROM usage_sample
         WHERE account = k.account AND stream = k.earlier AND start_ns = 0 AND time_ns >= k.start_ns
           AND source IS NULL
         ORDER BY time_ns DESC LIMIT 1)
    ) either
    ORDER BY time_ns DESC LIMIT 1
) s"""

_REMEMBER_SQL: Final = """
INSERT INTO usage_sample (account, stream, start_ns, time_ns, value, source, series, factor, since_ns)
SELECT * FROM unnest(%s::text[], %s::uuid[], %s::bigint[], %s::bigint[], %s::numeric[], %s::uuid[], %s::uuid[],
                     %s::numeric[], %s::bigint[])"""

_NEXT_SQL: Final = """
SELECT account FROM usage_sample
WHERE source = %s AND start_ns = %s AND time_ns >= %s AND series IS NOT NULL
ORDER BY time_ns LIMIT 1"""

Epoch: TypeAlias = tuple[UUID, int]
"""A source and a start."""


async def known(connection: Connection, epochs: Mapping[Epoch, Sequence[Point]]) -> dict[Epoch, list[Sample]]:
    """The totals that matter for incoming ones, ascending. From here to the end of the transaction nobody else adds to
    these sources."""
    if not epochs:
        return {}
    keys = list(epochs)
    await lock(connection, {source: points[0] for (source, _), points in epochs.items()})
    first = [min(point.time_ns for point in points) for points in epochs.values()]
    last = [max(point.time_ns for point in points) for points in epochs.values()]
    columns = [[source for source, _ in keys], [start_ns for _, start_ns in keys], first, last]
    found: dict[Epoch, list[Sample]] = {key: [] for key in keys}
    streams: dict[tuple[str, UUID, UUID], Stream] = {}
    for points in epochs.values():
        for point in points:
            series = point.stream.series
            streams.setdefault((series.account, point.stream.id, series.id), point.stream)
    for place, time_ns, value, account, stream, series_id, factor, since_ns in await (
        await connection.execute(_KNOWN_SQL, columns)
    ).fetchall():
        billed_as = None
        if series_id is not None:
            like = epochs[keys[place]][0].stream
            billed_as = streams.get((account, stream, series_id))
            if billed_as is None:
                billed_as = replace(like, id=stream, series=like.series.stored(account, series_id))
                streams[account, stream, series_id] = billed_as
        found[keys[place]].append(Sample(time_ns, value, Billing(billed_as, factor, since_ns)))
    await _take_over(connection, {key: epochs[key][0] for key, samples in found.items() if not samples}, found)
    return found


async def lock(connection: Connection, sources: Mapping[UUID, Point]) -> None:
    """Registers sources, each with a point of it, and keeps all others from adding to them to the end of the
    transaction."""
    tenants = [point.stream.series.tenant for point in sources.values()]
    await connection.execute(_REGISTER_SQL, [[*sources], tenants])
    await connection.execute(_LOCK_SQL, [[*sources]])


async def _take_over(connection: Connection, epochs: Mapping[Epoch, Point], found: dict[Epoch, list[Sample]]) -> None:
    """Where a source is new, counting goes on from the last total that an earlier version kept for the same account."""
    if not epochs:
        return
    keys = list(epochs)
    streams = [epochs[key].stream for key in keys]
    columns = [
        [stream.series.account for stream in streams],
        [stream.id for stream in streams],
        [start_ns for _, start_ns in keys],
        [_source(stream).earlier for stream in streams],
    ]
    rows = []
    for place, time_ns, value in await (await connection.execute(_EARLIER_SQL, columns)).fetchall():
        source = _source(streams[place])
        base = Sample(time_ns, value, Billing(None, source.factor, source.since_ns))
        found[keys[place]].append(base)
        rows.append(row(keys[place], base))
    await remember(connection, rows)


def row(epoch: Epoch, sample: Sample) -> tuple[object, ...]:
    """A total as it is remembered."""
    source, start_ns = epoch
    assert sample.billing is not None, "a total of a source says how it is billed"
    stream, factor, since_ns = sample.billing
    whom: tuple[str, UUID] = ("", source) if stream is None else (stream.series.account, stream.id)
    series = None if stream is None else stream.series.id
    return (*whom, start_ns, sample.time_ns, sample.value, source, series, factor, since_ns)


async def remember(connection: Connection, rows: Sequence[tuple[object, ...]]) -> None:
    """Adds totals to those that are known."""
    if rows:
        await connection.execute(_REMEMBER_SQL, [list(column) for column in zip(*rows, strict=True)])


async def billed_to(connection: Connection, point: Point) -> str | None:
    """Whom the time of a total is billed to already, by a total of its source at that time or later; None where it is
    billed to nobody. Nobody else adds to the source from here on."""
    source = _source(point.stream)
    await lock(connection, {source.id: point})
    found = await (await connection.execute(_NEXT_SQL, [source.id, point.start_ns, point.time_ns])).fetchone()
    return None if found is None else found[0]


def _source(stream: Stream) -> Source:
    assert stream.source is not None, "only totals of sources come here"
    return stream.source
