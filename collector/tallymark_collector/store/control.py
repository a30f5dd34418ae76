"""Control totals, the ends of runs and counts of evidence: written beside the usage of the same request, idempotent.

The same statement again is a duplicate. Another value for the same time is a conflict, for the quarantine: one of the
two is wrong, and the audit must not choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Final

import psycopg

from tallymark_collector import wire
from tallymark_collector.model import (
    Batch,
    ControlTotal,
    EvidenceCount,
    Producer,
    Quarantined,
    Reason,
    Refusal,
)
from tallymark_collector.store import rows
from tallymark_collector.store.database import Connection

_PRODUCER_SQL: Final = """
INSERT INTO usage_producer (tenant, producer, namespace, service, instance)
SELECT * FROM unnest(%s::text[], %s::uuid[], %s::text[], %s::text[], %s::text[])
ON CONFLICT DO NOTHING"""

_CLOSED_SQL: Final = """
INSERT INTO usage_closed (tenant, producer, time, start_time, part)
SELECT * FROM unnest(%s::text[], %s::uuid[], %s::timestamptz[], %s::timestamptz[], %s::bigint[])
ON CONFLICT DO NOTHING"""

_TOTAL_COLUMNS: Final = "tenant, producer, meter, unit, time, start_time, part, total"
_TOTAL_ROWS: Final = """
unnest(%s::text[], %s::uuid[], %s::text[], %s::text[], %s::timestamptz[], %s::timestamptz[], %s::bigint[],
       %s::numeric[])"""

_TOTAL_SQL: Final = f"""
INSERT INTO usage_control ({_TOTAL_COLUMNS}) SELECT * FROM {_TOTAL_ROWS} ON CONFLICT DO NOTHING"""  # noqa: S608 - ours

_TOTAL_CONFLICT_SQL: Final = f"""
SELECT g.position - 1, c.total
FROM {_TOTAL_ROWS} WITH ORDINALITY AS g ({_TOTAL_COLUMNS}, position)
JOIN usage_control c USING (tenant, producer, meter, unit, time, start_time, part)
WHERE c.total <> g.total"""  # noqa: S608 - constants of ours

_COUNT_COLUMNS: Final = "account, tenant, producer, meter, unit, time, start_time, part, quantity"
_COUNT_ROWS: Final = """
unnest(%s::text[], %s::text[], %s::uuid[], %s::text[], %s::text[], %s::timestamptz[], %s::timestamptz[],
       %s::bigint[], %s::numeric[])"""

_COUNT_SQL: Final = f"""
INSERT INTO usage_evidence_count ({_COUNT_COLUMNS}) SELECT * FROM {_COUNT_ROWS} ON CONFLICT DO NOTHING"""  # noqa: S608

_COUNT_CONFLICT_SQL: Final = f"""
SELECT g.position - 1, c.quantity
FROM {_COUNT_ROWS} WITH ORDINALITY AS g ({_COUNT_COLUMNS}, position)
JOIN usage_evidence_count c USING (account, tenant, producer, meter, unit, time, start_time, part)
WHERE c.quantity <> g.quantity"""  # noqa: S608 - constants of ours


async def write(connection: Connection, batches: Sequence[Batch]) -> list[list[Quarantined]]:
    """Writes what the batches hold of these, in the caller's transaction; returns what of each of them contradicts what
    is stored. Between batches, the earlier one is what is stored."""
    refused: list[list[Quarantined]] = [[] for _ in batches]
    producers = {
        item.producer for batch in batches for some in (batch.controls, batch.closings, batch.counts) for item in some
    }
    if not producers:
        return refused
    known = sorted(producers, key=lambda producer: (producer.tenant, producer.id))
    await connection.execute(_PRODUCER_SQL, _columns([_producer_row(producer) for producer in known]))
    closings = sorted({(*_key(c.producer), *_times(c.start_ns, c.time_ns)) for b in batches for c in b.closings})
    if closings:
        await connection.execute(_CLOSED_SQL, _columns(closings))
    # All writers insert in one order, so that none waits for another that waits for it; equal ones as they came.
    totals = [(c, place) for place, batch in enumerate(batches) for c in batch.controls]
    totals.sort(key=lambda of: (*_key(of[0].producer), of[0].meter, of[0].unit, of[0].time_ns, of[0].start_ns))
    counts = [(c, place) for place, batch in enumerate(batches) for c in batch.counts]
    counts.sort(
        key=lambda of: (of[0].account, *_key(of[0].producer), of[0].meter, of[0].unit, of[0].time_ns, of[0].start_ns)
    )
    for position, there in await _insert(
        connection, _TOTAL_SQL, _TOTAL_CONFLICT_SQL, [_total_row(c) for c, _ in totals]
    ):
        total, place = totals[position]
        refused[place].append(_conflict(total, total.total, there))
    for position, there in await _insert(
        connection, _COUNT_SQL, _COUNT_CONFLICT_SQL, [_count_row(c) for c, _ in counts]
    ):
        count, place = counts[position]
        refused[place].append(_conflict(count, count.quantity, there))
    return refused


async def _insert(
    connection: Connection, insert: str, conflicts: str, values: list[tuple[object, ...]]
) -> list[tuple[int, Decimal]]:
    if not values:
        return []
    columns = _columns(values)
    if (await connection.execute(insert, columns)).rowcount == len(values):
        return []
    # A statement of its own: it must see what others committed while the insertion waited for them.
    return [(position, there) for position, there in await (await connection.execute(conflicts, columns)).fetchall()]


def halved(batch: Batch, error: psycopg.Error) -> list[Batch]:
    """Smaller batches that hold the same, of a batch of these alone that the database cannot hold."""
    refusal = Refusal(Reason.NOT_STORABLE, f"the database cannot hold it: {str(error).splitlines()[0]}")
    if len(batch.controls) + len(batch.closings) + len(batch.counts) > 1:
        half = [len(some) // 2 for some in (batch.controls, batch.closings, batch.counts)]
        if sum(half) == 0:
            return [Batch(controls=batch.controls), Batch(closings=batch.closings), Batch(counts=batch.counts)]
        first = Batch(
            controls=batch.controls[: half[0]], closings=batch.closings[: half[1]], counts=batch.counts[: half[2]]
        )
        return [
            first,
            replace(
                batch,
                controls=batch.controls[half[0] :],
                closings=batch.closings[half[1] :],
                counts=batch.counts[half[2] :],
            ),
        ]
    if batch.closings:
        raise error  # two times and a name that were checked: it is the database that is wrong
    refused = [_refused(item, item.total, refusal) for item in batch.controls]
    return [Batch(quarantined=refused + [_refused(item, item.quantity, refusal) for item in batch.counts])]


def _conflict(item: ControlTotal | EvidenceCount, value: Decimal, there: Decimal) -> Quarantined:
    detail = f"{there} was stored before for {item.meter!r} of the same producer and time, {value} came now"
    return _refused(item, value, Refusal(Reason.VALUE_CONFLICT, detail))


def _refused(item: ControlTotal | EvidenceCount, value: Decimal, refusal: Refusal) -> Quarantined:
    account = item.account if isinstance(item, EvidenceCount) else ""
    payload = wire.encode_number(item.origin, item.start_ns, item.time_ns, value)
    return Quarantined(item.producer.tenant, account, item.origin.name, item.time_ns, refusal, "metrics", payload)


def _key(producer: Producer) -> tuple[str, str]:
    return producer.tenant, str(producer.id)


def _times(start_ns: int, time_ns: int) -> tuple[str, str, int]:
    return rows.timestamp(time_ns), rows.timestamp(start_ns), rows.nanoseconds(start_ns, time_ns)


def _producer_row(producer: Producer) -> tuple[object, ...]:
    return (*_key(producer), producer.namespace, producer.service, producer.instance)


def _total_row(item: ControlTotal) -> tuple[object, ...]:
    return (*_key(item.producer), item.meter, item.unit, *_times(item.start_ns, item.time_ns), item.total)


def _count_row(item: EvidenceCount) -> tuple[object, ...]:
    times = _times(item.start_ns, item.time_ns)
    return (item.account, *_key(item.producer), item.meter, item.unit, *times, item.quantity)


def _columns(values: Sequence[tuple[object, ...]]) -> list[list[object]]:
    return [list(column) for column in zip(*values, strict=True)]
