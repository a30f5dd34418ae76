"""Evidence into usage_evidence, in the caller's transaction; what is there already, the database tells from new."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Final

from tallymark_collector import wire
from tallymark_collector.model import Evidence, Quarantined, Reason, Refusal, attributes_json
from tallymark_collector.store import rows, staging
from tallymark_collector.store.database import Connection

_STAGE_SQL: Final = """
CREATE TEMPORARY TABLE IF NOT EXISTS staged_evidence (
    position int, time timestamptz, start_time timestamptz, account text, tenant text, meter text, trace_id bytea,
    span_id bytea, quantity numeric, name text, service text, user_id text, attributes jsonb
) ON COMMIT DELETE ROWS"""

_COPY_SQL: Final = f"COPY staged_evidence (position, {rows.EVIDENCE_COLUMNS}) FROM STDIN"

# Which of them were there already. All writers insert in one order.
_UNSTAGE_SQL: Final = f"""
WITH inserted AS (
    INSERT INTO usage_evidence ({rows.EVIDENCE_COLUMNS})
    SELECT {rows.EVIDENCE_COLUMNS} FROM staged_evidence ORDER BY account, time, trace_id, span_id, meter
    ON CONFLICT DO NOTHING
    RETURNING account, time, trace_id, span_id, meter, tenant
)
SELECT s.position
FROM staged_evidence s LEFT JOIN inserted i USING (account, time, trace_id, span_id, meter, tenant)
WHERE i.account IS NULL"""  # noqa: S608 - a constant of ours

_DIFFERENT_SQL: Final = """
SELECT s.position, e.quantity
FROM staged_evidence s
JOIN usage_evidence e USING (account, time, trace_id, span_id, meter, tenant)
WHERE %s OR e.quantity <> s.quantity"""


async def insert_new(connection: Connection, evidence: Sequence[Evidence]) -> dict[int, Decimal]:
    """Inserts what is new. Returns the stored quantity for each that was not, by its position. Of several with one key,
    the first counts."""
    if not evidence:
        return {}
    keys = [(i.account, i.time_ns // 1000, i.trace_id, i.span_id, i.meter, i.tenant) for i in evidence]
    found = staging.distinct(keys, range(len(keys)))
    await connection.execute(_STAGE_SQL)
    lines = (
        rows.evidence_line(place, evidence[position], attributes_json(evidence[position].attributes))
        for place, position in enumerate(found.firsts)
    )
    async with connection.cursor() as cursor, cursor.copy(_COPY_SQL) as copy:
        await copy.write("".join(lines).encode())
    old = [place for (place,) in await (await connection.execute(_UNSTAGE_SQL)).fetchall()]
    known = {place: evidence[found.firsts[place]].quantity for place in old}
    if old:
        # 1.0 says the same as a stored 1, but what repeats it is held against what is stored, to the letter.
        there = await (await connection.execute(_DIFFERENT_SQL, [bool(found.repeats)])).fetchall()
        known.update((place, quantity) for place, quantity in there if place in known)
    return staging.already_there(found, known, [item.quantity for item in evidence])


def conflict(item: Evidence, there: Decimal) -> Quarantined:
    """Evidence that contradicts what is stored."""
    detail = f"{there} was stored before for the same span and meter, {item.quantity} came now"
    return refused(item, Refusal(Reason.VALUE_CONFLICT, detail))


def refused(item: Evidence, refusal: Refusal) -> Quarantined:
    """Evidence for the quarantine, kept whole."""
    payload = wire.encode_evidence(item)
    return Quarantined(item.tenant, item.account, item.meter, item.time_ns, refusal, "traces", payload)
