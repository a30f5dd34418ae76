"""What is stored that an item contradicts or repeats, and which billing period it would change."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Final, NamedTuple

from tallymark_collector.errors import MalformedRequest
from tallymark_collector.metering import Rules
from tallymark_collector.model import ControlTotal, Evidence, Point, Temporality
from tallymark_collector.processors.decoding import decode_metrics
from tallymark_collector.processors.spans import decode_spans
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits
from tallymark_collector.quarantine.items import Item
from tallymark_collector.quarantine.metered import decode
from tallymark_collector.quarantine.reading import time_text
from tallymark_collector.quarantine.rereading import FAR
from tallymark_collector.store import levels, rows
from tallymark_collector.store.database import Connection

_ALL_TIMES: Final = TimeLimits(FAR, FAR)


class Stored(NamedTuple):
    """Something in the database that is about the same."""

    what: str
    quantity: Decimal
    recorded_at: datetime | None
    """None where that is not kept: of the totals of cumulative streams."""


class Affected(NamedTuple):
    """A billing period that the item's own time lies in."""

    account: str
    start: datetime
    end: datetime
    plan: str
    ended: bool


_POINT_SQL: Final = """
SELECT 'the same stream and interval', quantity, recorded_at FROM usage_point
WHERE account = %s AND time = %s::timestamptz AND stream = %s AND start_time = %s::timestamptz AND part = %s"""

_SAMPLE_SQL: Final = """
(SELECT time_ns, value FROM usage_sample
 WHERE account = %(account)s AND stream = %(stream)s AND start_ns = %(start)s AND time_ns < %(time)s
 ORDER BY time_ns DESC LIMIT 1)
UNION ALL
(SELECT time_ns, value FROM usage_sample
 WHERE account = %(account)s AND stream = %(stream)s AND start_ns = %(start)s AND time_ns >= %(time)s
 ORDER BY time_ns LIMIT 2)"""

_SOURCE_SQL: Final = """
(SELECT time_ns, value FROM usage_sample
 WHERE source = %(source)s AND start_ns = %(start)s AND time_ns < %(time)s
 ORDER BY time_ns DESC LIMIT 1)
UNION ALL
(SELECT time_ns, value FROM usage_sample
 WHERE source = %(source)s AND start_ns = %(start)s AND time_ns >= %(time)s
 ORDER BY time_ns LIMIT 2)"""

_LEVEL_SQL: Final = """
SELECT 'the same stream and time', value, recorded_at FROM usage_level
WHERE account = %s AND time = %s::timestamptz AND stream = %s AND part = %s"""

_SOURCE_LEVEL_SQL: Final = """
SELECT 'the same stream and time, billed to account ' || account, value, recorded_at FROM usage_level
WHERE source = %s AND time = %s::timestamptz AND part = %s"""

_SPAN_SQL: Final = """
SELECT 'the same span and meter', quantity, recorded_at FROM usage_evidence
WHERE account = %s AND time = %s::timestamptz AND trace_id = %s AND span_id = %s AND meter = %s AND tenant = %s"""

_CONTROL_SQL: Final = """
SELECT 'the same producer, meter and time', total, recorded_at FROM usage_control
WHERE tenant = %s AND producer = %s AND meter = %s AND unit = %s AND time = %s::timestamptz
  AND start_time = %s::timestamptz AND part = %s"""

_PERIOD_SQL: Final = """
SELECT account, period_start, period_end, plan, period_end <= now() FROM billing_period
WHERE tenant = %s AND account = %s AND period_start <= %s AND period_end > %s ORDER BY period_start"""


async def stored(connection: Connection, item: Item, rules: Rules | None = None) -> list[Stored]:
    """What is stored for the identity that the item came with; of a running total, its neighbours too. What a file of
    meters made usage has an identity with that file only."""
    found: list[Stored] = []
    try:
        if item.metered:
            if rules is None:
                return found
            for point in decode(item, item.payload, rules, None, _ALL_TIMES, 1).points:
                found += await _point(connection, point)
            return found
        if item.signal == "traces":
            for span in decode_spans(item.tenant, item.payload, _ALL_TIMES, 1, kept=True).evidence:
                found += await _span(connection, span)
            return found
        decoded = decode_metrics(item.tenant, item.payload, StreamCache(kept=True), _ALL_TIMES, 1)
    except MalformedRequest:
        return found
    for point in decoded.points:
        found += await _point(connection, point)
    for control in decoded.controls:
        found += await _control(connection, control)
    return found


async def affected(connection: Connection, item: Item, account: str | None = None) -> list[Affected]:
    """The periods that a release would change: of the item's account, or of the one it would be attributed to."""
    if item.time is None:
        return []
    arguments = [item.tenant, item.account if account is None else account, item.time, item.time]
    return [Affected(*row) for row in await (await connection.execute(_PERIOD_SQL, arguments)).fetchall()]


async def _point(connection: Connection, point: Point) -> list[Stored]:
    stream = point.stream
    account = stream.series.account
    if stream.temporality is Temporality.CUMULATIVE:
        if max(point.start_ns, point.time_ns) >= 2**63:
            return []
        wanted = {"account": account, "stream": stream.id, "start": point.start_ns, "time": point.time_ns}
        if stream.source is not None:
            wanted["source"] = stream.source.id
        query = _SAMPLE_SQL if stream.source is None else _SOURCE_SQL
        samples = await (await connection.execute(query, wanted)).fetchall()
        return [Stored(f"a total of the same stream at {time_text(ns)}", value, None) for ns, value in samples]
    if stream.temporality is Temporality.LEVEL and stream.source is not None:
        of_source = [stream.source.id, rows.timestamp(point.time_ns), levels.part(point)]
        return [Stored(*row) for row in await (await connection.execute(_SOURCE_LEVEL_SQL, of_source)).fetchall()]
    if stream.temporality is Temporality.LEVEL:
        key = [account, rows.timestamp(point.time_ns), stream.id, levels.part(point)]
        return [Stored(*row) for row in await (await connection.execute(_LEVEL_SQL, key)).fetchall()]
    times = (rows.timestamp(point.time_ns), rows.timestamp(point.start_ns))
    key = [account, times[0], stream.id, times[1], rows.part(point)]
    return [Stored(*row) for row in await (await connection.execute(_POINT_SQL, key)).fetchall()]


async def _span(connection: Connection, span: Evidence) -> list[Stored]:
    key = [span.account, rows.timestamp(span.time_ns), span.trace_id, span.span_id, span.meter, span.tenant]
    return [Stored(*row) for row in await (await connection.execute(_SPAN_SQL, key)).fetchall()]


async def _control(connection: Connection, control: ControlTotal) -> list[Stored]:
    times = (rows.timestamp(control.time_ns), rows.timestamp(control.start_ns))
    part = rows.nanoseconds(control.start_ns, control.time_ns)
    producer = control.producer
    key = [producer.tenant, producer.id, control.meter, control.unit, *times, part]
    return [Stored(*row) for row in await (await connection.execute(_CONTROL_SQL, key)).fetchall()]
