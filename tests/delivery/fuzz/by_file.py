"""Inputs against the decoder with a file of meters: every item is counted by each meter that it is of, or refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tallymark_collector.errors import MalformedRequest
from tallymark_collector.metering import Metering
from tallymark_collector.metering.kept import decode_kept
from tallymark_collector.model import Point, Quarantined, Reason, Temporality
from tallymark_collector.processors.decoding import Decoded, decode_metrics
from tallymark_collector.processors.spans import DecodedSpans, decode_spans
from tallymark_collector.processors.streams import StreamCache
from tests.delivery.fuzz.checks import LIMITS, check_evidence, check_point, check_stream, hold, same
from tests.delivery.fuzz.corpus import NOW
from tests.delivery.fuzz.metered import RULES, TENANTS
from tests.delivery.fuzz.mutation import Input
from tests.delivery.fuzz.reckoning import Reckoned, reckon
from tests.delivery.fuzz.wire_format import Unreadable, census

MAX_LOOKED_AT: Final = 2
"""Items of one request that are read again: those of a large one are alike."""


def tenant_of(given: Input) -> str:
    """Whose input it is: as the number has it, where the file is asked, but for one of which all is known."""
    return TENANTS[given.number % len(TENANTS)] if given.by_file and given.sent is None else TENANTS[0]


class ByFile:
    """Decodes with a file of meters, and compares with a count of our own."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        # Small, so that all is forgotten many times.
        self._shared = Metering(RULES, limit=500)
        self._cache = StreamCache(limit=500)

    def take(self, given: Input, body: bytes) -> Decoded | DecodedSpans:
        """Raises MalformedRequest, whatever else the decoder raises, and Broken."""
        tenant = tenant_of(given)
        read = self._metrics if given.signal == "metrics" else self._traces
        found = read(tenant, body)
        for point in found.points:
            check_point(point)
            check_stream(point.stream)
        self.counts["points by the file"] += len(found.points)
        for item in found.quarantined[:MAX_LOOKED_AT]:
            if item.metered:
                check_again(item)
        counted = None if given.sent else reckoned(given.signal, body, tenant)
        if counted is None or _is_kept_as_one(found.quarantined):
            self.counts["by the file, not counted by us"] += not given.sent
        else:
            self.counts["by the file, counted"] += 1
            check_reckoned(counted, found)
        return found

    def _metrics(self, tenant: str, body: bytes) -> Decoded:
        own = Metering(RULES)
        found = decode_metrics(tenant, body, StreamCache(), LIMITS, NOW, own)
        hold(same(found, decode_metrics(tenant, body, StreamCache(), LIMITS, NOW, own)), "what is known is otherwise")
        other = decode_metrics(tenant, body, self._cache, LIMITS, NOW, self._shared)
        hold(same(found, other), "what others sent changes it")
        return found

    def _traces(self, tenant: str, body: bytes) -> DecodedSpans:
        found = decode_spans(tenant, body, LIMITS, NOW, Metering(RULES))
        other = decode_spans(tenant, body, LIMITS, NOW, self._shared)
        hold(
            len(found.points) == len(other.points)
            and all(map(_same_span, found.points, other.points))
            and repr(found.evidence) == repr(other.evidence)
            and found.quarantined == other.quarantined
            and (found.rejected, found.unmatched) == (other.rejected, other.unmatched),
            "what others sent changes it",
        )
        for item in found.evidence:
            check_evidence(item)
        return found


def _same_span(one: Point, other: Point) -> bool:
    # As text: an attribute that is no number (NaN) is not equal to itself.
    series = repr(one.stream.series) == repr(other.stream.series)
    return one[1:] == other[1:] and one.stream.id == other.stream.id and series


def reckoned(signal: str, body: bytes, tenant: str) -> Reckoned | None:
    """Our own count; None of what OpenTelemetry's own classes do not read, or read otherwise than in its order."""
    try:
        counted = reckon(signal, body, tenant)
        if signal == "metrics" and (counted.beside or census(body).repeated):
            return None
    except (DecodeError, Unreadable):
        return None
    return counted


def _is_kept_as_one(quarantined: Sequence[Quarantined]) -> bool:
    return any(item.refusal.reason is Reason.RESOURCE_TOO_LARGE for item in quarantined)


def check_reckoned(counted: Reckoned, found: Decoded | DecodedSpans) -> None:
    """Counted or refused by each of its meters, or passed over; and worth what it says."""
    points = [point for point in found.points if not point.is_end]  # of levels, by each meter that they are of
    items = Counter(point.stream.series.meter for point in points)
    items.update(item.meter for item in found.quarantined if item.metered)
    hold(items == counted.taken, "items of meters", items, counted.taken)
    hold(found.unmatched == counted.passed_over, "passed over", found.unmatched, counted)
    if not counted.beside:
        hold(found.rejected == refused_items(found.quarantined), "rejected", found.rejected, found.quarantined)
    worth = Counter((p.stream.series.meter, p.stream.series.account, p.value) for p in points)
    hold(not worth - counted.worth, "worth what nobody sent", worth - counted.worth, counted.worth)  # type: ignore[operator]


def refused_items(quarantined: Sequence[Quarantined]) -> int:
    """Of how many points or spans something is in quarantine: its meters' items stand one after the other."""
    number = 0
    latest, meters = b"", set[str]()
    for item in quarantined:
        if item.refusal.reason is Reason.TYPE_UNSUPPORTED:
            [outer] = ExportMetricsServiceRequest.FromString(item.payload).resource_metrics
            [metric] = outer.scope_metrics[0].metrics
            number += len(getattr(metric, metric.WhichOneof("data")).data_points)
            latest = b""
            continue
        if item.payload != latest or item.meter in meters:
            number += 1
            meters.clear()
        latest = item.payload
        meters.add(item.meter)
    return number


def check_again(item: Quarantined) -> None:
    """What is kept comes to the same refusal, and with an account to nothing worse."""
    for account in (None, "acme"):
        try:
            again = decode_kept(
                item.tenant,
                item.signal,
                item.meter,
                item.payload,
                rules=RULES,
                account=account,
                limits=LIMITS,
                now_ns=NOW,
            )
        except MalformedRequest:
            hold(account is not None, "kept, and cannot be read", item)
            continue
        whole = len(again.points) + len(again.quarantined)
        if item.refusal.reason is not Reason.RESOURCE_TOO_LARGE:
            hold(whole == 1, "one item is another number of them", item, account, again.points, again.quarantined)
        if account is None:
            hold(again.quarantined == [item], "another refusal the second time", item, again.quarantined)
        for point in again.points:
            hold(point.stream.temporality is not Temporality.LEVEL or item.metered, "a level of its own", item)
