"""Rows as COPY takes them, and times as PostgreSQL can hold them.

A point's row is bytes of COPY's binary format. Its columns begin with the table's key, so rows sort by their key: that
is the order in which all writers insert. What repeats from row to row of a stream is made once and kept with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from struct import pack
from typing import Final

from tallymark_collector.model import Evidence, Point, Stream
from tallymark_collector.store import binary

EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
HOUR_NS: Final = 3_600_000_000_000

_ESCAPES: Final = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})

POINT_COLUMNS: Final = "account, time, stream, start_time, part, series, tenant, quantity"
"""The unique key's columns first."""
EVIDENCE_COLUMNS: Final = (
    "time, start_time, account, tenant, meter, trace_id, span_id, quantity, name, service, user_id, attributes"
)

_FIELDS: Final = pack(">h", len(POINT_COLUMNS.split()))
_STAGED_FIELDS: Final = pack(">hi", len(POINT_COLUMNS.split()) + 1, 4)
_STAGED_KEY_FIELDS: Final = pack(">hi", 5 + 1, 4)
_KEY_BYTES: Final = len(_FIELDS) + 4 + (4 + 8) + (4 + 16) + (4 + 8) + (4 + 8)
"""Of a row: up to the end of `part`, less the account's name."""


def copy_text(value: str | None) -> str:
    """A text value for COPY's text format."""
    return "\\N" if value is None else value.translate(_ESCAPES)


@lru_cache(maxsize=65_536)
def timestamp(ns: int) -> str:
    """A time in nanoseconds as a timestamptz literal, cut to the microsecond. An interval's points share theirs."""
    return (EPOCH + timedelta(microseconds=ns // 1000)).isoformat()


def nanoseconds(start_ns: int, time_ns: int) -> int:
    """What timestamptz cannot hold of two times."""
    return time_ns % 1000 * 1000 + start_ns % 1000


def part(point: Point) -> int:
    """What tells the point apart from others of its stream with the same two timestamps: sql/0001_usage.sql."""
    return point.cause or nanoseconds(point.start_ns, point.time_ns)


def point_rows(points: Iterable[Point]) -> list[bytes]:
    """Rows of usage_point, in the points' order."""
    rows = []
    last = None
    time = start_and_part = quantity = b""
    value_of_last = None
    for stream, start_ns, time_ns, value, cause, _ in points:
        # The points of an interval share their times and most often follow each other.
        if (start_ns, time_ns, cause) != last:
            last = start_ns, time_ns, cause
            time = binary.timestamptz(time_ns)
            apart = cause or nanoseconds(start_ns, time_ns)  # `part`, in place
            start_and_part = binary.timestamptz(start_ns) + binary.EIGHT + pack(">q", apart)
        if value is not value_of_last:  # most counts are small, and decoded once
            value_of_last, quantity = value, binary.numeric(str(value))
        account, middle, rest, _ = stream.row or stream_row(stream)
        rows.append(b"".join((account, time, middle, start_and_part, rest, quantity)))
    return rows


def stream_row(stream: Stream) -> tuple[bytes, bytes, bytes, bytes]:
    """What stands before a row's time, between time and start, and between part and quantity; and in its hours' marks
    behind the hour."""
    series = stream.series
    account, tenant = binary.text(series.account), binary.text(series.tenant)
    row = (
        _FIELDS + account + binary.EIGHT,
        binary.SIXTEEN + stream.id.bytes + binary.EIGHT,
        binary.SIXTEEN + series.id.bytes + tenant,
        account + tenant,
    )
    object.__setattr__(stream, "row", row)
    return row


def key(row: bytes) -> bytes:
    """Of a row of usage_point, what stands for the table's unique key; compares as rows do."""
    return row[: _KEY_BYTES + int.from_bytes(row[2:6], "big")]


def staged(position: int, row: bytes) -> bytes:
    """The same row with its position before it."""
    return _STAGED_FIELDS + pack(">i", position) + row[len(_FIELDS) :]


def staged_key(position: int, key: bytes) -> bytes:
    """A row of the position and the unique key's columns."""
    return _STAGED_KEY_FIELDS + pack(">i", position) + key[len(_FIELDS) :]


def mark_rows(points: Sequence[Point]) -> set[bytes]:
    """Rows of usage_dirty (bucket, account, tenant), one for each account's hour that has some of the points."""
    if not points:
        return set()
    times = [point.time_ns for point in points]
    hour = min(times) // HOUR_NS
    if hour == max(times) // HOUR_NS:  # as what is sent as it happens
        streams = {hour: {point.stream for point in points}}
    else:
        streams = defaultdict(set)
        for point in points:
            streams[point.time_ns // HOUR_NS].add(point.stream)
    return {
        start + (stream.row or stream_row(stream))[-1]
        for start, marked in ((_mark_start(hour), marked) for hour, marked in streams.items())
        for stream in marked
    }


@lru_cache(maxsize=1024)
def _mark_start(hour: int) -> bytes:
    return pack(">h", 3) + binary.EIGHT + binary.timestamptz(hour * HOUR_NS)


def evidence_line(position: int, item: Evidence, attributes: str) -> str:
    """A row of usage_evidence with its position before it, in COPY's text format."""
    texts = (item.account, item.tenant, item.meter)
    more = (item.name, item.service, item.user, attributes)
    return (
        f"{position}\t{timestamp(item.time_ns)}\t{timestamp(item.start_ns)}\t"
        + "\t".join(map(copy_text, texts))
        + f"\t\\\\x{item.trace_id.hex()}\t\\\\x{item.span_id.hex()}\t{item.quantity}\t"
        + "\t".join(map(copy_text, more))
        + "\n"
    )
