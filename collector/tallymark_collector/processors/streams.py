"""What the repeating bytes of requests mean: streams by the attributes of their points, remembered from request to
request.
"""

from __future__ import annotations

from functools import partial
from typing import Final, NamedTuple, TypeAlias

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.model import Origin, Quarantined, Reason, Refusal, Series, Stream, Temporality
from tallymark_collector.processors import validation
from tallymark_collector.processors.aside import redacted_origin
from tallymark_collector.processors.described import (
    DescribedResource,
    DescribedScope,
    resource_of,
    scope_name,
    scope_of,
    why_whole,
)
from tallymark_collector.processors.redaction import STANDARD, Redaction
from tallymark_collector.processors.sent import GAUGE, MARK, read_mark, stream_identity, sum_as_sent
from tallymark_collector.wire.tallymark_metrics_view_pb2 import Metric, NumberDataPoint, Sum

MAX_CACHED_STREAMS: Final = 200_000
"""Streams whose decoded form is kept. At the limit all are dropped and decoded again as they come."""
MAX_CACHED_BYTES: Final = 512 * 2**20
"""About what they take in memory at the most: each `REMEMBERED`, and `DECODED` times its bytes."""
REMEMBERED: Final = 1024
DECODED: Final = 8
"""As it came, decoded, and as dimensions; many short attributes take more, few long ones less."""


# On the wire NumberDataPoint's start_time_unix_nano, time_unix_nano and as_int are a tag and eight bytes each.
START_TAG: Final = 0x11
TIMES_AND_VALUE: Final = 3 * 9

Resolved: TypeAlias = "Stream | Refusal"


def _rest(number: NumberDataPoint) -> bytes:
    """What a point with both times and an integer that is not 0 holds beside them; b"" for other points.

    Written again, it begins with these three, 27 bytes in the order of their field numbers, and its attributes follow:
    one slice that is as good a key as they are, and much sooner made. What this collector does not know of comes last.
    """
    if not (number.start_time_unix_nano and number.time_unix_nano and number.as_int):
        return b""
    data = number.SerializeToString()
    return data[TIMES_AND_VALUE:] if data[0] == START_TAG else b""


class _Known(NamedTuple):
    """Streams of one metric, each under one of two keys."""

    by_bytes: dict[bytes, Resolved]
    """By `_rest` of a point, where that is its attributes and nothing else."""
    by_attributes: dict[tuple[bytes, ...], Resolved]
    """By the attributes, where something else stands there, such as exemplars."""


class StreamCache:
    """Remembers what the repeating bytes of requests mean. Not thread-safe: one event loop owns it, which may decode
    several requests in turns."""

    def __init__(
        self,
        limit: int = MAX_CACHED_STREAMS,
        *,
        redaction: Redaction = STANDARD,
        kept: bool = False,
        limit_bytes: int = MAX_CACHED_BYTES,
    ) -> None:
        """`kept`: for what comes out of quarantine, where marks say who its points were."""
        self.redaction: Final = redaction
        self.kept: Final = kept
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._counted = 0
        self._bytes = 0
        self._metrics: dict[tuple[str, Origin], _Known] = {}
        self._resources: dict[bytes, DescribedResource] = {}
        self._scopes: dict[bytes, DescribedScope] = {}

    @property
    def size(self) -> int:
        """What is remembered now; never more than the limit."""
        known = sum(len(one.by_bytes) + len(one.by_attributes) for one in self._metrics.values())
        return len(self._resources) + len(self._scopes) + len(self._metrics) + known

    @property
    def weight(self) -> int:
        """About what it takes in memory; more than the limit only by what came last."""
        return self._bytes

    def unfit_resource(self, resource: bytes) -> Refusal | None:
        """Why usage beside a resource is kept as one and not taken apart, or None. What people release was let in
        before, whatever the limits were."""
        return None if self.kept else why_whole("resource", resource, lambda data: self.resource(data).refusal)

    def unfit_scope(self, scope: bytes) -> Refusal | None:
        """The same of a scope."""
        return None if self.kept else why_whole("scope", scope, lambda data: self.scope(data).refusal)

    def resource(self, resource: bytes) -> DescribedResource:
        """What all streams of a resource share, one object for all of them. Raises MalformedRequest."""
        found = self._resources.get(resource)
        if found is None:
            found = resource_of(resource, self.redaction)
            self.make_room(len(resource))
            self._resources[resource] = found
        return found

    def scope(self, scope: bytes) -> DescribedScope:
        """The same of a scope. Raises MalformedRequest."""
        found = self._scopes.get(scope)
        if found is None:
            found = scope_of(scope, self.redaction)
            self.make_room(len(scope))
            self._scopes[scope] = found
        return found

    def scope_name(self, scope: bytes) -> str:
        """The name in a scope that is small enough to be kept, "" where it cannot be read."""
        found = self._scopes.get(scope)
        return scope_name(scope) if found is None else found.name

    def streams(self, tenant: str, resource: bytes, scope: bytes, metric: Metric) -> MetricStreams:
        """The streams of one metric, a sum or a gauge."""
        header = metric.sum
        origin = Origin(
            resource,
            scope,
            metric.name,
            metric.unit,
            header.aggregation_temporality,
            header.is_monotonic,
            attributes=(),
            reading=GAUGE if metric.WhichOneof("data") == "gauge" else None,
        )
        known = self._metrics.get((tenant, origin))
        if known is None:
            self.make_room(len(resource) + len(scope) + len(metric.name) + len(metric.unit))
            known = self._metrics[tenant, origin] = _Known({}, {})
        return MetricStreams(self, tenant, origin, known)

    def make_room(self, size: int) -> None:
        """Counts one more entry, of so many bytes as it came; at a limit everything is forgotten, which costs time and
        changes nothing."""
        size = REMEMBERED + DECODED * size
        self._counted += 1
        self._bytes += size
        if self._counted > self._limit or self._bytes > self._limit_bytes:
            self._metrics.clear()
            self._scopes.clear()
            self._resources.clear()
            self._counted = 1
            self._bytes = size


class MetricStreams:
    """The streams of one metric of one request."""

    def __init__(self, cache: StreamCache, tenant: str, origin: Origin, known: _Known) -> None:
        self._cache = cache
        self._tenant = tenant
        self._origin = origin
        self._known = known
        self.adds_up = origin.monotonic
        """True for amounts, False for levels."""

    def known(self) -> dict[bytes, Resolved]:
        """Streams, and refusals, by what `rest` gives for their points."""
        return self._known.by_bytes

    def resolve(self, number: NumberDataPoint) -> Resolved:
        """The stream of a point, or why it has none."""
        rest = _rest(number)
        if not rest or rest != NumberDataPoint(attributes=number.attributes).SerializeToString():
            return self._by_attributes(tuple(number.attributes))
        found = self._known.by_bytes.get(rest)
        if found is None:
            found = self._known.by_bytes[rest] = self._made(tuple(number.attributes))
        return found

    def _by_attributes(self, attributes: tuple[bytes, ...]) -> Resolved:
        found = self._known.by_attributes.get(attributes)
        if found is None:
            found = self._known.by_attributes[attributes] = self._made(attributes)
        return found

    def _made(self, attributes: tuple[bytes, ...]) -> Resolved:
        self._cache.make_room(sum(map(len, attributes)))
        if (refusal := validation.check_number(len(attributes))) is not None:
            return refusal
        try:
            return self._decode(self._origin._replace(attributes=attributes))
        except MalformedRequest as error:
            return Refusal(Reason.ATTRIBUTES_INVALID, str(error))

    def refused(self, number: NumberDataPoint, stream: Resolved, refusal: Refusal) -> Quarantined:
        """The point as it came, with the reason why it is not billed."""
        origin = self._origin
        header = Metric(name=origin.name, unit=origin.unit)
        if origin.reading is GAUGE:
            header.gauge = Sum(data_points=[number]).SerializeToString()
        else:
            header.sum.aggregation_temporality = origin.temporality
            header.sum.is_monotonic = origin.monotonic
            header.sum.data_points.append(number)
        return Quarantined(
            tenant=self._tenant,
            account=stream.series.account if isinstance(stream, Stream) else "",
            meter=origin.name,
            time_ns=number.time_unix_nano,
            refusal=refusal,
            signal="metrics",
            payload=wire.encode_metric(origin.resource, origin.scope, header),
        )

    def _decode(self, origin: Origin) -> Resolved:
        gauge = origin.reading is GAUGE
        refusal = validation.check_metric(origin.name, origin.unit, origin.temporality, origin.monotonic, gauge=gauge)
        attributes = wire.decode_point_attributes(origin.attributes)
        refusal = refusal or validation.check_attributes(attributes)
        if refusal is not None:
            return refusal
        account = validation.account_name(attributes.get(conventions.ACCOUNT))
        assert account is not None, "check_attributes refuses a point without an account"
        resource, scope = self._cache.resource(origin.resource), self._cache.scope(origin.scope)
        mark = read_mark(origin.attributes) if self._cache.kept else None
        dimensions = attributes.without(conventions.ACCOUNT, *([MARK] if mark else []))
        # What identifies the stream is what was sent; what is stored of it is redacted.
        identity = mark.stream if mark else None
        if identity is None:
            identity = stream_identity(self._tenant, resource.sender, scope[:3], origin, attributes)
        redaction = self._cache.redaction
        stored = redaction.attributes(dimensions)
        series = Series(self._tenant, account, origin.name, origin.unit, stored)
        temporality = Temporality(origin.temporality) if origin.monotonic else Temporality.LEVEL
        # Most streams have nothing to redact, and their bytes need not be gone through for that.
        is_clean = stored is dimensions and resource.stored is resource.attributes and not scope.attributes
        if not is_clean or dimensions.get(MARK) is not None:
            origin = redacted_origin(redaction, origin, partial(sum_as_sent, self._tenant, origin))
        return Stream(identity, series, temporality, resource.stored, scope.name, origin)
