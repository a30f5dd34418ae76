"""What is set aside, into usage_quarantine, in the caller's transaction.

The same refusal of the same payload is one row, however often it comes. Items are told by a digest of all that they
are, so making their rows is work; it is done in pieces, as is the insertion, and others have their turn in between.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Final, TypeAlias

from tallymark_collector.model import Quarantined, without_nul
from tallymark_collector.processors.pace import Pace
from tallymark_collector.resting import resting
from tallymark_collector.store import locks, rows
from tallymark_collector.store.database import Connection

PIECE: Final = 1024
"""Items of one statement, and those whose rows are made between two rests."""
PIECE_BYTES: Final = 1024 * 1024
"""The same in bytes of payloads, for what is larger than most; one that is larger still is a piece by itself."""

_INSERT_SQL: Final = """
INSERT INTO usage_quarantine (account, digest, tenant, meter, reason, detail, signal, time, payload, metered)
SELECT * FROM unnest(%s::text[], %b::bytea[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[],
                     %s::timestamptz[], %b::bytea[], %s::boolean[])
ON CONFLICT DO NOTHING"""

_Row: TypeAlias = "tuple[str, bytes, str, str, str, str, str, str | None, bytes, bool]"


async def insert(connection: Connection, items: Iterable[Quarantined]) -> None:
    """Adds items, whoever's; those that are there already stay as they are."""
    found = await resting(_rows(items))
    if not found:
        return
    # What is set aside may hold points back (`aggregates.unsettled`): whoever drops them waits for us, or we for them.
    # After the points, as the marks: whoever drops takes those first.
    await locks.shared(connection, locks.KEPT)
    for piece in _pieces(found):
        await connection.execute(_INSERT_SQL, [list(column) for column in zip(*piece, strict=True)])


def _rows(items: Iterable[Quarantined]) -> Generator[None, None, list[_Row]]:
    """Their rows in the order in which all writers insert them, in pieces (see `resting`)."""
    found: list[_Row] = []
    pace = Pace(PIECE_BYTES)
    for item in items:
        found.append(_row(item))
        if pace.full(max(len(item.payload), PIECE_BYTES // PIECE)):
            yield
    found.sort(key=lambda row: (row[0], row[1]))
    return found


def _pieces(found: Sequence[_Row]) -> Iterator[Sequence[_Row]]:
    first = size = 0
    for place, row in enumerate(found):
        payload = len(row[8])
        if place > first and (place - first == PIECE or size + payload > PIECE_BYTES):
            yield found[first:place]
            first, size = place, 0
        size += payload
    yield found[first:]


def _row(item: Quarantined) -> _Row:
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
