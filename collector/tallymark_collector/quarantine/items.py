"""The queue and its trail, read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple

from tallymark import conventions
from tallymark_collector.errors import NotThere, UserError
from tallymark_collector.store.database import Connection

ID_SHOWN: Final = 12
"""Hexadecimal digits of an id that people are shown: 48 bits."""
MIN_PREFIX: Final = 4
MAX_CANDIDATES: Final = 5
"""Ids that a prefix may mean, as an error lists them."""


class Entry(NamedTuple):
    """An open item as the queue shows it."""

    id: str
    tenant: str
    account: str
    meter: str
    reason: str
    detail: str
    signal: str
    time: datetime | None
    recorded_at: datetime


class Action(NamedTuple):
    """Something that was done with an item."""

    id: str
    tenant: str
    account: str
    meter: str
    reason: str
    signal: str
    time: datetime | None
    number: int
    action: str
    acted_at: datetime
    database_user: str
    acted_by: str
    because: str
    changed: dict[str, Any]
    billed_to: str | None
    quantity: Decimal | None
    inserted: int
    duplicates: int
    evidence: int

    def sentence(self) -> str:
        """Who did what, when and why."""
        why = f": {self.because}" if self.because else ""
        return f"{self.action} by {self.acted_by} (database user {self.database_user}) at {self.acted_at:%FT%TZ}{why}"


class Item(NamedTuple):
    """An item as it is kept."""

    account: str
    digest: bytes
    tenant: str
    meter: str
    reason: str
    detail: str
    signal: str
    time: datetime | None
    recorded_at: datetime
    payload: bytes
    metered: bool = False
    """True if a file of meters made it usage of `meter`."""

    @property
    def id(self) -> str:
        """The item's name for people, in full."""
        return self.digest.hex()


@dataclass(frozen=True, slots=True)
class Filter:
    """Which open items are meant."""

    tenant: str
    account: str | None = None
    meter: str | None = None
    reason: str | None = None
    since: datetime | None = None
    """Arrived at this instant or later."""
    start: datetime | None = None
    end: datetime | None = None
    """Their own time lies in `[start, end)`; those without a time are meant too."""

    def arguments(self) -> dict[str, object]:
        """For the queries."""
        return {name: getattr(self, name) for name in self.__slots__}


_WHERE: Final = """
WHERE tenant = %(tenant)s
  AND (%(account)s::text IS NULL OR account = %(account)s)
  AND (%(meter)s::text IS NULL OR meter = %(meter)s)
  AND (%(reason)s::text IS NULL OR reason = %(reason)s)
  AND (%(since)s::timestamptz IS NULL OR recorded_at >= %(since)s)
  AND (%(start)s::timestamptz IS NULL OR time IS NULL OR time >= %(start)s)
  AND (%(end)s::timestamptz IS NULL OR time IS NULL OR time < %(end)s)"""

_OPEN_SQL: Final = f"""
SELECT id, tenant, account, meter, reason, detail, signal, time, recorded_at
FROM usage_quarantine_open {_WHERE}
  AND (%(after)s::text IS NULL OR (recorded_at, id) > (%(after_time)s::timestamptz, %(after)s::text))
ORDER BY recorded_at, id LIMIT %(limit)s"""  # noqa: S608 - a constant of ours

_SUMMARY_SQL: Final = f"""
SELECT reason, count(*) FROM usage_quarantine_open {_WHERE} GROUP BY reason ORDER BY reason"""  # noqa: S608

# Totals of a stream in their order: then none of them corrects another.
_IDS_SQL: Final = f"""
SELECT id FROM usage_quarantine_open {_WHERE} ORDER BY time NULLS FIRST, id"""  # noqa: S608 - a constant of ours

_BY_PREFIX_SQL: Final = """
SELECT encode(digest, 'hex')
FROM usage_quarantine
WHERE digest BETWEEN decode(rpad(%(prefix)s, 32, '0'), 'hex') AND decode(rpad(%(prefix)s, 32, 'f'), 'hex')
  AND tenant = %(tenant)s
ORDER BY digest LIMIT %(limit)s"""

_BY_ID_SQL: Final = """
SELECT account, digest, tenant, meter, reason, detail, signal, time, recorded_at, payload, metered
FROM usage_quarantine WHERE digest = decode(%(id)s, 'hex') AND tenant = %(tenant)s LIMIT 1"""

_HISTORY_SQL: Final = """
SELECT id, tenant, account, meter, reason, signal, time, number, action, acted_at, database_user, acted_by, because,
       changed, billed_to, quantity, inserted, duplicates, evidence
FROM usage_quarantine_history
WHERE tenant = %(tenant)s ORDER BY acted_at DESC, id, number DESC LIMIT %(limit)s"""

# By the key: the view has the digest as text.
_OF_ITEM_SQL: Final = """
SELECT encode(digest, 'hex'), tenant, account, %(meter)s::text, %(reason)s::text, %(signal)s::text,
       %(time)s::timestamptz, number, action, acted_at, database_user, acted_by, because, changed, billed_to, quantity,
       inserted, duplicates, evidence
FROM quarantine_action WHERE account = %(account)s AND digest = %(digest)s ORDER BY number DESC LIMIT %(limit)s"""

_ON_INVOICE_SQL: Final = f"""
SELECT count(*) FROM usage_quarantine_open {_WHERE}
  AND (signal = 'metrics' OR metered) AND NOT starts_with(meter, %(control)s)"""  # noqa: S608 - a constant of ours


async def open_items(
    connection: Connection, wanted: Filter, limit: int, after: tuple[datetime, str] | None = None
) -> list[Entry]:
    """Open items, the oldest arrival first, `limit` at most; `after`: behind the one of that arrival and id."""
    time, item_id = after or (None, None)
    found = await connection.execute(
        _OPEN_SQL, {**wanted.arguments(), "limit": limit, "after_time": time, "after": item_id}
    )
    return [Entry(*row) for row in await found.fetchall()]


async def open_ids(connection: Connection, wanted: Filter) -> list[str]:
    """The ids of all open items, in the order of their own times."""
    return [row[0] for row in await (await connection.execute(_IDS_SQL, wanted.arguments())).fetchall()]


async def summary(connection: Connection, wanted: Filter) -> Mapping[str, int]:
    """How many items are open, by reason."""
    return dict(await (await connection.execute(_SUMMARY_SQL, wanted.arguments())).fetchall())


async def beside_invoice(connection: Connection, tenant: str, account: str, start: datetime, end: datetime) -> int:
    """Open items of usage in a period that name the account; '' of those that name none."""
    wanted = Filter(tenant, account, start=start, end=end).arguments()
    prefix = f"{conventions.CONTROL_SCOPE}."
    [counted] = await (await connection.execute(_ON_INVOICE_SQL, {**wanted, "control": prefix})).fetchone() or [0]
    return int(counted)


async def find(connection: Connection, tenant: str, prefix: str) -> Item:
    """The one item, open or not, whose id begins so. Raises as `find_id`."""
    return await read(connection, tenant, await find_id(connection, tenant, prefix))


async def read(connection: Connection, tenant: str, item_id: str) -> Item:
    """The item of that whole id, which there is."""
    [row] = await (await connection.execute(_BY_ID_SQL, {"id": item_id, "tenant": tenant})).fetchall()
    return Item(*row)


async def find_id(connection: Connection, tenant: str, prefix: str) -> str:
    """The one id of an item, open or not, that begins so. Raises UserError where the text is no such beginning, or that
    of several, NotThere where there is none."""
    text = prefix.lower()
    if not re.fullmatch(r"[0-9a-f]{1,32}", text):
        raise UserError(
            f"{prefix[:64]!r} is no id of an item: up to 32 hexadecimal digits, as `quarantine list` shows them"
        )
    if len(text) < MIN_PREFIX:
        raise UserError(f"the id {prefix!r} is too short: give at least {MIN_PREFIX} digits")
    arguments = {"prefix": text, "tenant": tenant, "limit": MAX_CANDIDATES}
    found = [row[0] for row in await (await connection.execute(_BY_PREFIX_SQL, arguments)).fetchall()]
    if not found:
        raise NotThere(f"no item of tenant {tenant!r} in quarantine has an id that begins with {prefix!r}")
    if len(found) > 1:
        raise UserError(
            f"the id {prefix!r} is ambiguous: {', '.join(found)}"
            f"{' and maybe others' if len(found) == MAX_CANDIDATES else ''}; give more digits"
        )
    return str(found[0])


async def payload_size(connection: Connection, tenant: str, item_id: str) -> int:
    """Bytes of what is kept of an item; 0 where there is none of that whole id."""
    found = await connection.execute(
        "SELECT octet_length(payload) FROM usage_quarantine WHERE digest = decode(%s, 'hex') AND tenant = %s",
        [item_id, tenant],
    )
    [size] = await found.fetchone() or [0]
    return int(size)


async def history(connection: Connection, tenant: str, item: Item | None, limit: int | None) -> list[Action]:
    """What was done, with one item or with any, the latest first."""
    if item is None:
        found = await connection.execute(_HISTORY_SQL, {"tenant": tenant, "limit": limit})
    else:
        found = await connection.execute(_OF_ITEM_SQL, {**item._asdict(), "limit": limit})
    return [Action(*row) for row in await found.fetchall()]


def state(done: Sequence[Action]) -> str:
    """ "open", or what closed an item; `done` is its history, the latest first."""
    return "open" if not done or done[0].action == "reopened" else done[0].action


async def last_action(connection: Connection, item: Item) -> Action | None:
    """The last that was done with the item."""
    found: Sequence[Action] = await history(connection, item.tenant, item, 1)
    return found[0] if found else None
