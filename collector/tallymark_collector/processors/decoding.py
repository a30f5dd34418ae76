"""From a metrics request to points that can be written, and the points that cannot, each with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from google.protobuf.message import DecodeError
from opentelemetry.proto.metrics.v1 import metrics_pb2

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.model import (
    Closing,
    ControlTotal,
    EvidenceCount,
    Origin,
    Point,
    Quarantined,
    Reason,
    Refusal,
    Series,
    Stream,
    Temporality,
)
from tallymark_collector.processors import control, meters, validation
from tallymark_collector.processors.aside import redacted_origin
from tallymark_collector.processors.redaction import STANDARD, Redaction
from tallymark_collector.processors.sent import GAUGE, MARK, read_mark, stream_of, sum_as_sent
from tallymark_collector.wire.tallymark_metrics_view_pb2 import Metric, NumberDataPoint, Sum

if TYPE_CHECKING:
    from tallymark_collector.metering import Metering

MAX_CACHED_STREAMS: Final = 200_000
"""Streams whose decoded form is kept. At the limit all are dropped and decoded again as they come."""
MAX_CACHED_BYTES: Final = 512 * 2**20
"""About what they take in memory at the most: each `REMEMBERED`, and `DECODED` times its bytes."""
REMEMBERED: Final = 1024
DECODED: Final = 8
"""As it came, decoded, and as dimensions; many short attributes take more, few long ones less."""

NO_RECORDED_VALUE: Final = 1  # DataPointFlags: the stream has ended, the point carries nothing
PIECE: Final = 4096
"""Points that are decoded at once, some ten milliseconds; then others have their turn."""

_START_TAG: Final = 0x11  # NumberDataPoint.start_time_unix_nano on the wire: field 2, eight bytes
_TIMES_AND_VALUE: Final = 3 * 9
_new: Final = tuple.__new__  # what a NamedTuple's own constructor comes to, in half of its time
_TYPES: Final = {
    "gauge": "gauge",
    "histogram": "histogram",
    "exponential_histogram": "exponential histogram",
    "summary": "summary",
}

Resolved: TypeAlias = "Stream | Refusal"


@dataclass(slots=True)
class Decoded:
    """What a request holds, in its order."""

    points: list[Point] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    controls: list[ControlTotal] = field(default_factory=list)
    closings: list[Closing] = field(default_factory=list)
    counts: list[EvidenceCount] = field(default_factory=list)
    rejected: int = 0
    """Data points among `quarantined` (an unsupported metric is kept as one item)."""
    unmatched: int = 0
    """Metrics that are not usage, and points that the file of meters passes over."""
    foreign: Counter[str] = field(default_factory=Counter)
    """The same by the metric's name."""

    def pass_over(self, name: str) -> None:
        """Counts what is not usage."""
        self.unmatched += 1
        self.foreign[name] += 1


def _rest(number: NumberDataPoint) -> bytes:
    """What a point with both times and an integer that is not 0 holds beside them; b"" for other points.

    Written again, it begins with these three, 27 bytes in the order of their field numbers, and its attributes follow:
    one slice that is as good a key as they are, and much sooner made. What this collector does not know of comes last.
    """
    if not (number.start_time_unix_nano and number.time_unix_nano and number.as_int):
        return b""
    data = number.SerializeToString()
    return data[_TIMES_AND_VALUE:] if data[0] == _START_TAG else b""


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
        self._scopes: dict[bytes, str] = {}

    @property
    def size(self) -> int:
        """What is remembered now; never more than the limit."""
        known = sum(len(one.by_bytes) + len(one.by_attributes) for one in self._metrics.values())
        return len(self._scopes) + len(self._metrics) + known

    @property
    def weight(self) -> int:
        """About what it takes in memory; more than the limit only by what came last."""
        return self._bytes

    def scope_name(self, scope: bytes) -> str:
        """The name in an InstrumentationScope message, "" where it cannot be read."""
        name = self._scopes.get(scope)
        if name is None:
            try:
                name = wire.decode_scope(scope).name
            except MalformedRequest:
                name = ""  # its points are refused one by one, if they are usage at all
            self.make_room(len(scope))
            self._scopes[scope] = name
        return name

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
        resource = wire.decode_resource(origin.resource)
        scope = wire.decode_scope(origin.scope)
        mark = read_mark(origin.attributes) if self._cache.kept else None
        dimensions = attributes.without(conventions.ACCOUNT, *([MARK] if mark else []))
        # What identifies the stream is what was sent; what is stored of it is redacted.
        identity = mark.stream if mark and mark.stream else stream_of(self._tenant, origin)
        redaction = self._cache.redaction
        stored, stored_resource = redaction.attributes(dimensions), redaction.attributes(resource)
        series = Series(self._tenant, account, origin.name, origin.unit, stored)
        temporality = Temporality(origin.temporality) if origin.monotonic else Temporality.LEVEL
        # Most streams have nothing to redact, and their bytes need not be gone through for that.
        is_clean = stored is dimensions and stored_resource is resource and not scope.attributes
        if not is_clean or dimensions.get(MARK) is not None:
            origin = redacted_origin(redaction, origin, partial(sum_as_sent, self._tenant, origin))
        return Stream(identity, series, temporality, stored_resource, scope.name, origin)


def decode_metrics(
    tenant: str,
    body: bytes,
    cache: StreamCache,
    limits: validation.TimeLimits,
    now_ns: int,
    metering: Metering | None = None,
) -> Decoded:
    """Points of an ExportMetricsServiceRequest. Raises MalformedRequest where the request as a whole cannot be read;
    what is wrong with a single point's attributes, resource or scope is that point's refusal.

    A metric that the file of meters names is read by `metering` alone; all others by the rule in `meters`.
    """
    decoded = Decoded()
    for _ in decoding_metrics(tenant, body, cache, limits, now_ns, decoded, metering):
        pass
    return decoded


def decoding_metrics(
    tenant: str,
    body: bytes,
    cache: StreamCache,
    limits: validation.TimeLimits,
    now_ns: int,
    decoded: Decoded,
    metering: Metering | None = None,
) -> Generator[None, None, None]:
    """The same in pieces: rests after every `PIECE` points or so. Other requests may be decoded with the same cache in
    between; not in another thread."""
    window = limits.window(now_ns)
    left = PIECE
    for resource_metrics in wire.parse_metrics(body).resource_metrics:
        for scope_metrics in resource_metrics.scope_metrics:
            scope_name = cache.scope_name(scope_metrics.scope)
            resource, scope = resource_metrics.resource, scope_metrics.scope
            metered = None if metering is None else metering.metrics(tenant, resource, scope)
            for metric in scope_metrics.metrics:
                left -= 1
                if left <= 0:
                    yield
                    left = PIECE
                if metered is not None and metered.decode(metric, window, decoded):
                    continue
                if scope_name == conventions.CONTROL_SCOPE:
                    found = control.decode(tenant, resource_metrics.resource, scope_metrics.scope, metric, window)
                    decoded.controls += found.controls
                    decoded.closings += found.closings
                    decoded.counts += found.counts
                    decoded.quarantined += found.quarantined
                    decoded.rejected += len(found.quarantined)
                    decoded.unmatched += found.unmatched
                elif not meters.is_usage(scope_name, metric):
                    decoded.pass_over(metric.name)
                elif (numbers := _numbers(metric)) is not None:
                    streams = cache.streams(tenant, resource_metrics.resource, scope_metrics.scope, metric)
                    for start in range(0, len(numbers), PIECE):
                        piece = numbers[start : start + PIECE]
                        left -= len(piece)
                        if left <= 0:
                            yield
                            left = PIECE
                        _decode_numbers(piece, streams, window, decoded)
                else:
                    payload = wire.encode_metric(resource_metrics.resource, scope_metrics.scope, metric)
                    _keep_aside(tenant, metric, payload, decoded)


def _numbers(metric: Metric) -> Sequence[NumberDataPoint] | None:
    """The points of a sum or a gauge, which lie in a gauge as in a sum; None of what is neither, or cannot be read."""
    match metric.WhichOneof("data"):
        case "sum":
            return metric.sum.data_points
        case "gauge":
            try:
                return Sum.FromString(metric.gauge).data_points or None
            except DecodeError:
                return None
        case _:
            return None


def _decode_numbers(
    numbers: Sequence[NumberDataPoint], streams: MetricStreams, window: tuple[int, int], decoded: Decoded
) -> None:
    oldest, latest = window
    add = decoded.points.append
    known = streams.known()
    last, value_of_last = 0, Decimal()  # values repeat, too: most counts are small
    for number in numbers:
        start_ns, time_ns = number.start_time_unix_nano, number.time_unix_nano
        whole = number.as_int
        if whole > 0 and 0 < start_ns <= time_ns and oldest <= time_ns <= latest:
            # Nothing can be wrong with such a point of a known stream: it is within all limits. (`_rest`, in place.)
            data = number.SerializeToString()
            found = known.get(data[_TIMES_AND_VALUE:])
            if type(found) is Stream and data[0] == _START_TAG:
                if whole != last:
                    last, value_of_last = whole, Decimal(whole)
                add(_new(Point, (found, start_ns, time_ns, value_of_last, 0, b"")))
                continue
        stream = streams.resolve(number)
        if number.flags & NO_RECORDED_VALUE:
            continue
        value = validation.read_value(number) if streams.adds_up else validation.read_level(number)
        if isinstance(stream, Refusal):
            refusal: Refusal | None = stream
        elif isinstance(value, Refusal):
            refusal = value
        else:
            refusal = validation.check_times(start_ns, time_ns, oldest, latest)
            if refusal is None:
                add(Point(stream, start_ns, time_ns, value))
                continue
        assert refusal is not None, "the point was added above"
        decoded.rejected += 1
        decoded.quarantined.append(streams.refused(number, stream, refusal))


def _keep_aside(tenant: str, metric: Metric, payload: bytes, decoded: Decoded) -> None:
    kind = metric.WhichOneof("data")
    if kind is None:
        decoded.pass_over(metric.name)
        return
    try:
        points = getattr(metrics_pb2.Metric.FromString(metric.SerializeToString()), kind).data_points
    except DecodeError as error:
        refusal = Refusal(Reason.ATTRIBUTES_INVALID, f"not an OTLP Metric: {error}")
        decoded.rejected += 1
        decoded.quarantined.append(Quarantined(tenant, "", metric.name, 0, refusal, "metrics", payload))
        return
    if not points:
        decoded.pass_over(metric.name)
        return
    detail = f"a {_TYPES[kind]} is not billed: send a sum (Counter), or name its count or sum in a file of meters"
    refusal = Refusal(Reason.TYPE_UNSUPPORTED, detail)
    time_ns = max(point.time_unix_nano for point in points)
    decoded.rejected += len(points)
    decoded.quarantined.append(Quarantined(tenant, "", metric.name, time_ns, refusal, "metrics", payload))
