"""Open items of the quarantine that could still be billed, and so hold the points of their time back.

Once the points of a time are dropped, nothing of that time can be billed any more: a replay could not be told. So the
oldest open item that a person may release or attribute bounds what is dropped, until it is settled. What can never be
billed does not: reasons and kinds without a release, spans that are evidence, control totals, and what lies in a time
that has been dropped already, or in none.

It is asked anew for each piece of points, and what may have come since, or was opened again, once more when the piece
is about to go: comparing it may have taken long. Then nobody is about to add an item or to open one again either, since
each shares `KEPT` before (`store.quarantined`, `quarantine.settling`), so what has been acknowledged has been seen.
What comes after the piece has gone is of a time that has been dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from tallymark import conventions
from tallymark_collector.aggregates.stopping import Asking
from tallymark_collector.model import Reason
from tallymark_collector.quarantine import reading
from tallymark_collector.quarantine.items import ID_SHOWN
from tallymark_collector.quarantine.rules import UNKNOWN, Kind, rule
from tallymark_collector.settings import Retention
from tallymark_collector.store import Store
from tallymark_collector.store.database import Connection

PAGE: Final = 256
"""Items that are asked for at once, and looked into before others have their turn: some ten milliseconds."""
PAGE_BYTES: Final = 4 * 1024 * 1024
"""The same of their payloads together; one that is larger, up to a whole request, is fetched by itself."""

LONGEST: Final = timedelta(hours=1)
"""No transaction that adds an item takes as long (`settings.DATABASE_TIMEOUT`). An item says when its transaction
began, and is seen once that has ended."""

NEVER: Final = [
    reason.value
    for reason in Reason
    if all(rule(reason.value, metered=metered).refusal(kind) for kind in Kind for metered in (False, True))
]
"""Reasons of what cannot be released, whatever it is. What a newer version alone knows is none of them."""

# Levels and points may have been dropped until different times: which of the two it is, the payload says.
_WHAT: Final = """
q.time, q.digest, q.account, q.tenant, q.meter, q.reason, q.signal, q.metered, q.time >= k.points_from,
       q.time >= k.levels_from, octet_length(q.payload)"""

_LAST: Final = """
LEFT JOIN LATERAL (
    SELECT a.action, a.acted_at FROM quarantine_action a WHERE a.account = q.account AND a.digest = q.digest
    ORDER BY a.number DESC LIMIT 1
) last ON true"""

_OPEN: Final = """
  AND (q.signal = 'metrics' OR q.metered) AND NOT starts_with(q.meter, %(control)s) AND q.reason <> ALL (%(never)s)
  AND coalesce(last.action, 'reopened') = 'reopened'"""

_PAGE: Final = """
  AND q.time >= %(time)s AND (q.time, q.digest, q.account) > (%(time)s, %(digest)s, %(account)s)
ORDER BY q.time, q.digest, q.account LIMIT %(limit)s"""

_CANDIDATES_SQL: Final = f"""
SELECT {_WHAT}
FROM usage_quarantine q
CROSS JOIN usage_kept k
{_LAST}
WHERE q.time < %(before)s AND q.time >= least(k.points_from, k.levels_from) {_OPEN} {_PAGE}"""  # noqa: S608 - ours

# From what is recent on, by indexes of that: of what came and was settled before, however much it is, nothing is read.
# Of the time that is to go alone.
_SINCE_SQL: Final = f"""
WITH since AS (
    SELECT %(looked)s::timestamptz - %(longest)s::interval AS moment
), recent AS MATERIALIZED (
    SELECT account, digest FROM (
        SELECT account, digest, time FROM usage_quarantine
        WHERE recorded_at >= (SELECT moment FROM since) ORDER BY recorded_at OFFSET 0
    ) came
    WHERE time < %(before)s
    UNION
    SELECT account, digest FROM (
        SELECT account, digest FROM quarantine_action
        WHERE action = 'reopened' AND acted_at >= (SELECT moment FROM since) ORDER BY acted_at OFFSET 0
    ) reopened
)
SELECT {_WHAT}
FROM recent r
CROSS JOIN LATERAL (
    SELECT * FROM usage_quarantine WHERE account = r.account AND digest = r.digest LIMIT 1
) q
CROSS JOIN usage_kept k
{_LAST}
WHERE q.time < %(before)s AND q.time >= CASE WHEN %(of_levels)s THEN k.levels_from ELSE k.points_from END
  AND greatest(q.recorded_at, last.acted_at) >= (SELECT moment FROM since) {_OPEN} {_PAGE}"""  # noqa: S608 - ours

_PAYLOADS_SQL: Final = """
SELECT k.place - 1, q.payload
FROM unnest(%s::text[], %b::bytea[]) WITH ORDINALITY AS k (account, digest, place)
CROSS JOIN LATERAL (
    SELECT payload FROM usage_quarantine WHERE account = k.account AND digest = k.digest LIMIT 1
) q
ORDER BY 1"""


class Unsettled(NamedTuple):
    """An open item that could be billed."""

    time: datetime
    digest: bytes
    account: str
    tenant: str
    meter: str
    reason: str
    signal: str
    metered: bool
    has_points: bool
    """Points of its time are kept."""
    has_levels: bool
    """The same of levels."""
    size: int
    """Bytes of its payload."""

    def may_be_billed(self, payload: bytes) -> bool:
        """True if a release could store it."""
        kind = reading.read(self.signal, payload, metered=self.metered).kind
        found = rule(self.reason, metered=self.metered)
        if found is not UNKNOWN and (kind in (Kind.OTHER, Kind.CONTROL) or found.refusal(kind) is not None):
            return False
        return self.has_levels if kind is Kind.LEVEL else self.has_points


async def oldest_unsettled(connection: Connection, before: datetime) -> Unsettled | None:
    """The oldest open item from before that time that could still be billed."""
    return await _first(connection.execute, _CANDIDATES_SQL, {"before": before})


async def _first(ask: Asking, statement: str, asked: Mapping[str, object]) -> Unsettled | None:
    """The first of what is asked for that could be billed."""
    place: dict[str, object] = {"time": "-infinity", "digest": b"", "account": ""}
    given = {**asked, "control": f"{conventions.CONTROL_SCOPE}.", "never": NEVER, "limit": PAGE}
    while True:
        found = [Unsettled(*row) for row in await (await ask(statement, {**given, **place})).fetchall()]
        for some in _within(found, PAGE_BYTES):
            keys = [[item.account for item in some], [item.digest for item in some]]
            payloads = await (await ask(_PAYLOADS_SQL, keys)).fetchall()
            for position, payload in payloads:
                if some[position].may_be_billed(payload):
                    return some[position]
        if len(found) < PAGE:
            return None
        place = {"time": found[-1].time, "digest": found[-1].digest, "account": found[-1].account}


def _within(found: Sequence[Unsettled], most: int) -> Iterator[Sequence[Unsettled]]:
    """The items in groups, whose payloads come to so many bytes at most together; what is larger is one by itself."""
    first = size = 0
    for place, item in enumerate(found):
        if place > first and size + item.size > most:
            yield found[first:place]
            first, size = place, 0
        size += item.size
    if found:
        yield found[first:]


async def with_unsettled(connection: Connection, bounds: Mapping[str, object], before: datetime) -> dict[str, object]:
    """The bounds with the time of the oldest open item from before that time, and when that was looked for."""
    [looked] = await (await connection.execute("SELECT clock_timestamp()")).fetchone() or [None]
    item = await oldest_unsettled(connection, before) if bounds["keep_unsettled"] else None
    return {**bounds, "looked": looked, "unsettled": None if item is None else item.time}


async def opened_since(ask: Asking, bounds: Mapping[str, object], until: datetime, *, of_levels: bool = False) -> bool:
    """True if since `with_unsettled` an item from before `until` was set aside, or opened again, that could be
    billed."""
    if not bounds["keep_unsettled"]:
        return False
    asked = {"before": until, "looked": bounds["looked"], "longest": LONGEST, "of_levels": of_levels}
    return await _first(ask, _SINCE_SQL, asked) is not None


async def held_by_quarantine(store: Store, retention: Retention, now: datetime) -> str | None:
    """What a log should say where points stay for an open item's sake; None where none is old enough."""
    if retention.points is None or not retention.keep_unsettled:
        return None
    async with store.session() as connection:
        item = await oldest_unsettled(connection, now - retention.points)
    if item is None:
        return None
    shown = item.digest.hex()[:ID_SHOWN]
    return (
        f"points from {item.time.isoformat()} on are kept although they are old: the quarantine has open items of that"
        f" time, the oldest is {shown} ({item.reason}, meter {item.meter!r}, tenant {item.tenant!r}), and nobody can be"
        " billed for it once the points of its time are dropped: attribute, release or discard it with `tallymark"
        " quarantine`; --drop-unsettled does not wait for that"
    )
