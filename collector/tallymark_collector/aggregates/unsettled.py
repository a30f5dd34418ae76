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

from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from tallymark import conventions
from tallymark_collector.model import Reason
from tallymark_collector.quarantine import reading
from tallymark_collector.quarantine.items import ID_SHOWN
from tallymark_collector.quarantine.rules import UNKNOWN, Kind, rule
from tallymark_collector.settings import Retention
from tallymark_collector.store import Store
from tallymark_collector.store.database import Connection

PAGE: Final = 256
"""Items that are looked into before others have their turn: some ten milliseconds."""

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
_OPEN_SQL: Final = """
SELECT q.time, q.digest, q.account, q.tenant, q.meter, q.reason, q.signal, q.metered, q.payload,
       q.time >= k.points_from, q.time >= k.levels_from
FROM usage_quarantine q
CROSS JOIN usage_kept k
LEFT JOIN LATERAL (
    SELECT a.action, a.acted_at FROM quarantine_action a WHERE a.account = q.account AND a.digest = q.digest
    ORDER BY a.number DESC LIMIT 1
) last ON true
WHERE q.time < %(before)s
  AND (q.signal = 'metrics' OR q.metered) AND NOT starts_with(q.meter, %(control)s) AND q.reason <> ALL (%(never)s)
  AND coalesce(last.action, 'reopened') = 'reopened'"""

_CANDIDATES_SQL: Final = f"""
{_OPEN_SQL} AND q.time >= least(k.points_from, k.levels_from)
  AND q.time >= %(time)s AND (q.time, q.digest, q.account) > (%(time)s, %(digest)s, %(account)s)
ORDER BY q.time, q.digest, q.account LIMIT %(limit)s"""

# Of the time that is to go alone: of times before, however much may be there, nothing is looked at.
_SINCE_SQL: Final = f"""
{_OPEN_SQL} AND q.time >= (SELECT CASE WHEN %(of_levels)s THEN levels_from ELSE points_from END FROM usage_kept)
  AND greatest(q.recorded_at, last.acted_at) >= %(looked)s::timestamptz - %(longest)s::interval
ORDER BY q.time LIMIT %(limit)s"""  # noqa: S608 - a constant of ours


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
    payload: bytes
    has_points: bool
    """Points of its time are kept."""
    has_levels: bool
    """The same of levels."""

    @property
    def may_be_billed(self) -> bool:
        """True if a release could store it."""
        kind = reading.read(self.signal, self.payload, metered=self.metered).kind
        found = rule(self.reason, metered=self.metered)
        if found is not UNKNOWN and (kind in (Kind.OTHER, Kind.CONTROL) or found.refusal(kind) is not None):
            return False
        return self.has_levels if kind is Kind.LEVEL else self.has_points


async def oldest_unsettled(connection: Connection, before: datetime) -> Unsettled | None:
    """The oldest open item from before that time that could still be billed."""
    async for item in _candidates(connection, before):
        if item.may_be_billed:
            return item
    return None


async def _candidates(connection: Connection, before: datetime) -> AsyncIterator[Unsettled]:
    place: dict[str, object] = {"time": "-infinity", "digest": b"", "account": ""}
    while True:
        found = await _page(connection, _CANDIDATES_SQL, {**place, "before": before})
        for item in found:
            yield item
        if len(found) < PAGE:
            return
        place = {"time": found[-1].time, "digest": found[-1].digest, "account": found[-1].account}


async def _page(connection: Connection, statement: str, asked: Mapping[str, object]) -> list[Unsettled]:
    arguments = {**asked, "control": f"{conventions.CONTROL_SCOPE}.", "never": NEVER, "limit": PAGE}
    return [Unsettled(*row) for row in await (await connection.execute(statement, arguments)).fetchall()]


async def with_unsettled(connection: Connection, bounds: Mapping[str, object], before: datetime) -> dict[str, object]:
    """The bounds with the time of the oldest open item from before that time, and when that was looked for."""
    [looked] = await (await connection.execute("SELECT clock_timestamp()")).fetchone() or [None]
    item = await oldest_unsettled(connection, before) if bounds["keep_unsettled"] else None
    return {**bounds, "looked": looked, "unsettled": None if item is None else item.time}


async def opened_since(
    connection: Connection, bounds: Mapping[str, object], until: datetime, *, of_levels: bool = False
) -> bool:
    """True if since `with_unsettled` an item from before `until` was set aside, or opened again, that could be billed;
    also where there are more than can be looked into while everybody waits."""
    if not bounds["keep_unsettled"]:
        return False
    asked = {"before": until, "looked": bounds["looked"], "longest": LONGEST, "of_levels": of_levels}
    found = await _page(connection, _SINCE_SQL, asked)
    return len(found) == PAGE or any(item.may_be_billed for item in found)


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
