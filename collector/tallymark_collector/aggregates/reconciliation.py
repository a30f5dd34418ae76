"""Do the spans show what the SDK wrote on spans? Its counts of evidence against the evidence that is stored.

Usage that no sampled span carried is on neither side, so that the two can be compared exactly under any sampling. A
call is counted when it is recorded; its span arrives when it has ended. So at the edges of a range, the present among
them, the other side is given a tolerance.

A span names a meter without its unit, and the tracer's resource need not be the SDK's: what is compared is the sum of
an account and a meter. It reads the counts and the evidence of the range once each. Spans that have been dropped for
their age are not missing: the range begins behind them.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final, NamedTuple

from tallymark_collector.aggregates.completeness import TOLERANCE
from tallymark_collector.store.database import Connection


class EvidenceBalance(NamedTuple):
    """One account and meter. `missing` and `more` allow for what may still be on its way; at most one is not 0."""

    tenant: str
    account: str
    meter: str
    counted: Decimal
    """What producers say is on spans."""
    shown: Decimal
    """What the stored spans show."""
    missing: Decimal
    more: Decimal
    """On spans that no producer has counted: written by others."""


_BALANCE_SQL: Final = """
WITH bounds AS (
    SELECT first, least(%(end)s::timestamptz, now() - %(tolerance)s::interval) AS last,
           first - %(tolerance)s::interval AS earliest, %(end)s::timestamptz + %(tolerance)s::interval AS latest
    FROM (SELECT greatest(%(start)s::timestamptz, evidence_from + %(tolerance)s::interval) AS first FROM usage_kept) k
), counted AS (
    SELECT tenant, account, meter, sum(quantity) AS around,
           coalesce(sum(quantity) FILTER (WHERE time >= first AND time < last), 0) AS inside
    FROM usage_evidence_count, bounds
    WHERE (%(tenant)s::text IS NULL OR tenant = %(tenant)s)
      AND (%(account)s::text IS NULL OR account = %(account)s) AND time >= earliest AND time < latest
    GROUP BY 1, 2, 3
), shown AS (
    SELECT tenant, account, meter, sum(quantity) AS around,
           coalesce(sum(quantity) FILTER (WHERE time >= first AND time < last), 0) AS inside
    FROM usage_evidence, bounds
    WHERE (%(tenant)s::text IS NULL OR tenant = %(tenant)s)
      AND (%(account)s::text IS NULL OR account = %(account)s) AND time >= earliest AND time < latest
    GROUP BY 1, 2, 3
)
SELECT c.tenant, c.account, c.meter, c.around, coalesce(s.around, 0),
       greatest(c.inside - coalesce(s.around, 0), 0), greatest(coalesce(s.inside, 0) - c.around, 0)
FROM counted c LEFT JOIN shown s USING (tenant, account, meter)
ORDER BY 1, 2, 3"""


async def reconcile(
    connection: Connection,
    *,
    tenant: str | None = None,
    account: str | None = None,
    start: datetime | None = None,
    end: datetime | None = None,
    tolerance: timedelta = TOLERANCE,
) -> list[EvidenceBalance]:
    """Every account and meter of which the SDK has written usage on spans, `[start, end)`. The connection must be a
    `store.reading()`."""
    bounds = {
        "tenant": tenant,
        "account": account,
        "start": start or "-infinity",
        "end": end or "infinity",
        "tolerance": tolerance,
    }
    return [EvidenceBalance(*row) for row in await (await connection.execute(_BALANCE_SQL, bounds)).fetchall()]
