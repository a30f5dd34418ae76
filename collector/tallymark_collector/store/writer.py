"""Some batches, one transaction.

A point is identified by its stream and its two times. What is there already with the same quantity is a duplicate:
counted and dropped. What is there with another quantity goes to quarantine. So the same batch may be written any
number of times, by any number of collectors, in any order, and the sum stays. Batches that are written together come
to what they would have come to one after the other, and each has its own result.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import chain
from typing import Final, TypeAlias

import psycopg
from psycopg.errors import UniqueViolation

from tallymark_collector.model import (
    Batch,
    Point,
    Quarantined,
    Reason,
    Refusal,
    Stream,
    Temporality,
    WriteResult,
)
from tallymark_collector.processors.at_once import at_once
from tallymark_collector.processors.set_aside import SetAside
from tallymark_collector.store import control, dictionaries, evidence, levels, points, quarantined, rows, samples
from tallymark_collector.store.database import Connection
from tallymark_collector.store.latest import Guess, Latest


class _Doubt(enum.Enum):
    """Which points are looked up before they are copied."""

    LATE = enum.auto()
    """Those that may be there already, by what this process has committed."""
    ALL = enum.auto()
    STAGED = enum.auto()
    """None: the database tells new from old as it inserts them."""


_ATTEMPTS: Final = (_Doubt.LATE, _Doubt.ALL, _Doubt.ALL, _Doubt.STAGED)
"""One after the other, where a point was there that was taken for new: another collector's may come between a look and
COPY, even twice."""

PIECE: Final = 4096
"""Points whose rows are made between two rests."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A batch with its rows, made before its transaction begins."""

    batch: Batch
    deltas: Sequence[Point]
    """Points that are rows as they came."""
    lines: Sequence[bytes]
    """Their rows."""
    totals: Sequence[Point]
    """Points of cumulative streams: what they add is found out in the transaction."""
    levels: Sequence[Point]
    """What streams stand at: no amounts, and in no sum."""
    streams: Iterable[Stream]
    marks: set[tuple[int, str, str]]
    """Hours of the deltas since the Unix epoch, with account and tenant."""


@dataclass(slots=True)
class _Tally:
    """What has become of one batch so far."""

    inserted: int = 0
    duplicates: int = 0
    evidence: int = 0
    aside: SetAside = field(default_factory=SetAside)
    """What contradicts what is stored."""


def encode(batch: Batch) -> Encoded:
    """Makes the rows of a batch. Raises psycopg.DataError for what no row can hold."""
    return at_once(encoding(batch))


def encoding(batch: Batch) -> Generator[None, None, Encoded]:
    """The same in pieces (see `resting`)."""
    deltas: list[Point] = []
    totals: list[Point] = []
    stands: list[Point] = []
    lines: list[bytes] = []
    streams: dict[Stream, None] = {}
    marks: set[tuple[int, str, str]] = set()
    for start in range(0, len(batch.points), PIECE):
        if start:
            yield
        piece = batch.points[start : start + PIECE]
        found = dict.fromkeys(point.stream for point in piece)
        streams |= found
        if any(stream.temporality is not Temporality.DELTA for stream in found):
            totals += [point for point in piece if point.stream.temporality is Temporality.CUMULATIVE]
            stands += [point for point in piece if point.stream.temporality is Temporality.LEVEL]
            piece = [point for point in piece if point.stream.temporality is Temporality.DELTA]
        deltas += piece
        lines += rows.point_rows(piece)
        marks |= _marks(piece)
    return Encoded(batch, deltas, lines, totals, stands, streams, marks)


def _marks(found: Sequence[Point]) -> set[tuple[int, str, str]]:
    if not found:
        return set()
    streams: dict[int, set[Stream]] = defaultdict(set)
    times = [point.time_ns for point in found]
    hour = min(times) // rows.HOUR_NS
    if hour == max(times) // rows.HOUR_NS:  # as what is sent as it happens
        streams[hour] = {point.stream for point in found}
    else:
        for point in found:
            streams[point.time_ns // rows.HOUR_NS].add(point.stream)
    return {(hour, s.series.account, s.series.tenant) for hour, marked in streams.items() for s in marked}


Beside: TypeAlias = Callable[[Connection], Awaitable[None]]
"""What else the same transaction does; may run again where the transaction has to."""


async def write(
    connection: Connection,
    group: Sequence[Encoded],
    known: dictionaries.Dictionaries,
    beside: Beside | None = None,
) -> list[WriteResult]:
    """Writes the batches in one transaction and returns after its commit. Idempotent where `beside` is."""
    new = known.unknown(chain.from_iterable(encoded.streams for encoded in group))
    # Where late points are taken for new ones, those are looked at first.
    for doubt in (_Doubt.LATE, *_ATTEMPTS) if known.latest.trusting else _ATTEMPTS:
        try:
            tallies, guess = await _write(connection, group, new, known.latest, beside, doubt)
        except UniqueViolation:
            known.latest.looked_up(found=True)
            if doubt is _ATTEMPTS[-1]:
                raise
        else:
            break
    known.remember(new)
    known.latest.committed(guess)
    return [WriteResult(one.inserted, one.duplicates, one.evidence, one.aside.quarantined) for one in tallies]


async def _write(
    connection: Connection,
    group: Sequence[Encoded],
    new: list[Stream],
    latest: Latest,
    beside: Beside | None,
    doubt: _Doubt,
) -> tuple[list[_Tally], Guess]:
    """Raises UniqueViolation where a point was there that was taken for a new one."""
    async with connection.transaction():
        if new:
            await dictionaries.register(connection, new)
        tallies, guess = await _write_points(connection, group, latest, doubt)
        await _write_levels(connection, group, tallies)
        await _write_evidence(connection, group, tallies)
        for tally, refused in zip(
            tallies, await control.write(connection, [encoded.batch for encoded in group]), strict=True
        ):
            tally.aside.keep(refused)
        aside = (
            (*encoded.batch.quarantined, *tally.aside.quarantined)
            for encoded, tally in zip(group, tallies, strict=True)
        )
        await quarantined.insert(connection, chain.from_iterable(aside))
        if beside is not None:
            await beside(connection)
        return tallies, guess


async def _write_points(
    connection: Connection, group: Sequence[Encoded], latest: Latest, doubt: _Doubt
) -> tuple[list[_Tally], Guess]:
    applied = await samples.apply(connection, [encoded.totals for encoded in group])
    tallies = [_Tally(duplicates=one.duplicates) for one in applied]
    for tally, one in zip(tallies, applied, strict=True):
        tally.aside.keep(one.conflicts)
    found: list[Point] = []
    lines: list[bytes] = []
    owners: list[_Tally] = []
    marks: set[tuple[int, str, str]] = set()
    for encoded, one, tally in zip(group, applied, tallies, strict=True):
        tally.inserted = len(encoded.deltas) + len(one.points)
        found += encoded.deltas
        found += one.points
        lines += encoded.lines
        lines += rows.point_rows(one.points)
        owners += [tally] * tally.inserted
        marks |= encoded.marks
        marks |= _marks(one.points)
    guess = latest.guess(found)
    if doubt is _Doubt.STAGED:
        there = await points.insert_new(connection, found, lines)
    else:
        late = guess.late if doubt is _Doubt.LATE else range(len(found))
        close = guess.close if doubt is _Doubt.LATE else ()
        there = await points.there(connection, found, lines, late, close)
        if late:
            latest.looked_up(found=bool(there))
        if there:
            lines = [line for position, line in enumerate(lines) if position not in there]
            marks = _marks([point for position, point in enumerate(found) if position not in there])
        await points.insert(connection, lines, marks)
    for position, quantity in there.items():
        tally = owners[position]
        tally.inserted -= 1
        if quantity == found[position].value:
            tally.duplicates += 1
        else:
            tally.aside.keep([_conflict(found[position], quantity)])
    return tallies, guess


async def _write_levels(connection: Connection, group: Sequence[Encoded], tallies: Sequence[_Tally]) -> None:
    found = [level for encoded in group for level in encoded.levels]
    owners = [tally for encoded, tally in zip(group, tallies, strict=True) for _ in encoded.levels]
    for tally, level in zip(owners, found, strict=True):
        tally.inserted += not level.is_end
    for position, there in (await levels.insert(connection, [encoded.levels for encoded in group])).items():
        tally = owners[position]
        tally.inserted -= 1
        if there == found[position].value:
            tally.duplicates += 1
        else:
            tally.aside.keep([levels.contradiction(found[position], there)])


async def _write_evidence(connection: Connection, group: Sequence[Encoded], tallies: Sequence[_Tally]) -> None:
    found = [item for encoded in group for item in encoded.batch.evidence]
    owners = [tally for encoded, tally in zip(group, tallies, strict=True) for _ in range(len(encoded.batch.evidence))]
    for tally in owners:
        tally.evidence += 1
    for position, there in (await evidence.insert_new(connection, found)).items():
        tally = owners[position]
        tally.evidence -= 1
        if there != found[position].quantity:
            tally.aside.keep([evidence.conflict(found[position], there)])


def halved(batch: Batch, error: psycopg.Error) -> list[Batch]:
    """Smaller batches that hold the same, for a batch that the database cannot hold. Raises `error` where that is due
    to what is in quarantine already."""
    found, spans = batch.points, batch.evidence
    if batch.controls or batch.closings or batch.counts:
        rest = Batch(found, spans, batch.quarantined)
        alone = replace(batch, points=(), evidence=(), quarantined=())
        return [rest, alone] if rest else control.halved(batch, error)
    if found and spans:
        return [Batch(points=found, quarantined=batch.quarantined), Batch(evidence=spans)]
    if len(found) > 1 or len(spans) > 1:
        middle = max(len(found), len(spans)) // 2
        return [
            Batch(found[:middle], spans[:middle], batch.quarantined),
            Batch(found[middle:], spans[middle:]),
        ]
    refusal = Refusal(Reason.NOT_STORABLE, f"the database cannot hold it: {str(error).splitlines()[0]}")
    refused = [samples.conflict(point, refusal) for point in found]
    refused += [evidence.refused(item, refusal) for item in spans]
    if not refused:
        raise error
    return [Batch(quarantined=[*batch.quarantined, *refused])]


def _conflict(point: Point, there: Decimal) -> Quarantined:
    detail = f"{there} was stored before for the same stream and interval, {point.value} came now"
    return samples.conflict(point, Refusal(Reason.VALUE_CONFLICT, detail))
