"""Some batches, one transaction.

A point is identified by its stream and its two times. What is there already with the same quantity is a duplicate:
counted and dropped. What is there with another quantity goes to quarantine. So the same batch may be written any
number of times, by any number of collectors, in any order, and the sum stays. Batches that are written together come
to what they would have come to one after the other, and each has its own result.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import chain
from typing import Final, NamedTuple, TypeAlias
from uuid import UUID

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
    without_nul,
)
from tallymark_collector.processors.at_once import at_once
from tallymark_collector.processors.set_aside import SetAside
from tallymark_collector.resting import resting
from tallymark_collector.store import (
    control,
    dictionaries,
    evidence,
    levels,
    locks,
    points,
    rows,
    samples,
    source_streams,
)
from tallymark_collector.store.database import Connection
from tallymark_collector.store.latest import Guess, Latest

_QUARANTINE_SQL: Final = """
INSERT INTO usage_quarantine (account, digest, tenant, meter, reason, detail, signal, time, payload, metered)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT DO NOTHING"""
_QuarantineRow: TypeAlias = "tuple[str, bytes, str, str, str, str, str, str | None, bytes, bool]"


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
ASIDE_PIECE: Final = 512
"""The same of what goes to quarantine."""


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
    sourced: Sequence[Stream]
    """Those of the deltas that belong to a source."""
    marks: set[bytes]
    """Rows that mark the deltas' hours."""

    @property
    def is_plain(self) -> bool:
        """True where nothing but its rows and marks is to be written."""
        batch = self.batch
        others = (self.totals, self.levels, batch.evidence, batch.quarantined, batch.controls, batch.closings)
        return not any(others) and not batch.counts and not self.sourced


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
    marks: set[bytes] = set()
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
        marks |= rows.mark_rows(piece)
    sourced = source_streams.of_sources(streams)
    return Encoded(batch, deltas, lines, totals, stands, streams, sourced, marks)


Beside: TypeAlias = Callable[[Connection], Awaitable[None]]
"""What else the same transaction does; may run again where the transaction has to."""


async def write(
    connection: Connection,
    group: Sequence[Encoded],
    known: dictionaries.Dictionaries,
    beside: Beside | None = None,
) -> list[WriteResult]:
    """Writes the batches in one transaction and returns after its commit. Idempotent where `beside` is."""
    try:
        return await _write_group(connection, group, known, beside, alone=False)
    except source_streams.FurtherStreamError:
        return await _write_group(connection, group, known, beside, alone=True)


async def _write_group(
    connection: Connection,
    group: Sequence[Encoded],
    known: dictionaries.Dictionaries,
    beside: Beside | None,
    *,
    alone: bool,
) -> list[WriteResult]:
    """Raises FurtherStreamError where it is not `alone` (`source_streams`)."""
    unknown = await resting(known.unknown(chain.from_iterable(encoded.streams for encoded in group)))
    new = await resting(dictionaries.registration(unknown))
    # Where late points are taken for new ones, those are looked at first.
    for doubt in (_Doubt.LATE, *_ATTEMPTS) if known.latest.trusting else _ATTEMPTS:
        try:
            written = await _write(connection, group, new, known, beside, doubt, alone=alone)
        except UniqueViolation:
            known.latest.looked_up(found=True)
            if doubt is _ATTEMPTS[-1]:
                raise
        else:
            break
    known.remember(unknown)
    known.latest.committed(written.guess)
    if written.taken is not None:
        written.taken.remember()
    return [WriteResult(one.inserted, one.duplicates, one.evidence, one.aside.quarantined) for one in written.tallies]


class _Written(NamedTuple):
    """What a transaction has done."""

    tallies: list[_Tally]
    guess: Guess
    taken: source_streams.Taken | None


async def _write(
    connection: Connection,
    group: Sequence[Encoded],
    new: dictionaries.Registration,
    known: dictionaries.Dictionaries,
    beside: Beside | None,
    doubt: _Doubt,
    *,
    alone: bool,
) -> _Written:
    """Raises UniqueViolation where a point was there that was taken for a new one."""
    if doubt is _Doubt.LATE and not new.streams and beside is None and all(encoded.is_plain for encoded in group):
        tallies = [_Tally() for _ in group]
        found, lines, _, marks = _gather(group, tallies, [()] * len(group))
        guess = known.latest.guess(found)
        if not guess.late and not guess.close:  # as nearly all that comes: one message is the whole transaction
            await points.insert(connection, lines, marks)
            return _Written(tallies, guess, None)
    async with connection.transaction():
        sourced = [stream for encoded in group for stream in encoded.sourced]
        taken = await source_streams.take(connection, sourced, known.sources, alone=alone) if sourced else None
        if new.streams:
            await dictionaries.register(connection, new)
        several = taken.several if taken is not None else ()
        tallies, guess = await _write_points(connection, group, known.latest, doubt, several)
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
        await _quarantine(connection, chain.from_iterable(aside))
        if beside is not None:
            await beside(connection)
        return _Written(tallies, guess, taken)


class _Gathered(NamedTuple):
    """Points of a group that are to be rows."""

    found: list[Point]
    lines: list[bytes]
    owners: list[_Tally]
    """Of each, that of its batch."""
    marks: set[bytes]


def _gather(group: Sequence[Encoded], tallies: Sequence[_Tally], increases: Sequence[Sequence[Point]]) -> _Gathered:
    """Counts all of them as inserted. `increases`: what each batch's totals came to."""
    gathered = _Gathered([], [], [], set())
    for encoded, tally, more in zip(group, tallies, increases, strict=True):
        tally.inserted = len(encoded.deltas) + len(more)
        gathered.found.extend((*encoded.deltas, *more))
        gathered.lines.extend((*encoded.lines, *rows.point_rows(more)))
        gathered.owners.extend([tally] * tally.inserted)
        gathered.marks.update(encoded.marks, rows.mark_rows(more))
    return gathered


async def _write_points(
    connection: Connection, group: Sequence[Encoded], latest: Latest, doubt: _Doubt, several: Collection[UUID]
) -> tuple[list[_Tally], Guess]:
    applied = await samples.apply(connection, [encoded.totals for encoded in group])
    tallies = [_Tally(duplicates=one.duplicates) for one in applied]
    for tally, one in zip(tallies, applied, strict=True):
        tally.aside.keep(one.conflicts)
    found, lines, owners, marks = _gather(group, tallies, [one.points for one in applied])
    if several and (elsewhere := await source_streams.elsewhere(connection, found, several)):
        for position, billed in elsewhere.items():
            _count(owners[position], found[position], billed.quantity, billed.account)
        rest = [position for position in range(len(found)) if position not in elsewhere]
        found, lines = [found[position] for position in rest], [lines[position] for position in rest]
        owners = [owners[position] for position in rest]
        marks = rows.mark_rows(found)
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
            marks = rows.mark_rows([point for position, point in enumerate(found) if position not in there])
        await points.insert(connection, lines, marks)
    for position, quantity in there.items():
        _count(owners[position], found[position], quantity, found[position].stream.series.account)
    return tallies, guess


def _count(tally: _Tally, point: Point, there: Decimal, account: str) -> None:
    """Counts a point that was billed to an account before."""
    tally.inserted -= 1
    if there == point.value:
        tally.duplicates += 1
    else:
        tally.aside.keep([_conflict(point, there, account)])


async def _write_levels(connection: Connection, group: Sequence[Encoded], tallies: Sequence[_Tally]) -> None:
    found = [level for encoded in group for level in encoded.levels]
    owners = [tally for encoded, tally in zip(group, tallies, strict=True) for _ in encoded.levels]
    for tally in owners:
        tally.inserted += 1
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
        if there != found[position].quantity and not found[position].billed:
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


def _conflict(point: Point, there: Decimal, account: str) -> Quarantined:
    to = f" and billed to account {account!r}" if account != point.stream.series.account else ""
    detail = f"{there} was stored before for the same stream and interval{to}, {point.value} came now"
    return samples.conflict(point, Refusal(Reason.VALUE_CONFLICT, detail))


async def _quarantine(connection: Connection, items: Iterable[Quarantined]) -> None:
    arguments = await resting(_quarantine_rows(items))
    if arguments:
        # What is set aside may hold points back (`aggregates.unsettled`): whoever drops them waits for us, or we for
        # them. After the points, as the marks: whoever drops takes those first.
        await locks.shared(connection, locks.KEPT)
        async with connection.cursor() as cursor:
            for start in range(0, len(arguments), ASIDE_PIECE):
                await cursor.executemany(_QUARANTINE_SQL, arguments[start : start + ASIDE_PIECE])
                await asyncio.sleep(0)


def _quarantine_rows(items: Iterable[Quarantined]) -> Generator[None, None, list[_QuarantineRow]]:
    """In the order in which all writers insert them."""
    found: list[_QuarantineRow] = []
    for done, item in enumerate(items, 1):
        found.append(_quarantine_row(item))
        if done % ASIDE_PIECE == 0:
            yield
    return sorted(found, key=lambda row: (row[0], row[1]))


def _quarantine_row(item: Quarantined) -> _QuarantineRow:
    reason, detail = item.refusal
    in_range = 0 < item.time_ns < 2**63
    return (
        without_nul(item.account),
        item.digest(),
        item.tenant,
        without_nul(item.meter),
        reason.value,
        without_nul(detail),
        item.signal,
        rows.timestamp(item.time_ns) if in_range else None,
        item.payload,
        item.metered,
    )
