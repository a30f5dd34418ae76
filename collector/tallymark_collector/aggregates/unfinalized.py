"""Billing periods that wait for their invoice, and so hold their points back.

A tenant that has finalised an invoice means to finalise the others: of the periods that were still held by
`billing_grace` then, and of all later ones, points stay until the period is finalised. Where nobody finalises, and in
what was over by then, age and that grace decide as they always did.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from tallymark_collector.settings import Retention
from tallymark_collector.store import Store

WAITING_SQL: Final = """
SELECT b.tenant, b.account, b.period_start FROM billing_period b
WHERE b.period_end > (
      SELECT min(d.finalized_at) - %(grace)s::interval FROM invoice_document d WHERE d.tenant = b.tenant
  )
  AND NOT EXISTS (
      SELECT FROM invoice_document d
      WHERE d.account = b.account AND d.period_start = b.period_start AND d.tenant = b.tenant
  )"""
"""Periods that wait, those that have not ended among them."""

_HELD_SQL: Final = f"""
SELECT count(*), min(w.period_start), (array_agg(w.account ORDER BY w.period_start, w.account))[1]
FROM ({WAITING_SQL} AND b.period_end <= %(billed)s) w WHERE w.period_start < %(wanted)s"""  # noqa: S608 - ours


async def held_back(store: Store, retention: Retention, now: datetime) -> str | None:
    """What a log should say where points stay that are old enough to go; None where nothing but their age decides."""
    if retention.points is None or not retention.keep_unfinalized:
        return None
    grace = retention.billing_grace
    bounds = {"wanted": now - retention.points, "billed": now - grace, "grace": grace}
    async with store.reading() as connection:
        row = await (await connection.execute(_HELD_SQL, bounds)).fetchone()
    if row is None or not row[0]:
        return None
    return (
        f"points from {row[1].isoformat()} on are kept although they are old: {row[0]} billing periods are not"
        f" finalised, the first of account {row[2]!r}; `tallymark invoice --finalize` does that, --drop-unfinalized"
        " does not wait for it"
    )
