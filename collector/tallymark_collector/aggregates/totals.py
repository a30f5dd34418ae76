"""What is counted from totals stays countable when most of them go: those that lie before the dropped points.

Of running totals the last one of each epoch stays: the next is counted from it. Of what a producer says that it has
recorded, the last total of each run and meter stays, from which what came later is told; the one that arrived last,
which says when it was last heard of; and the end of each run. So `completeness` judges what is kept as if all were
there.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from tallymark_collector.store.database import Connection

# One that comes late now, of before that time, is refused with the increase that it brings.
_SAMPLES_SQL: Final = """
WITH old AS (
    SELECT ctid, row_number() OVER (
        PARTITION BY CASE WHEN source IS NULL THEN account END, coalesce(source, stream), source IS NULL, start_ns
        ORDER BY time_ns DESC
    ) AS place
    FROM usage_sample WHERE time_ns < (extract(epoch FROM %(cut)s::timestamptz) * 1000000000)::bigint
)
DELETE FROM usage_sample s USING old WHERE s.ctid = old.ctid AND old.place > 1"""

# A total that comes late, or again, is one more that is not the last.
_CONTROLS_SQL: Final = """
WITH old AS (
    SELECT ctid, row_number() OVER (run ORDER BY time DESC, part DESC) AS place,
           row_number() OVER (run ORDER BY recorded_at DESC, time DESC, part DESC) AS heard
    FROM usage_control WHERE time < %(cut)s
    WINDOW run AS (PARTITION BY tenant, producer, meter, unit, start_time)
)
DELETE FROM usage_control c USING old WHERE c.ctid = old.ctid AND old.place > 1 AND old.heard > 1"""

_CLOSINGS_SQL: Final = """
WITH old AS (
    SELECT ctid, row_number() OVER (PARTITION BY tenant, producer, start_time ORDER BY time DESC, part DESC) AS place
    FROM usage_closed WHERE time < %(cut)s
)
DELETE FROM usage_closed c USING old WHERE c.ctid = old.ctid AND old.place > 1"""


async def drop_totals(connection: Connection, points_from: datetime) -> None:
    """Drops those before that time which nothing is counted from, however often. Points must be gone until then."""
    for statement in (_SAMPLES_SQL, _CONTROLS_SQL, _CLOSINGS_SQL):
        await connection.execute(statement, {"cut": points_from})
