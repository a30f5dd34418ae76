"""The meters that a tenant has: those that any of its usage was written under, and those that its plans charge for."""

from __future__ import annotations

from typing import Final

from tallymark_collector.processors.meters import Meter
from tallymark_collector.store.database import Connection

# From name to the next by the index, past all series of it: a tenant has few meters and may have millions of series.
_METERS_SQL: Final = """
WITH RECURSIVE found (meter, unit) AS (
    (SELECT meter, unit FROM usage_series WHERE tenant = %(tenant)s ORDER BY meter, unit LIMIT 1)
    UNION ALL
    SELECT n.meter, n.unit
    FROM found f
    CROSS JOIN LATERAL (
        SELECT s.meter, s.unit FROM usage_series s
        WHERE s.tenant = %(tenant)s AND (s.meter, s.unit) > (f.meter, f.unit)
        ORDER BY s.meter, s.unit LIMIT 1
    ) n
), written AS (
    SELECT meter, unit FROM found LIMIT %(limit)s
), charged AS (
    SELECT DISTINCT u.key, u.value
    FROM plan_version v CROSS JOIN LATERAL jsonb_each_text(v.document -> 'units') u
    WHERE v.tenant = %(tenant)s LIMIT %(limit)s
)
SELECT meter, unit FROM written UNION SELECT key, value FROM charged LIMIT %(limit)s"""


async def of_tenant(connection: Connection, tenant: str, limit: int) -> list[Meter]:
    """A tenant's meters, so many at most."""
    arguments = {"tenant": tenant, "limit": limit}
    return [(name, unit) for name, unit in await (await connection.execute(_METERS_SQL, arguments)).fetchall()]
