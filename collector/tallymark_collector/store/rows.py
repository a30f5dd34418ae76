"""Values as COPY's text format has them, and times as PostgreSQL can hold them."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import Final

from tallymark_collector.model import Evidence, Point, Stream

EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
HOUR_NS: Final = 3_600_000_000_000

_ESCAPES: Final = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})

POINT_COLUMNS: Final = "time, start_time, stream, series, part, account, tenant, quantity"
EVIDENCE_COLUMNS: Final = (
    "time, start_time, account, tenant, meter, trace_id, span_id, quantity, name, service, user_id, attributes"
)


def copy_text(value: str | None) -> str:
    """A text value for COPY."""
    return "\\N" if value is None else value.translate(_ESCAPES)


@lru_cache(maxsize=65_536)
def timestamp(ns: int) -> str:
    """A time in nanoseconds as a timestamptz literal, cut to the microsecond. An interval's points share theirs."""
    return (EPOCH + timedelta(microseconds=ns // 1000)).isoformat()


def hour_start(hour: int) -> datetime:
    """Start of an hour that is counted from the Unix epoch: the bucket of every time with `ns // HOUR_NS == hour`."""
    return EPOCH + timedelta(hours=hour)


def part(point: Point) -> int:
    """What tells the point apart from others of its stream with the same two timestamps (see sql/0001_usage.sql)."""
    return point.cause or nanoseconds(point.start_ns, point.time_ns)


def nanoseconds(start_ns: int, time_ns: int) -> int:
    """What timestamptz cannot hold of two times."""
    return time_ns % 1000 * 1000 + start_ns % 1000


def point_line(point: Point) -> str:
    """A row of usage_point."""
    stream, start_ns, time_ns, value = point[:4]
    ids, names = _stream_columns(stream)
    return f"{timestamp(time_ns)}\t{timestamp(start_ns)}\t{ids}\t{part(point)}\t{names}\t{value}\n"


@lru_cache(maxsize=200_000)
def _stream_columns(stream: Stream) -> tuple[str, str]:
    """What every row of a stream repeats. Streams are compared by identity here, which is what makes it fast."""
    series = stream.series
    return f"{stream.id}\t{series.id}", f"{copy_text(series.account)}\t{copy_text(series.tenant)}"


def evidence_line(item: Evidence, attributes: str) -> str:
    """A row of usage_evidence."""
    texts = (item.account, item.tenant, item.meter)
    more = (item.name, item.service, item.user, attributes)
    return (
        f"{timestamp(item.time_ns)}\t{timestamp(item.start_ns)}\t"
        + "\t".join(map(copy_text, texts))
        + f"\t\\\\x{item.trace_id.hex()}\t\\\\x{item.span_id.hex()}\t{item.quantity}\t"
        + "\t".join(map(copy_text, more))
        + "\n"
    )
