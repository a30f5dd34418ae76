"""Streams and series: written once, before the first point that names them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from uuid import UUID

from tallymark import conventions
from tallymark_collector.model import Series, Stream, attributes_json, without_nul
from tallymark_collector.store.database import Connection
from tallymark_collector.store.latest import Latest
from tallymark_collector.store.source_streams import Known

MAX_REMEMBERED: Final = 500_000
"""Streams that a process remembers to have written; at the limit it forgets all and asks the database again."""

_SERIES_SQL: Final = """
INSERT INTO usage_series
    (account, series, tenant, meter, unit, plan, route, method, status_code, error_type, attributes)
SELECT * FROM unnest(%s::text[], %s::uuid[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[],
                     %s::int[], %s::text[], %s::jsonb[])
ON CONFLICT DO NOTHING"""

_STREAM_SQL: Final = """
INSERT INTO usage_stream (account, stream, series, tenant, temporality, scope, resource)
SELECT * FROM unnest(%s::text[], %s::uuid[], %s::uuid[], %s::text[], %s::smallint[], %s::text[], %s::jsonb[])
ON CONFLICT DO NOTHING"""


_THERE_SQL: Final = """
SELECT stream FROM unnest(%s::text[], %s::uuid[]) AS k (account, stream) JOIN usage_stream USING (account, stream)"""


class Dictionaries:
    """Which streams this process knows to be committed. What a transaction adds counts only after its commit."""

    def __init__(self) -> None:
        self.latest: Final = Latest()
        self.sources = Known()
        self._committed: set[tuple[int, int]] = set()  # of ids: an integer hashes in no time
        # A stream may have several series: a file of meters takes dimensions from resources and spans, which vary.

    def unknown(self, streams: Iterable[Stream]) -> list[Stream]:
        """The streams that still have to be registered, each once, in the order in which all writers insert them. Of
        two with one identity (a resource decorated otherwise), the first stays."""
        found: dict[tuple[int, int], Stream] = {}
        for stream in streams:
            key = _key(stream)
            if key not in self._committed:
                found.setdefault(key, stream)
        return [found[identity] for identity in sorted(found)]

    def forget(self) -> None:
        """The database may be another one than before (a standby, a restored copy): what it holds is unknown again."""
        self._committed.clear()
        self.sources = Known()  # and not emptied: a transaction may be at work with the other

    def remember(self, streams: Iterable[Stream]) -> None:
        """Says that these streams are committed."""
        if len(self._committed) > MAX_REMEMBERED:
            self._committed.clear()
        self._committed.update(map(_key, streams))


def _key(stream: Stream) -> tuple[int, int]:
    return stream.id.int, stream.series.id.int


async def register(connection: Connection, streams: list[Stream]) -> None:
    """Adds streams and their series, in one round trip; what is there already stays as it is."""
    found = {stream.series.id: stream.series for stream in streams}
    series = [_series_row(found[identity]) for identity in sorted(found)]
    async with connection.pipeline():
        await connection.execute(_SERIES_SQL, _columns(series))
        await connection.execute(_STREAM_SQL, _columns([_stream_row(stream) for stream in streams]))


async def there(connection: Connection, streams: list[Stream]) -> set[UUID]:
    """Which of the streams have been written."""
    rows = await connection.execute(_THERE_SQL, [[s.series.account for s in streams], [s.id for s in streams]])
    return {identity for (identity,) in await rows.fetchall()}


def _series_row(series: Series) -> tuple[object, ...]:
    attributes = series.attributes
    status = attributes.get(conventions.HTTP_STATUS)
    texts = (conventions.PLAN, conventions.HTTP_ROUTE, conventions.HTTP_METHOD)
    return (
        series.account,
        series.id,
        series.tenant,
        series.meter,
        series.unit,
        *(_text(attributes.get(name)) for name in texts),
        status if isinstance(status, int) and 0 <= status < 1000 else None,
        _text(attributes.get(conventions.ERROR_TYPE)),
        attributes_json(attributes),
    )


def _stream_row(stream: Stream) -> tuple[object, ...]:
    series = stream.series
    return (
        series.account,
        stream.id,
        series.id,
        series.tenant,
        int(stream.temporality),
        without_nul(stream.scope_name),
        attributes_json(stream.resource),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _columns(rows: list[tuple[object, ...]]) -> list[list[object]]:
    return [list(column) for column in zip(*rows, strict=True)]
