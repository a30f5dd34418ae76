"""One batch, one transaction.

A point is identified by its stream and its two times. What is there already with the same quantity is a duplicate:
counted and dropped. What is there with another quantity goes to quarantine. So the same batch may be written any
number of times, by any number of collectors, in any order, and the sum stays.

The fast way is COPY straight into the table. If a point is there already, that COPY alone is rolled back and the
batch goes through a staging table, where the database tells new from old.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Final, TypeAlias

import psycopg
from psycopg.errors import UniqueViolation

from tallymark_collector import wire
from tallymark_collector.model import (
    Batch,
    Evidence,
    Point,
    Quarantined,
    Reason,
    Refusal,
    Temporality,
    WriteResult,
    attributes_json,
    without_nul,
)
from tallymark_collector.store import control, dictionaries, hours, levels, rows, samples
from tallymark_collector.store.database import Connection

_STAGE_SQL: Final = """
CREATE TEMPORARY TABLE IF NOT EXISTS staged_point (
    position int GENERATED ALWAYS AS IDENTITY, time timestamptz, start_time timestamptz, stream uuid, series uuid,
    part bigint, account text, tenant text, quantity numeric
) ON COMMIT DELETE ROWS"""

_UNSTAGE_SQL: Final = f"""
WITH inserted AS (
    INSERT INTO usage_point ({rows.POINT_COLUMNS})
    SELECT {rows.POINT_COLUMNS} FROM staged_point ORDER BY position
    ON CONFLICT DO NOTHING
    RETURNING time, account, tenant
), marked AS (
    INSERT INTO usage_dirty (bucket, account, tenant)
    SELECT DISTINCT date_bin('1 hour', time, 'epoch'), account, tenant FROM inserted
)
SELECT count(*) FROM inserted"""  # noqa: S608 - a constant of ours

# After the insertion every staged key is in the table: with its own quantity, or with another's. The identity column
# counts on from batch to batch of a session; the batch's first row says from where.
_CONFLICT_SQL: Final = """
SELECT s.position - (SELECT min(position) FROM staged_point), p.quantity
FROM staged_point s
JOIN usage_point p USING (account, time, stream, start_time, part)
WHERE p.quantity <> s.quantity"""

_STAGE_EVIDENCE_SQL: Final = """
CREATE TEMPORARY TABLE IF NOT EXISTS staged_evidence (
    position int GENERATED ALWAYS AS IDENTITY, time timestamptz, start_time timestamptz, account text, tenant text,
    meter text, trace_id bytea, span_id bytea, quantity numeric, name text, service text, user_id text,
    attributes jsonb
) ON COMMIT DELETE ROWS"""

_UNSTAGE_EVIDENCE_SQL: Final = f"""
INSERT INTO usage_evidence ({rows.EVIDENCE_COLUMNS})
SELECT {rows.EVIDENCE_COLUMNS} FROM staged_evidence ORDER BY account, time, trace_id, span_id, meter
ON CONFLICT DO NOTHING"""  # noqa: S608 - a constant of ours

_EVIDENCE_CONFLICT_SQL: Final = """
SELECT s.position - (SELECT min(position) FROM staged_evidence), e.quantity
FROM staged_evidence s
JOIN usage_evidence e USING (account, time, trace_id, span_id, meter, tenant)
WHERE e.quantity <> s.quantity"""

_QUARANTINE_SQL: Final = """
INSERT INTO usage_quarantine (account, digest, tenant, meter, reason, detail, signal, time, payload)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT DO NOTHING"""


Beside: TypeAlias = Callable[[Connection], Awaitable[None]]
"""What else the same transaction does; may run again where the transaction has to."""


async def write(
    connection: Connection, batch: Batch, known: dictionaries.Dictionaries, beside: Beside | None = None
) -> WriteResult:
    """Writes the batch in one transaction and returns after its commit. Idempotent where `beside` is."""
    new = known.unknown(point.stream for point in batch.points)
    async with connection.transaction():
        if new:
            await dictionaries.register(connection, new)
        cumulative = [p for p in batch.points if p.stream.temporality is Temporality.CUMULATIVE]
        points = [p for p in batch.points if p.stream.temporality is Temporality.DELTA]
        applied = await samples.apply(connection, cumulative) if cumulative else samples.Applied([], 0, [])
        points.extend(applied.points)
        inserted, conflicts = await _insert(connection, points)
        told = await levels.insert(connection, [p for p in batch.points if p.stream.temporality is Temporality.LEVEL])
        evidence, contradicting = await _insert_evidence(connection, batch.evidence)
        refused = await control.write(connection, batch)
        duplicates = applied.duplicates + len(points) - inserted - len(conflicts)
        inserted, duplicates = inserted + told.inserted, duplicates + told.duplicates
        conflicts = [*applied.conflicts, *conflicts, *told.conflicts, *contradicting, *refused]
        await _quarantine(connection, [*batch.quarantined, *conflicts])
        if beside is not None:
            await beside(connection)
    known.remember(new)
    return WriteResult(inserted, duplicates, evidence, conflicts)


def halved(batch: Batch, error: psycopg.Error) -> list[Batch]:
    """Smaller batches that hold the same, for a batch that the database cannot hold. Raises `error` where that is due
    to what is in quarantine already."""
    points, evidence = batch.points, batch.evidence
    if batch.controls or batch.closings or batch.counts:
        rest = Batch(points, evidence, batch.quarantined)
        alone = replace(batch, points=(), evidence=(), quarantined=())
        return [rest, alone] if rest else control.halved(batch, error)
    if points and evidence:
        return [Batch(points=points, quarantined=batch.quarantined), Batch(evidence=evidence)]
    if len(points) > 1 or len(evidence) > 1:
        middle = max(len(points), len(evidence)) // 2
        return [
            Batch(points[:middle], evidence[:middle], batch.quarantined),
            Batch(points[middle:], evidence[middle:]),
        ]
    refusal = Refusal(Reason.NOT_STORABLE, f"the database cannot hold it: {str(error).splitlines()[0]}")
    refused = [samples.conflict(point, refusal) for point in points]
    refused += [_evidence_refused(item, refusal) for item in evidence]
    if not refused:
        raise error
    return [Batch(quarantined=[*batch.quarantined, *refused])]


async def _insert(connection: Connection, points: list[Point]) -> tuple[int, list[Quarantined]]:
    if not points:
        return 0, []
    # All writers insert in one order, so that none waits for another that waits for it.
    points.sort(key=lambda p: (p.stream.series.account, p.time_ns, p.stream.id, p.start_ns))
    lines = "".join(map(rows.point_line, points)).encode()
    try:
        async with connection.transaction():
            await _copy(connection, f"COPY usage_point ({rows.POINT_COLUMNS}) FROM STDIN", lines)
    except UniqueViolation:
        return await _insert_staged(connection, points, lines)
    marks = {(p.time_ns // rows.HOUR_NS, p.stream.series.account, p.stream.series.tenant) for p in points}
    await hours.mark(connection, [(rows.hour_start(hour), account, tenant) for hour, account, tenant in marks])
    return len(points), []


async def _insert_staged(connection: Connection, points: list[Point], lines: bytes) -> tuple[int, list[Quarantined]]:
    await connection.execute(_STAGE_SQL)
    await _copy(connection, f"COPY staged_point ({rows.POINT_COLUMNS}) FROM STDIN", lines)
    [inserted] = await (await connection.execute(_UNSTAGE_SQL)).fetchone() or [0]
    different = await (await connection.execute(_CONFLICT_SQL)).fetchall()
    return inserted, [_value_conflict(points[position], there) for position, there in different]


async def _insert_evidence(connection: Connection, evidence: Sequence[Evidence]) -> tuple[int, list[Quarantined]]:
    if not evidence:
        return 0, []
    lines = "".join(rows.evidence_line(item, attributes_json(item.attributes)) for item in evidence).encode()
    await connection.execute(_STAGE_EVIDENCE_SQL)
    await _copy(connection, f"COPY staged_evidence ({rows.EVIDENCE_COLUMNS}) FROM STDIN", lines)
    inserted = (await connection.execute(_UNSTAGE_EVIDENCE_SQL)).rowcount
    different = await (await connection.execute(_EVIDENCE_CONFLICT_SQL)).fetchall()
    return inserted, [_evidence_conflict(evidence[position], there) for position, there in different]


async def _copy(connection: Connection, statement: str, lines: bytes) -> None:
    async with connection.cursor() as cursor, cursor.copy(statement) as copy:
        await copy.write(lines)


def _value_conflict(point: Point, there: Decimal) -> Quarantined:
    detail = f"{there} was stored before for the same stream and interval, {point.value} came now"
    return samples.conflict(point, Refusal(Reason.VALUE_CONFLICT, detail))


def _evidence_conflict(item: Evidence, there: Decimal) -> Quarantined:
    detail = f"{there} was stored before for the same span and meter, {item.quantity} came now"
    return _evidence_refused(item, Refusal(Reason.VALUE_CONFLICT, detail))


def _evidence_refused(item: Evidence, refusal: Refusal) -> Quarantined:
    payload = wire.encode_evidence(item)
    return Quarantined(item.tenant, item.account, item.meter, item.time_ns, refusal, "traces", payload)


async def _quarantine(connection: Connection, items: Iterable[Quarantined]) -> None:
    arguments = sorted(map(_quarantine_row, items), key=lambda row: (row[0], row[1]))
    if arguments:
        async with connection.cursor() as cursor:
            await cursor.executemany(_QUARANTINE_SQL, arguments)


def _quarantine_row(item: Quarantined) -> tuple[str, bytes, str, str, str, str, str, str | None, bytes]:
    reason, detail = item.refusal
    digest = hashlib.blake2b(digest_size=16)
    # Not the detail: it may tell how far off a time is, which differs at each retry.
    for piece in (item.tenant.encode(), reason.value.encode(), item.payload):
        digest.update(len(piece).to_bytes(8, "big") + piece)
    in_range = 0 < item.time_ns < 2**63
    return (
        without_nul(item.account),
        digest.digest(),
        item.tenant,
        without_nul(item.meter),
        reason.value,
        without_nul(detail),
        item.signal,
        rows.timestamp(item.time_ns) if in_range else None,
        item.payload,
    )
