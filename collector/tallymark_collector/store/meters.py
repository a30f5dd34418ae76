"""The meters that a tenant charges for: those of its plans, each as it was applied last."""

from __future__ import annotations

from typing import Final

from tallymark_collector.processors.meters import Meter
from tallymark_collector.store.database import Connection

_METERS_SQL: Final = """
SELECT DISTINCT u.key, u.value
FROM (
    SELECT DISTINCT ON (plan) document FROM plan_version WHERE tenant = %(tenant)s ORDER BY plan, version DESC
) v
CROSS JOIN LATERAL jsonb_each_text(v.document -> 'units') u
ORDER BY u.key, u.value LIMIT %(limit)s"""


async def of_tenant(connection: Connection, tenant: str, limit: int) -> list[Meter]:
    """A tenant's meters, so many at most."""
    arguments = {"tenant": tenant, "limit": limit}
    return [(name, unit) for name, unit in await (await connection.execute(_METERS_SQL, arguments)).fetchall()]
