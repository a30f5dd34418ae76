"""The path of a request: decode, take what is usage, validate, write, and only then answer.

Everything before the store is plain functions (`processors`); everything after the return of `store.write` is
committed. What a receiver gets back says how much of the request was refused for good and why; an error that a retry
may mend is raised as TransientError, and then nothing of the request was kept.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Final, Protocol, TypeVar

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from tallymark_collector.access.quotas import Limiting, Unlimited
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.known_meters import KnownMeters
from tallymark_collector.metering import Metering
from tallymark_collector.metering.unmatched import Unmatched
from tallymark_collector.model import Batch, ControlTotal, EvidenceCount, Quarantined, Refusal, WriteResult
from tallymark_collector.processors import set_aside
from tallymark_collector.processors.aside import redacted_origin, redacting
from tallymark_collector.processors.decoding import Decoded, decoding_metrics
from tallymark_collector.processors.redaction import STANDARD, Redaction
from tallymark_collector.processors.spans import DecodedSpans, decoding_spans
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.resting import resting
from tallymark_collector.settings import Limits
from tallymark_collector.telemetry.tenants import Tenants

MAX_FOREIGN_NAME: Final = 4096
"""Characters of a name that nobody's usage has, of which some are logged."""
PIECE: Final = 1024
"""Of such names, and of what is refused, between two rests."""
MAX_REASONS: Final = 5
"""Different refusals that one answer explains; the quarantine has them all."""


_Said = TypeVar("_Said", ControlTotal, EvidenceCount)


class Writing(Protocol):
    """What the pipeline needs of a store."""

    async def write(self, batch: Batch) -> WriteResult:
        """Writes all of the batch or raises; returns after the commit."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a committed request."""

    rejected: int = 0
    """Points or spans that will never be billed as they are: kept in quarantine, not to be sent again."""
    message: str = ""
    """Why, for a person at the sending end."""


@dataclass(slots=True)
class Totals:
    """What this process has done since it started."""

    requests: int = 0
    points: int = 0
    duplicates: int = 0
    evidence: int = 0
    quarantined: int = 0
    unmatched: Counter[str] = field(default_factory=Counter)
    """By tenant, as metrics name them."""


@dataclass(slots=True)
class Pipeline:
    """Ingestion for one process."""

    store: Writing
    limits: Limits = field(default_factory=Limits)
    now_ns: Callable[[], int] = time.time_ns
    quotas: Limiting = field(default_factory=Unlimited)
    """What a tenant may send; more is refused, or set aside."""
    totals: Totals = field(default_factory=Totals)
    metering: Metering | None = None
    """What a file says is usage of other people's telemetry."""
    known: KnownMeters | None = None
    """The meters that tenants charge for, by which usage that names nobody is known."""
    redaction: Redaction = STANDARD
    """What is stored of credentials in what clients send: nothing."""
    unmatched: Unmatched = field(default_factory=Unmatched)
    tenants: Tenants = field(default_factory=Tenants)
    """Names of tenants in what is counted."""
    _streams: StreamCache = field(init=False)

    def __post_init__(self) -> None:
        self._streams = StreamCache(redaction=self.redaction)

    async def metrics(self, tenant: str, body: bytes) -> Outcome:
        """Takes an ExportMetricsServiceRequest. Raises MalformedRequest, TooLarge or
        TransientError, then nothing was kept."""
        await self.quotas.asking(tenant, len(body))
        known = () if self.known is None else await self.known.of(tenant)
        decoded = Decoded()
        request = (tenant, body, self._streams, self.limits.times, self.now_ns())
        await resting(decoding_metrics(*request, decoded, self.metering, known))
        self.totals.requests += 1
        self._count_unmatched(tenant, decoded.unmatched)
        said = len(decoded.controls) + len(decoded.closings) + len(decoded.counts)
        self.quotas.has_read(tenant, len(body), decoded.unmatched + decoded.rejected + len(decoded.points) + said)
        self.unmatched.add("metrics", await resting(self._named(decoded.foreign)))
        batch = Batch(
            points=decoded.points,
            quarantined=await resting(redacting(self.redaction, decoded.quarantined)),
            controls=[self._redacted(item) for item in decoded.controls],
            closings=decoded.closings,
            counts=[self._redacted(item) for item in decoded.counts],
        )
        rejected = decoded.rejected
        del decoded  # what came, less what is redacted, is all that waits
        async with self.quotas.admitting(tenant, batch) as admitted:
            result = await self._write(admitted)
        set_aside = len(admitted.quarantined) - len(batch.quarantined)
        return await resting(_outcome(rejected + set_aside, admitted.quarantined, result))

    async def traces(self, tenant: str, body: bytes) -> Outcome:
        """Takes an ExportTraceServiceRequest. Raises MalformedRequest, TooLarge or
        TransientError, then nothing was kept."""
        await self.quotas.asking(tenant, len(body))
        decoded = DecodedSpans()
        times = self.limits.times
        await resting(decoding_spans(tenant, body, times, self.now_ns(), decoded, self.metering, self.redaction))
        self.totals.requests += 1
        self._count_unmatched(tenant, decoded.unmatched)
        usage = len(decoded.points) + len(decoded.evidence)
        self.quotas.has_read(tenant, len(body), decoded.unmatched + decoded.rejected + usage)
        self.unmatched.add("traces", await resting(self._named(decoded.foreign)))
        quarantined = await resting(redacting(self.redaction, decoded.quarantined))
        batch = Batch(decoded.points, decoded.evidence, quarantined)
        rejected = decoded.rejected
        del decoded
        async with self.quotas.admitting(tenant, batch) as admitted:
            result = await self._write(admitted)
        set_aside = len(admitted.quarantined) - len(batch.quarantined)
        return await resting(_outcome(rejected + set_aside, admitted.quarantined, result))

    async def logs(self, tenant: str, body: bytes) -> Outcome:
        """Takes an ExportLogsServiceRequest, of which nothing is usage: clients that set one endpoint for all signals
        send logs too, and an error would fill their own logs. Raises MalformedRequest, and TransientError where the
        tenant has had too much read."""
        await self.quotas.asking(tenant, len(body))
        try:
            request = ExportLogsServiceRequest.FromString(body)
        except DecodeError as error:
            raise MalformedRequest(f"not an OTLP ExportLogsServiceRequest: {error}") from None
        self.totals.requests += 1
        scopes = (scope for resource in request.resource_logs for scope in resource.scope_logs)
        records = sum(len(scope.log_records) for scope in scopes)
        self._count_unmatched(tenant, records)
        self.quotas.has_read(tenant, len(body), records)
        return Outcome()

    def _count_unmatched(self, tenant: str, number: int) -> None:
        if number:
            self.totals.unmatched[self.tenants.label(tenant)] += number

    def _named(self, foreign: Mapping[str, int]) -> Generator[None, None, Counter[str]]:
        """Names that may be logged, in pieces (see `resting`)."""
        found: Counter[str] = Counter()
        for done, (name, number) in enumerate(foreign.items(), 1):
            found[self.redaction.text(name[:MAX_FOREIGN_NAME])] += number
            if done % PIECE == 0:
                yield
        return found

    def _redacted(self, item: _Said) -> _Said:
        return item._replace(origin=redacted_origin(self.redaction, item.origin, None))

    async def _write(self, batch: Batch) -> WriteResult:
        if not batch:
            return WriteResult()
        quarantined = batch.quarantined
        last = max(len(quarantined) - 1, 0) // set_aside.AT_ONCE * set_aside.AT_ONCE
        for start in range(0, last, set_aside.AT_ONCE):
            # An item is one row however often it comes: a request that fails after these comes again, with them.
            await self.store.write(Batch(quarantined=quarantined[start : start + set_aside.AT_ONCE]))
        result = await self.store.write(replace(batch, quarantined=quarantined[last:]) if last else batch)
        self.totals.points += result.inserted
        self.totals.duplicates += result.duplicates
        self.totals.evidence += result.evidence
        self.totals.quarantined += len(batch.quarantined) + len(result.conflicts)
        return result


def _outcome(rejected: int, quarantined: Sequence[Quarantined], result: WriteResult) -> Generator[None, None, Outcome]:
    """In pieces (see `resting`)."""
    counted: Counter[tuple[Refusal, str]] = Counter()
    for done, item in enumerate(chain(quarantined, result.conflicts), 1):
        counted[item.refusal, item.meter] += 1
        if done % PIECE == 0:
            yield
    if not counted:
        return Outcome()
    said = [
        f"{refusal.reason.value} ({count} of meter {meter!r}): {refusal.detail}"
        for (refusal, meter), count in counted.most_common(MAX_REASONS)
    ]
    more = len(counted) - len(said)
    message = "kept in quarantine, not billed: " + "; ".join(said) + (f"; and {more} other reasons" if more else "")
    return Outcome(rejected + len(result.conflicts), message)
