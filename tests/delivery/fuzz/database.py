"""Inputs against the pipeline and a real PostgreSQL: all of a request or nothing, and nothing the second time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Final
from uuid import UUID

import psycopg

from tallymark_collector.errors import MalformedRequest, TooLarge
from tallymark_collector.metering import Metering
from tallymark_collector.model import Point, Temporality
from tallymark_collector.pipeline import Outcome, Pipeline
from tallymark_collector.processors.decoding import decode_metrics
from tallymark_collector.processors.spans import decode_spans
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.store import Store
from tests.delivery.fuzz.by_file import reckoned, tenant_of
from tests.delivery.fuzz.checks import LIMITS, hold
from tests.delivery.fuzz.corpus import NOW
from tests.delivery.fuzz.decoder import protobuf_of
from tests.delivery.fuzz.metered import RULES
from tests.delivery.fuzz.mutation import Input, Sent
from tests.delivery.fuzz.wire_format import census

EMPTIED_AFTER: Final = 100
"""Inputs after which the tables are emptied, so that counting them stays cheap. Streams stay: the store knows them."""

_TABLES: Final = (
    "usage_point, usage_sample, usage_level, usage_evidence, usage_quarantine, usage_control, usage_closed,"
    " usage_evidence_count"
)
_COUNTS_SQL: Final = """
SELECT (SELECT count(*) FROM usage_point JOIN usage_stream USING (account, stream) WHERE temporality = 1),
       (SELECT coalesce(sum(quantity), 0) FROM usage_point),
       (SELECT count(*) FROM usage_point),
       (SELECT count(*) FROM usage_sample),
       (SELECT coalesce(sum(value), 0) FROM usage_sample),
       (SELECT count(*) FROM usage_level),
       (SELECT coalesce(sum(value), 0) FROM usage_level),
       (SELECT count(*) FROM usage_evidence),
       (SELECT coalesce(sum(quantity), 0) FROM usage_evidence),
       (SELECT count(*) FROM usage_quarantine),
       (SELECT count(*) FROM usage_control),
       (SELECT coalesce(sum(total), 0) FROM usage_control),
       (SELECT count(*) FROM usage_closed),
       (SELECT count(*) FROM usage_evidence_count),
       (SELECT coalesce(sum(quantity), 0) FROM usage_evidence_count)"""
_DELTAS, _SUM, _ROWS, _SAMPLES, _, _LEVELS, _, _EVIDENCE = range(8)

_BILLED_SQL: Final = """
SELECT stream, sum(quantity) FROM usage_point JOIN usage_stream USING (account, stream)
WHERE temporality = %s GROUP BY stream HAVING sum(quantity) <> 0"""
# What totals come to: of an epoch with a start what was counted since then (a first total at the start itself is the
# base), of one without each rise, and after a fall all of it.
_TOTALS_SQL: Final = """
SELECT stream, sum(increase) FROM (
    SELECT stream, CASE WHEN before IS NULL AND start_ns IN (0, time_ns) THEN 0
                        WHEN before IS NULL THEN value
                        WHEN start_ns = 0 AND value < before THEN value
                        ELSE value - before END AS increase
    FROM (SELECT *, lag(value) OVER (PARTITION BY account, stream, start_ns ORDER BY time_ns) AS before
          FROM usage_sample) s
) i GROUP BY stream HAVING sum(increase) <> 0"""


class Written:
    """Sends inputs through the pipeline, each twice, and compares the tables."""

    def __init__(self, dsn: str) -> None:
        self.counts: Counter[str] = Counter()
        self._store = Store(dsn)
        self._plain = Pipeline(self._store, now_ns=lambda: NOW)
        self._by_file = Pipeline(self._store, now_ns=lambda: NOW, metering=Metering(RULES))
        self._connection = psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark")
        self._expected: dict[tuple[UUID, int, int, int], Decimal] = {}
        self._cache = StreamCache(limit=3000)

    async def open(self) -> None:
        """Makes the schema."""
        await self._store.open()
        await self._store.migrate()

    async def close(self) -> None:
        """Gives the connections back."""
        self._connection.close()
        await self._store.close()

    async def take(self, given: Input) -> None:
        """Raises whatever the pipeline raises beside its own refusals, and Broken."""
        self.counts["inputs"] += 1
        try:
            body = protobuf_of(given)
        except (MalformedRequest, TooLarge):
            self.counts["refused"] += 1
            return
        before = self._counted()
        pipeline = self._by_file if given.by_file else self._plain
        duplicates = pipeline.totals.duplicates
        quarantined = pipeline.totals.quarantined
        try:
            outcome = await self._send(pipeline, given, body)
        except (MalformedRequest, TooLarge) as error:
            expected = given.sent is not None and given.sent.too_large
            hold(isinstance(error, TooLarge) is expected, "another refusal", error, given.damage)
            hold(self._counted() == before, "refused, and something of it is there", given.damage)
            self.counts["refused"] += 1
            return
        self.counts["accepted"] += 1
        after = self._counted()
        duplicates = pipeline.totals.duplicates - duplicates
        quarantined = pipeline.totals.quarantined - quarantined
        self.counts["duplicates"] += duplicates
        self.counts["quarantined"] += quarantined
        self.counts["points and samples"] += after[_ROWS] + after[_SAMPLES] - before[_ROWS] - before[_SAMPLES]
        new = sum(after[kind] - before[kind] for kind in (_DELTAS, _SAMPLES, _LEVELS))
        self._expect(given, body)
        if given.sent is not None:
            self._check_sent(given.sent, new, after[_EVIDENCE] - before[_EVIDENCE], quarantined, outcome)
        elif given.by_file:
            self._check_reckoned(given, body, new + duplicates + quarantined)
        elif given.signal == "metrics":
            self._check_whole(body, new, duplicates, outcome)
        again = await self._send(pipeline, given, body)
        hold(self._counted() == after, "the second time changed something", given.damage, after, self._counted())
        hold(again.rejected == outcome.rejected, "another answer the second time", outcome, again)
        if self.counts["accepted"] % EMPTIED_AFTER == 0:
            self.settle()

    async def _send(self, pipeline: Pipeline, given: Input, body: bytes) -> Outcome:
        outcome: Outcome = await getattr(pipeline, given.signal)(tenant_of(given), body)
        outcome.message.encode()
        return outcome

    def _expect(self, given: Input, body: bytes) -> None:
        """Notes what deltas come to. (Of one identity the first counts.)"""
        tenant, metering = tenant_of(given), self._by_file.metering if given.by_file else None
        points: Sequence[Point] = []
        if given.signal == "metrics":
            points = decode_metrics(tenant, body, self._cache, LIMITS, NOW, metering).points
        elif given.signal == "traces":
            points = decode_spans(tenant, body, LIMITS, NOW, metering).points
        for point in points:
            if point.stream.temporality is Temporality.DELTA:
                # What has a cause is told by that, and its times only to the microsecond: a span counts once.
                fine = 1000 if point.cause else 1
                identity = (point.stream.id, point.start_ns // fine, point.time_ns // fine, point.cause)
                self._expected.setdefault(identity, point.value)

    def _check_whole(self, body: bytes, new: Decimal, duplicates: int, outcome: Outcome) -> None:
        counted = census(body)
        if counted.repeated or counted.control or counted.ended:
            return  # what becomes of control points, and of those that say that a stream has ended, the decoder's tell
        sent = counted.usage + counted.kept_aside
        hold(new + duplicates + outcome.rejected == sent, "a part of it is gone", new, duplicates, outcome, counted)

    def _check_reckoned(self, given: Input, body: bytes, come: Decimal) -> None:
        counted = reckoned(given.signal, body, tenant_of(given))
        if counted is None or counted.beside or (given.signal == "metrics" and census(body).ended):
            self.counts["by the file, not counted by us"] += 1
            return
        self.counts["by the file, counted"] += 1
        hold(come == counted.taken.total(), "a part of it is gone", come, counted)

    def _check_sent(self, sent: Sent, new: Decimal, evidence: Decimal, quarantined: int, outcome: Outcome) -> None:
        self.counts["large"] += 1
        came = (new, evidence, outcome.rejected, quarantined)
        hold(came == tuple(sent)[:4] and not sent.too_large, "not what was sent", came, sent)

    def _counted(self) -> tuple[Decimal, ...]:
        row = self._connection.execute(_COUNTS_SQL).fetchone()
        assert row is not None
        return row

    def settle(self) -> None:
        """Compares sums with what was sent, and empties the tables."""
        deltas: dict[UUID, Fraction] = defaultdict(Fraction)
        for (stream, *_), value in self._expected.items():
            deltas[stream] += Fraction(value)
        stored = dict(self._connection.execute(_BILLED_SQL, [1]).fetchall())
        told = {stream: value for stream, value in deltas.items() if value}
        hold({key: Fraction(value) for key, value in stored.items()} == told, "sums of deltas", stored, told)
        increases = dict(self._connection.execute(_BILLED_SQL, [2]).fetchall())
        totals = dict(self._connection.execute(_TOTALS_SQL).fetchall())
        hold(increases == totals, "increases are not what the totals say", increases, totals)
        unheld = self._connection.execute(
            "SELECT detail, payload FROM usage_quarantine WHERE reason = 'not_storable'"
        ).fetchall()
        hold(not unheld, "what was let through cannot be stored", unheld)
        self.counts["comparisons of all sums"] += 1
        self.empty()

    def empty(self) -> None:
        """Forgets what was sent."""
        self._connection.execute(f"TRUNCATE {_TABLES}, usage_dirty")
        self._expected.clear()
