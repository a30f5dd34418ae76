"""Streams and series: written once, before the first point that names them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Final, NamedTuple, TypeVar
from uuid import UUID

from tallymark import conventions
from tallymark_collector.model import Series, Stream, attributes_json, without_nul
from tallymark_collector.processors.pace import Pace
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

# A resource is sent once for all of its streams, and so is a scope: each has a row of its own that repeats them.
_STREAM_SQL: Final = """
INSERT INTO usage_stream (account, stream, series, tenant, temporality, scope, resource)
SELECT account, stream, series, tenant, temporality, (%s::text[])[scope], (%s::jsonb[])[resource]
FROM unnest(%s::text[], %s::uuid[], %s::uuid[], %s::text[], %s::smallint[], %s::int[], %s::int[])
     AS k (account, stream, series, tenant, temporality, scope, resource)
ON CONFLICT DO NOTHING"""

_THERE_SQL: Final = """
SELECT stream FROM unnest(%s::text[], %s::uuid[]) AS k (account, stream) JOIN usage_stream USING (account, stream)"""

PIECE: Final = 1024
"""Rows of one statement, which are made, and written as its arguments, between two rests;"""
PIECE_CHARACTERS: Final = 1 << 18
"""or fewer, where their texts come to more."""
LOOKED_THROUGH: Final = 4096
"""Streams that are looked through between two rests."""

K = TypeVar("K", bound="tuple[int, ...]")
T = TypeVar("T")


class Registration(NamedTuple):
    """New streams and their series as arguments of statements, in the order in which all writers insert them."""

    series: list[list[list[object]]]
    streams: list[list[list[object]]]


class Dictionaries:
    """Which streams this process knows to be committed. What a transaction adds counts only after its commit."""

    def __init__(self) -> None:
        self.latest: Final = Latest()
        self.sources = Known()
        self._committed: set[tuple[int, int]] = set()  # of ids: an integer hashes in no time
        # A stream may have several series: a file of meters takes dimensions from resources and spans, which vary.

    def unknown(self, streams: Iterable[Stream]) -> Generator[None, None, list[Stream]]:
        """The streams that still have to be registered, each once, in the order in which all writers insert them; in
        pieces (see `resting`). Of two with one identity (a resource decorated otherwise), the first stays."""
        found: dict[tuple[int, int], Stream] = {}
        for done, stream in enumerate(streams, 1):
            key = _key(stream)
            if key not in self._committed:
                found.setdefault(key, stream)
            elif not stream.written:
                _has_written(stream)
            if done % LOOKED_THROUGH == 0:
                yield
        return (yield from _in_order(found))

    def forget(self) -> None:
        """The database may be another one than before (a standby, a restored copy): what it holds is unknown again."""
        self._committed.clear()
        self.sources = Known()  # and not emptied: a transaction may be at work with the other

    def remember(self, streams: Iterable[Stream]) -> None:
        """Says that these streams are committed."""
        if len(self._committed) > MAX_REMEMBERED:
            self._committed.clear()
        for stream in streams:
            self._committed.add(_key(stream))
            _has_written(stream)


def _key(stream: Stream) -> tuple[int, int]:
    return stream.id.int, stream.series.id.int


def _has_written(stream: Stream) -> None:
    object.__setattr__(stream, "written", True)


def _in_order(found: Mapping[K, T]) -> Generator[None, None, list[T]]:
    """The values in the order of their keys, which begin with a hash of 128 bits: sorted by their first bytes' shares,
    for nobody could rest within one long sort."""
    shares: dict[int, list[K]] = defaultdict(list)
    for done, key in enumerate(found, 1):
        shares[key[0] >> 120].append(key)
        if done % LOOKED_THROUGH == 0:
            yield
    ordered: list[T] = []
    pace = Pace(LOOKED_THROUGH)
    for _, share in sorted(shares.items()):
        ordered += [found[key] for key in sorted(share)]
        if pace.full(len(share)):
            yield
    return ordered


def registration(streams: Sequence[Stream]) -> Generator[None, None, Registration]:
    """Of streams in their order, in pieces (see `resting`)."""
    if not streams:
        return Registration([], [])
    found = {(stream.series.id.int,): stream.series for stream in streams}
    yield
    series = yield from _in_order(found)
    return Registration((yield from _series_pieces(series)), (yield from _stream_pieces(streams)))


async def register(connection: Connection, new: Registration) -> None:
    """Adds streams and their series; what is there already stays as it is. Others have their turn between the
    statements, none of which waits for the answer to another."""
    async with connection.pipeline():
        for statement, pieces in ((_SERIES_SQL, new.series), (_STREAM_SQL, new.streams)):
            for piece in pieces:
                await connection.execute(statement, piece)
                await asyncio.sleep(0)


async def there(connection: Connection, streams: Sequence[Stream]) -> set[UUID]:
    """Which of the streams have been written."""
    found: set[UUID] = set()
    for start in range(0, len(streams), LOOKED_THROUGH):
        piece = streams[start : start + LOOKED_THROUGH]
        rows = await connection.execute(_THERE_SQL, [[s.series.account for s in piece], [s.id for s in piece]])
        found.update(identity for (identity,) in await rows.fetchall())
    return found


def _series_pieces(series: Iterable[Series]) -> Generator[None, None, list[list[list[object]]]]:
    pieces: list[list[list[object]]] = []
    rows: list[tuple[object, ...]] = []
    size = 0
    for one in series:
        row = _series_row(one)
        rows.append(row)
        size += sum(len(value) for value in row if isinstance(value, str))
        if len(rows) == PIECE or size >= PIECE_CHARACTERS:
            pieces.append(_columns(rows))
            rows, size = [], 0
            yield
    return [*pieces, _columns(rows)] if rows else pieces


def _stream_pieces(streams: Iterable[Stream]) -> Generator[None, None, list[list[list[object]]]]:
    pieces: list[list[list[object]]] = []
    piece = _StreamRows()
    texts: dict[int, str] = {}  # by resource: most often all streams of a process share the object
    for stream in streams:
        text = texts.get(id(stream.resource))
        if text is None:
            text = texts[id(stream.resource)] = attributes_json(stream.resource)
            piece.size += len(text)
        piece.add(stream, text)
        if len(piece.rows) == PIECE or piece.size >= PIECE_CHARACTERS:
            pieces.append(piece.arguments())
            piece = _StreamRows()
            yield
    return [*pieces, piece.arguments()] if piece.rows else pieces


class _StreamRows:
    """Rows of one statement, and the texts that they share."""

    def __init__(self) -> None:
        self.rows: list[tuple[object, ...]] = []
        self.size = 0
        """Characters that were made for it, or are sent."""
        self._scopes: dict[str, int] = {}
        self._resources: dict[str, int] = {}

    def add(self, stream: Stream, resource: str) -> None:
        series = stream.series
        self.rows.append(
            (
                series.account,
                stream.id,
                series.id,
                series.tenant,
                int(stream.temporality),
                self._place(self._scopes, without_nul(stream.scope_name)),
                self._place(self._resources, resource),
            )
        )

    def arguments(self) -> list[list[object]]:
        return [list(self._scopes), list(self._resources), *_columns(self.rows)]

    def _place(self, known: dict[str, int], text: str) -> int:
        """Where it stands among the shared ones, from 1, as SQL counts."""
        place = known.get(text)
        if place is None:
            place = known[text] = len(known) + 1
            self.size += len(text)
        return place


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


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _columns(rows: list[tuple[object, ...]]) -> list[list[object]]:
    return [list(column) for column in zip(*rows, strict=True)]
