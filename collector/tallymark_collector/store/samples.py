"""Cumulative streams: totals in, increases out, one transaction at a time per stream."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple
from uuid import UUID

from tallymark_collector import wire
from tallymark_collector.model import Point, Quarantined, Refusal
from tallymark_collector.processors.temporality import Increases, Sample, increases
from tallymark_collector.store import sources
from tallymark_collector.store.database import Connection

# Whoever holds a stream's row decides what its samples mean; several collectors take turns.
_LOCK_SQL: Final = """
SELECT FROM usage_stream
WHERE (account, stream) IN (SELECT * FROM unnest(%s::text[], %s::uuid[]))
ORDER BY account, stream
FOR NO KEY UPDATE"""

# Of each epoch: the samples between the neighbours of the incoming ones, the neighbours included.
_KNOWN_SQL: Final = """
SELECT k.epoch, s.time_ns, s.value
FROM unnest(%s::text[], %s::uuid[], %s::bigint[], %s::bigint[], %s::bigint[])
     WITH ORDINALITY AS k (account, stream, start_ns, first_ns, last_ns, epoch)
CROSS JOIN LATERAL (
    (SELECT time_ns, value FROM usage_sample
     WHERE account = k.account AND stream = k.stream AND start_ns = k.start_ns AND time_ns < k.first_ns
     ORDER BY time_ns DESC LIMIT 1)
    UNION ALL
    SELECT time_ns, value FROM usage_sample
    WHERE account = k.account AND stream = k.stream AND start_ns = k.start_ns
      AND time_ns BETWEEN k.first_ns AND k.last_ns
    UNION ALL
    (SELECT time_ns, value FROM usage_sample
     WHERE account = k.account AND stream = k.stream AND start_ns = k.start_ns AND time_ns > k.last_ns
     ORDER BY time_ns LIMIT 1)
) s
ORDER BY k.epoch, s.time_ns"""

_REMEMBER_SQL: Final = """
INSERT INTO usage_sample (account, stream, start_ns, time_ns, value)
SELECT * FROM unnest(%s::text[], %s::uuid[], %s::bigint[], %s::bigint[], %s::numeric[])"""


class _Epoch(NamedTuple):
    account: str
    """"" where the totals belong to a source, which is billed to whom the file says."""
    stream: UUID
    """Or the source."""
    start_ns: int


class Applied(NamedTuple):
    """What cumulative points came to."""

    points: list[Point]
    """Increases and corrections, to be written like delta points."""
    duplicates: int
    conflicts: list[Quarantined]


async def apply(connection: Connection, batches: Sequence[Sequence[Point]]) -> list[Applied]:
    """Takes increases from totals and remembers the totals, one batch after the other; returns what came of each. The
    streams must be registered."""
    epochs = _by_epoch(point for points in batches for point in points)
    if not epochs:
        return [Applied([], 0, []) for _ in batches]
    known = await _known(connection, {key: found for key, found in epochs.items() if key.account})
    metered = {(key.stream, key.start_ns): found for key, found in epochs.items() if not key.account}
    for (source, start_ns), samples in (await sources.known(connection, metered)).items():
        known[_Epoch("", source, start_ns)] = samples
    remembered: list[tuple[object, ...]] = []
    of_sources: list[tuple[object, ...]] = []
    applied = []
    for points in batches:
        found = Applied([], 0, [])
        duplicates = 0
        for epoch, incoming in _by_epoch(points).items():
            result: Increases = increases(epoch.start_ns, known[epoch], incoming)
            found.points.extend(result.points)
            duplicates += result.duplicates
            found.conflicts.extend(conflict(point, refusal) for point, refusal in result.refused)
            if epoch.account:
                remembered.extend((*epoch, sample.time_ns, sample.value) for sample in result.samples)
            else:
                of_sources.extend(sources.row((epoch.stream, epoch.start_ns), sample) for sample in result.samples)
            if result.samples:
                known[epoch] = sorted([*known[epoch], *result.samples], key=lambda sample: sample.time_ns)
        applied.append(found._replace(duplicates=duplicates))
    if remembered:
        await connection.execute(_REMEMBER_SQL, [list(column) for column in zip(*remembered, strict=True)])
    await sources.remember(connection, of_sources)
    return applied


def _by_epoch(points: Iterable[Point]) -> dict[_Epoch, list[Point]]:
    epochs: dict[_Epoch, list[Point]] = defaultdict(list)
    for point in points:
        stream = point.stream
        whose = (stream.series.account, stream.id) if stream.source is None else ("", stream.source.id)
        epochs[_Epoch(*whose, point.start_ns)].append(point)
    return epochs


async def _known(connection: Connection, epochs: dict[_Epoch, list[Point]]) -> dict[_Epoch, list[Sample]]:
    if not epochs:
        return {}
    streams = {(epoch.account, epoch.stream) for epoch in epochs}
    await connection.execute(_LOCK_SQL, [[account for account, _ in streams], [stream for _, stream in streams]])
    keys = list(epochs)
    first = [min(point.time_ns for point in points) for points in epochs.values()]
    last = [max(point.time_ns for point in points) for points in epochs.values()]
    arguments = [[key.account for key in keys], [key.stream for key in keys], [key.start_ns for key in keys]]
    known: dict[_Epoch, list[Sample]] = {key: [] for key in keys}
    for position, time_ns, value in await (await connection.execute(_KNOWN_SQL, [*arguments, first, last])).fetchall():
        known[keys[position - 1]].append(Sample(time_ns, value))
    return known


def conflict(point: Point, refusal: Refusal) -> Quarantined:
    """A point that contradicts what is stored, kept whole."""
    series = point.stream.series
    signal = "traces" if point.span else "metrics"
    payload = wire.encode_span(*point.span) if point.span else wire.encode_point(point)
    return Quarantined(
        series.tenant, series.account, series.meter, point.time_ns, refusal, signal, payload, point.metered
    )
