"""Is everything here that producers have recorded? Their control totals against the sums of their points.

At each control total, the points until its time must add up to it. Where a producer has several runs, the last totals
of all of them until that time count together. What is compared are the raw points, by the producer that stands in their
stream's resource; what lies in quarantine is counted as missing, and how much of it that is, is said.

Where points have been dropped for their age, a producer is judged from its first total after them on: what they added
up to is not known any more.

It reads the control totals and the points of the range once each, and sorts what it read of the former: about as much
work as comparing the cached hours.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final, NamedTuple

from tallymark import conventions
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.processors.control import quarantined_usage
from tallymark_collector.store.database import Connection

TOLERANCE: Final = timedelta(minutes=5)
"""How long what belongs together may take to arrive, and how long a producer may be silent before its end is in doubt.
Many times the SDK's interval of 10 s."""

MAX_QUARANTINED: Final = 100_000
"""Items of the quarantine that are looked into for what is missing."""


class Status(str, enum.Enum):
    """What can be said of a producer and meter."""

    COMPLETE = "complete"
    """The points are what the producer says, and it has ended, or was heard of within the tolerance."""
    MISSING = "missing"
    TOO_MANY = "too many"
    """More than the producer says it recorded: something was counted twice that has not the same identity."""
    OPEN = "not yet closed"
    """What is here agrees, but the producer neither ended nor was heard of lately, or there are points that no total
    of it covers yet."""


class Completeness(NamedTuple):
    """One producer and meter. Sums are of the range that was asked for."""

    tenant: str
    namespace: str
    service: str
    producer: str
    """`service.instance.id`"""
    meter: str
    unit: str
    status: Status
    as_of: datetime | None
    """The time of the last control total; None where there is none of this meter."""
    counted: Decimal
    """Sum of the points until the total that was compared."""
    control: Decimal
    """What the producer says it recorded until then."""
    difference: Decimal = Decimal(0)
    """What is missing, or too much."""
    since: datetime | None = None
    """Of a difference: the end of the last interval at which both agreed; the beginning where they never did."""
    until: datetime | None = None
    """Of a difference: the end of the first interval at which they did not."""
    in_quarantine: Decimal = Decimal(0)
    """How much of what is missing lies in quarantine and is open."""
    discarded: Decimal = Decimal(0)
    """How much of what is missing was in quarantine, and somebody decided that it is not billed."""
    uncovered: Decimal = Decimal(0)
    """Points later than the last control total that should have come with one."""
    closed: bool = False
    """The producer has ended, and this is all."""
    last_seen: datetime | None = None
    """When its last control total arrived."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What can be said of all producers."""

    producers: Sequence[Completeness] = ()
    unproved: int = 0
    """Producers with usage of the SDK's but no control total: earlier versions of it."""

    def of(self, *statuses: Status) -> list[Completeness]:
        """Those of some statuses."""
        return [one for one in self.producers if one.status in statuses]

    @property
    def clean(self) -> bool:
        """True if nothing is missing and nothing is too much."""
        return not self.of(Status.MISSING, Status.TOO_MANY)


_INSTANCE: Final = f"s.resource->>'{conventions.SERVICE_INSTANCE}'"
_SAME_PRODUCER: Final = f"""p.tenant = s.tenant AND p.instance = {_INSTANCE}
   AND p.service = coalesce(s.resource->>'{conventions.SERVICE_NAME}', '')
   AND p.namespace = coalesce(s.resource->>'{conventions.SERVICE_NAMESPACE}', '')"""

# A total's points are no later than it, and later than the total before it. So `told` and `counted`, added up in the
# order of time, are equal at every total where nothing is missing. A range begins behind the last total before it.
# `key` numbers producers with a meter: joins over four columns of text would be slow, and misjudged by the planner.
_COMPARE_SQL: Final = f"""
WITH settled AS (
    SELECT now() - %(tolerance)s::interval AS at
), within AS MATERIALIZED (
    SELECT tenant, producer, meter, unit, time, start_time, part, total, recorded_at
    FROM usage_control
    WHERE time >= %(start)s::timestamptz AND time < %(end)s::timestamptz
      AND (%(tenant)s::text IS NULL OR tenant = %(tenant)s)
), named AS MATERIALIZED (
    SELECT s.account, s.stream, p.tenant, p.producer, d.meter, d.unit
    FROM usage_stream s
    JOIN usage_producer p ON {_SAME_PRODUCER}
    JOIN usage_series d ON d.account = s.account AND d.series = s.series
    WHERE s.scope = '{conventions.SCOPE_NAME}' AND s.temporality = 1
      AND p.producer IN (SELECT producer FROM within)
), subject AS MATERIALIZED (
    SELECT row_number() OVER () AS key, k.tenant, k.producer, k.meter, k.unit, k.began,
           CASE WHEN coalesce(b.before, k.began) < %(kept)s::timestamptz THEN k.first ELSE b.before END AS after
    FROM (
        SELECT tenant, producer, meter, unit, min(start_time) AS began, min(time) AS first
        FROM (SELECT tenant, producer, meter, unit, start_time, time FROM within
              UNION ALL
              SELECT tenant, producer, meter, unit, NULL, NULL FROM named) either
        GROUP BY 1, 2, 3, 4
    ) k
    CROSS JOIN LATERAL (
        SELECT max(b.time) AS before FROM usage_control b
        WHERE b.tenant = k.tenant AND b.producer = k.producer AND b.meter = k.meter AND b.unit = k.unit
          AND b.time < %(start)s::timestamptz
    ) b
), total AS MATERIALIZED (
    SELECT u.key, w.tenant, w.producer, w.meter, w.unit, w.time, w.start_time, w.part, w.total, w.recorded_at
    FROM within w JOIN subject u USING (producer, meter, unit)
    WHERE w.time > coalesce(u.after, '-infinity')
), run_before AS (
    SELECT r.key, r.start_time, b.total
    FROM (SELECT DISTINCT t.key, t.tenant, t.producer, t.meter, t.unit, t.start_time, u.after
          FROM total t JOIN subject u USING (key) WHERE t.start_time <= u.after) r
    CROSS JOIN LATERAL (
        SELECT b.total FROM usage_control b
        WHERE b.tenant = r.tenant AND b.producer = r.producer AND b.meter = r.meter AND b.unit = r.unit
          AND b.start_time = r.start_time AND b.time <= r.after
        ORDER BY b.time DESC, b.part DESC LIMIT 1
    ) b
), told AS (
    SELECT t.key, t.time, t.recorded_at, t.total - coalesce(lag(t.total) OVER run, b.total, 0) AS told
    FROM total t LEFT JOIN run_before b USING (key, start_time)
    WINDOW run AS (PARTITION BY t.key, t.start_time ORDER BY t.time, t.part)
), stream AS MATERIALIZED (
    SELECT n.account, n.stream, u.key, coalesce(u.after, '-infinity') AS after
    FROM named n JOIN subject u USING (producer, meter, unit)
), counted AS (
    SELECT s.key, p.time, sum(p.quantity) AS counted, max(p.recorded_at) AS recorded_at
    FROM usage_point p JOIN stream s ON s.account = p.account AND s.stream = p.stream
    WHERE p.time > s.after AND p.time >= %(start)s::timestamptz - interval '1 second'
      AND p.time < %(end)s::timestamptz
    GROUP BY 1, 2
), moment AS (
    SELECT key, time, sum(told) AS told, sum(counted) AS counted, min(told_at) AS told_at, max(counted_at) AS counted_at
    FROM (
        SELECT key, time, told, 0 AS counted, recorded_at AS told_at, NULL AS counted_at FROM told
        UNION ALL
        SELECT key, time, 0, counted, NULL, recorded_at FROM counted
    ) both_sides
    GROUP BY 1, 2
), running AS MATERIALIZED (
    SELECT key, time, told_at, counted, counted_at,
           sum(told) OVER upto AS told_upto, sum(counted) OVER upto AS counted_upto
    FROM moment
    WINDOW upto AS (PARTITION BY key ORDER BY time)
), ends AS (
    SELECT key,
           max(time) FILTER (WHERE told_at IS NOT NULL) AS as_of,
           coalesce(max(time) FILTER (WHERE told_at <= settled.at),
                    max(time) FILTER (WHERE told_at IS NOT NULL)) AS judged,
           count(*) FILTER (WHERE told_at <= settled.at) > 0 AS is_settled
    FROM running, settled
    GROUP BY 1
), judged AS MATERIALIZED (
    SELECT e.key, e.as_of, e.is_settled,
           max(r.told_upto) FILTER (WHERE r.time = e.judged) AS told,
           max(r.counted_upto) FILTER (WHERE r.time = e.judged) AS counted,
           max(r.told_upto - r.counted_upto) FILTER (WHERE r.time = e.as_of) AS latest,
           max(r.time) FILTER (WHERE r.told_at IS NOT NULL AND r.time <= e.judged
                               AND r.told_upto = r.counted_upto) AS agreed,
           coalesce(sum(r.counted) FILTER (WHERE r.time > coalesce(e.as_of, '-infinity')
                                           AND r.counted_at <= settled.at), 0) AS uncovered
    FROM ends e JOIN running r USING (key), settled
    GROUP BY 1, 2, 3
), stopped AS (
    SELECT key, min(r.time) AS until
    FROM judged j JOIN running r USING (key)
    WHERE r.told_at IS NOT NULL AND r.told_upto <> r.counted_upto AND r.time > coalesce(j.agreed, '-infinity')
    GROUP BY 1
), run AS (
    SELECT c.tenant, c.producer, c.start_time, max(c.time) AS last, max(c.recorded_at) AS seen
    FROM usage_control c
    WHERE c.producer IN (SELECT producer FROM subject)
    GROUP BY 1, 2, 3
), ended AS (
    SELECT tenant, producer, start_time, max(time) AS at FROM usage_closed GROUP BY 1, 2, 3
), producer AS (
    SELECT r.producer, max(r.seen) AS seen, max(r.last) AS last, bool_and(coalesce(z.at >= r.last, false)) AS closed
    FROM run r LEFT JOIN ended z USING (tenant, producer, start_time)
    GROUP BY 1
)
SELECT u.tenant, p.namespace, p.service, p.instance, u.meter, u.unit, j.as_of, j.is_settled,
       coalesce(j.told, 0), coalesce(j.counted, 0), coalesce(j.latest, 0), j.uncovered,
       coalesce(j.agreed, u.after, u.began) AS since, stopped.until,
       closed, seen, seen > settled.at OR last >= %(end)s::timestamptz AS heard
FROM judged j
JOIN subject u USING (key)
LEFT JOIN stopped USING (key)
JOIN producer USING (producer)
JOIN usage_producer p ON p.tenant = u.tenant AND p.producer = u.producer, settled
ORDER BY 1, 2, 3, 4, 5, 6"""  # noqa: S608 - constants of ours

# As text: Python has no time that is infinitely long ago.
_KEPT_SQL: Final = """
SELECT points_from::text, coalesce(greatest(points_from, %s::timestamptz), '-infinity')::text FROM usage_kept"""

_UNPROVED_SQL: Final = f"""
SELECT count(*) FROM (
    SELECT DISTINCT s.tenant, s.resource->>'{conventions.SERVICE_NAMESPACE}', s.resource->>'{conventions.SERVICE_NAME}',
           {_INSTANCE}
    FROM usage_stream s
    WHERE s.scope = '{conventions.SCOPE_NAME}' AND (%(tenant)s::text IS NULL OR s.tenant = %(tenant)s)
      AND NOT EXISTS (SELECT FROM usage_producer p WHERE {_SAME_PRODUCER})
) without"""  # noqa: S608 - constants of ours

# What was released is among the points.
_QUARANTINE_SQL: Final = """
SELECT q.tenant, q.payload, coalesce(done.action, 'reopened') = 'discarded'
FROM usage_quarantine q
LEFT JOIN LATERAL (
    SELECT a.action FROM quarantine_action a WHERE a.account = q.account AND a.digest = q.digest
    ORDER BY a.number DESC LIMIT 1
) done ON true
WHERE q.signal = 'metrics' AND q.meter = ANY(%(meters)s) AND q.tenant = ANY(%(tenants)s)
  AND q.time > %(since)s AND q.time <= %(until)s AND coalesce(done.action, 'reopened') IN ('reopened', 'discarded')
ORDER BY 3
LIMIT %(limit)s"""


async def prove(
    connection: Connection,
    *,
    tenant: str | None = None,
    start: datetime | None = None,
    end: datetime | None = None,
    tolerance: timedelta = TOLERANCE,
) -> Proof:
    """Compares what producers say with their points. `start` and `end` bound the control totals, `[start, end)`: what
    went missing before is then not told again. The connection must be a `store.reading()`."""
    kept, since = await (await connection.execute(_KEPT_SQL, [start])).fetchone() or (None, None)
    bounds = {"tenant": tenant, "start": since, "end": end or "infinity", "tolerance": tolerance, "kept": kept}
    # What is computed on the way has no statistics: taken for a handful of rows, it would be joined row by row.
    # Up to PostgreSQL 17 that makes costs so high that compiling the query would seem worth its seconds.
    await connection.execute("SET LOCAL enable_nestloop = off; SET LOCAL jit = off")
    found = [_judge(*row) for row in await (await connection.execute(_COMPARE_SQL, bounds)).fetchall()]
    await connection.execute("SET LOCAL enable_nestloop = on")
    [unproved] = await (await connection.execute(_UNPROVED_SQL, {"tenant": tenant})).fetchone() or [0]
    return Proof(await _explained(connection, found), unproved)


def _judge(
    tenant: str,
    namespace: str,
    service: str,
    instance: str,
    meter: str,
    unit: str,
    as_of: datetime | None,
    is_settled: bool,
    told: Decimal,
    counted: Decimal,
    latest: Decimal,
    uncovered: Decimal,
    since: datetime | None,
    until: datetime | None,
    closed: bool,
    seen: datetime,
    heard: bool,
) -> Completeness:
    difference = told - counted
    # An interval's points that were merged into the next one are late at the total between them, not missing.
    if is_settled and difference and latest:
        status = Status.MISSING if difference > 0 else Status.TOO_MANY
    elif latest or uncovered or not (closed or heard):
        status = Status.OPEN
    else:
        status = Status.COMPLETE
    differs = status in (Status.MISSING, Status.TOO_MANY)
    return Completeness(
        tenant,
        namespace,
        service,
        instance,
        meter,
        unit,
        status,
        as_of,
        counted,
        told,
        difference=abs(difference) if differs else Decimal(0),
        since=since if differs else None,
        until=until if differs else None,
        uncovered=uncovered,
        closed=closed,
        last_seen=seen,
    )


async def _explained(connection: Connection, found: list[Completeness]) -> list[Completeness]:
    """The same, with what of the missing lies in quarantine."""
    missing = [one for one in found if one.status is Status.MISSING]
    if not missing:
        return found
    wanted = {
        "meters": sorted({one.meter for one in missing}),
        "tenants": sorted({one.tenant for one in missing}),
        "since": min(one.since for one in missing if one.since is not None),
        "until": max(one.as_of for one in missing if one.as_of is not None),
        "limit": MAX_QUARANTINED,
    }
    kept: dict[bool, dict[_Key, dict[tuple[object, ...], Decimal]]] = {False: {}, True: {}}
    for tenant, payload, is_discarded in await (await connection.execute(_QUARANTINE_SQL, wanted)).fetchall():
        try:
            for producer, meter, unit, identity, quantity in quarantined_usage(payload, tenant):
                key = _Key(tenant, producer.namespace, producer.service, producer.instance, meter, unit)
                if identity not in kept[False].get(key, {}):
                    kept[is_discarded].setdefault(key, {})[identity] = quantity
        except MalformedRequest:
            continue
    return [
        _with_kept(one, *(kept[which].get(_Key(*one[:6]), {}) for which in (False, True)))
        if one.status is Status.MISSING
        else one
        for one in found
    ]


def _with_kept(
    one: Completeness, waiting: dict[tuple[object, ...], Decimal], discarded: dict[tuple[object, ...], Decimal]
) -> Completeness:
    in_quarantine = min(one.difference, sum(waiting.values(), Decimal(0)))
    rest = min(one.difference - in_quarantine, sum(discarded.values(), Decimal(0)))
    return one._replace(in_quarantine=in_quarantine, discarded=rest)


class _Key(NamedTuple):
    tenant: str
    namespace: str
    service: str
    producer: str
    meter: str
    unit: str
