"""From a metrics request to points that can be written, and the points that cannot, each with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Generator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from struct import Struct
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError
from opentelemetry.proto.metrics.v1 import metrics_pb2

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.model import (
    ENDED,
    Closing,
    ControlTotal,
    EvidenceCount,
    Point,
    Quarantined,
    Reason,
    Refusal,
    Stream,
    Temporality,
)
from tallymark_collector.processors import control, described, meters, validation
from tallymark_collector.processors.at_once import at_once
from tallymark_collector.processors.pace import Pace
from tallymark_collector.processors.set_aside import SetAside
from tallymark_collector.processors.streams import START_TAG, TIMES_AND_VALUE, MetricStreams, StreamCache
from tallymark_collector.wire import points
from tallymark_collector.wire.tallymark_metrics_view_pb2 import (
    Metric,
    MetricsRequest,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
    SumOfBytes,
)

if TYPE_CHECKING:
    from tallymark_collector.metering import Metering

NO_RECORDED_VALUE: Final = 1  # DataPointFlags: the stream has ended, the point has no value
PIECE: Final = 4096
"""Points of known streams that are decoded at once, some ten milliseconds; then others have their turn."""
SLOW_PIECE: Final = 256
"""The same of others, each of which is looked into,"""
SLOW_BYTES: Final = 256 * 1024
"""and of their bytes."""
BYTES_A_POINT: Final = 64
"""Of a resource or scope: what is as much work as a point."""

_TIMES: Final = Struct("<BqBq")
_TIMES_TAGS: Final = (START_TAG, 0x19)
_INTEGER: Final = Struct("<Bq")
_INTEGER_TAG: Final = 0x31
_new: Final = tuple.__new__  # what a NamedTuple's own constructor comes to, in half of its time
_TYPES: Final = {
    "gauge": "gauge",
    "histogram": "histogram",
    "exponential_histogram": "exponential histogram",
    "summary": "summary",
}


@dataclass(slots=True)
class Decoded(SetAside):
    """What a request holds, in its order. (Of a metric of an unsupported type, and of a resource that is too large,
    all points are one item.)"""

    points: list[Point] = field(default_factory=list)
    controls: list[ControlTotal] = field(default_factory=list)
    closings: list[Closing] = field(default_factory=list)
    counts: list[EvidenceCount] = field(default_factory=list)
    unmatched: int = 0
    """Metrics that are not usage, and points that the file of meters passes over."""
    foreign: Counter[str] = field(default_factory=Counter)
    """The same by the metric's name."""

    def pass_over(self, name: str) -> None:
        """Counts what is not usage."""
        self.unmatched += 1
        self.foreign[name] += 1


def decode_metrics(
    tenant: str,
    body: bytes,
    cache: StreamCache,
    limits: validation.TimeLimits,
    now_ns: int,
    metering: Metering | None = None,
    known: Container[meters.Meter] = (),
) -> Decoded:
    """Points of an ExportMetricsServiceRequest. Raises MalformedRequest where the request as a whole cannot be read,
    TooLarge where what of it cannot be billed is too much to be kept; what is wrong with a single point's attributes,
    resource or scope is that point's refusal.

    A metric that the file of meters names is read by `metering` alone; all others by the rule in `meters`, for which
    `known` has the meters of the tenant.
    """
    decoded = Decoded()
    at_once(decoding_metrics(tenant, body, cache, limits, now_ns, decoded, metering, known))
    return decoded


def decoding_metrics(
    tenant: str,
    body: bytes,
    cache: StreamCache,
    limits: validation.TimeLimits,
    now_ns: int,
    decoded: Decoded,
    metering: Metering | None = None,
    known: Container[meters.Meter] = (),
) -> Generator[None, None, None]:
    """The same in pieces: rests after every `PIECE` points or so, sooner where they are new. Other requests may be
    decoded with the same cache in between; not in another thread."""
    request = _Request(tenant, cache, limits.window(now_ns), decoded, metering, known)
    for resource_metrics in wire.parse_metrics(body).resource_metrics:
        yield from request.decode(resource_metrics)


class _Request:
    """One request on its way."""

    def __init__(
        self,
        tenant: str,
        cache: StreamCache,
        window: tuple[int, int],
        decoded: Decoded,
        metering: Metering | None,
        known: Container[meters.Meter],
    ) -> None:
        self._tenant = tenant
        self._cache = cache
        self._window = window
        self._decoded = decoded
        self._metering = metering
        self._known = known
        self._pace = Pace(PIECE)

    def decode(self, resource_metrics: ResourceMetrics) -> Generator[None, None, None]:
        resource = resource_metrics.resource
        if self._pace.full(len(resource) // BYTES_A_POINT):
            yield
        if (refusal := self._cache.unfit_resource(resource)) is not None:
            yield from self._whole(resource, resource_metrics.scope_metrics, refusal)
            return
        for scope_metrics in resource_metrics.scope_metrics:
            scope = scope_metrics.scope
            if self._pace.full(1 + len(scope) // BYTES_A_POINT):
                yield
            if not scope_metrics.metrics:
                continue
            if (refusal := self._cache.unfit_scope(scope)) is not None:
                yield from self._whole(resource, [scope_metrics], refusal)
                continue
            scope_name = self._cache.scope_name(scope)
            metered = None if self._metering is None else self._metering.metrics(self._tenant, resource, scope)
            for metric in scope_metrics.metrics:
                if self._pace.full(1):
                    yield
                if metered is None or not (yield from metered.decoding(metric, self._window, self._decoded)):
                    yield from self._metric(resource, scope, scope_name, metric)

    def _metric(self, resource: bytes, scope: bytes, scope_name: str, metric: Metric) -> Generator[None, None, None]:
        decoded = self._decoded
        if scope_name == conventions.CONTROL_SCOPE:
            found = control.decode(self._tenant, resource, scope, metric, self._window)
            decoded.controls += found.controls
            decoded.closings += found.closings
            decoded.counts += found.counts
            decoded.keep(found.quarantined)
            decoded.rejected += len(found.quarantined)
            decoded.unmatched += found.unmatched
        elif not self._is_usage(scope_name, metric):
            decoded.pass_over(metric.name)
        elif (numbers := _numbers(metric)) is not None:
            streams = self._cache.streams(self._tenant, resource, scope, metric)
            for start in range(0, len(numbers), PIECE):
                piece = numbers[start : start + PIECE]
                if self._pace.full(len(piece)):
                    yield
                yield from _decode_numbers(piece, streams, self._window, decoded)
        else:
            _keep_aside(self._tenant, metric, wire.encode_metric(resource, scope, metric), decoded)

    def _is_usage(self, scope_name: str, metric: Metric) -> bool:
        # What a file of meters does not take of its own meters is no usage of them by another way.
        is_the_files = self._metering is not None and self._metering.makes(self._tenant, metric.name)
        return meters.is_usage(scope_name, metric, () if is_the_files else self._known)

    def _whole(self, resource: bytes, scopes: Sequence[ScopeMetrics], refusal: Refusal) -> Generator[None, None, None]:
        """Keeps what may be usage as one item, as it came: many would be as many copies of what is too large."""
        request = MetricsRequest()
        kept = request.resource_metrics.add(resource=resource)
        latest = number = 0
        for scope_metrics in scopes:
            scope = scope_metrics.scope
            name = described.scope_name(scope)
            usage = []
            for metric in scope_metrics.metrics:
                if self._pace.full(1):
                    yield
                if said := self._saying(name, metric):
                    usage.append(metric)
                    number += said
                    latest = max([latest, *(point.time_unix_nano for point in metric.sum.data_points)])
                else:
                    self._decoded.pass_over(metric.name)
            if usage:
                kept.scope_metrics.add(scope=scope, metrics=usage)
        if number:
            item = Quarantined(self._tenant, "", "", latest, refusal, "metrics", request.SerializeToString())
            self._decoded.keep([item])
            self._decoded.rejected += number

    def _saying(self, scope_name: str, metric: Metric) -> int:
        """How many points of a metric may be usage, or tell of it; of those that cannot be read, all."""
        if scope_name == conventions.CONTROL_SCOPE:
            return points.number(metric) if control.is_known(metric.name) else 0
        is_metered = self._metering is not None and self._metering.names_metric(self._tenant, metric.name)
        if not (is_metered or self._is_usage(scope_name, metric)):
            return 0
        kind = metric.WhichOneof("data")
        try:
            found = metric.sum if kind == "sum" else Sum.FromString(metric.gauge) if kind == "gauge" else None
        except DecodeError:
            found = None
        if found is None:
            return points.number(metric)
        return sum(not number.flags & NO_RECORDED_VALUE for number in found.data_points)


def _numbers(metric: Metric) -> Sequence[bytes] | None:
    """The points of a sum or a gauge, which lie in a gauge as in a sum, each written again: what OpenTelemetry's proto
    knows is in the order of its numbers. None of what is neither, or cannot be read."""
    match metric.WhichOneof("data"):
        case "sum":
            return SumOfBytes.FromString(metric.sum.SerializeToString()).data_points
        case "gauge":
            try:
                found = Sum.FromString(metric.gauge)
            except DecodeError:
                return None
            return SumOfBytes.FromString(found.SerializeToString()).data_points or None
        case _:
            return None


def _decode_numbers(
    numbers: Sequence[bytes], streams: MetricStreams, window: tuple[int, int], decoded: Decoded
) -> Generator[None, None, None]:
    oldest, latest = window
    add = decoded.points.append
    known = streams.known()
    # The points of an interval share their times, and most counts are small: what the bytes before the attributes say
    # is read where it changes.
    times = measured = b""
    start_ns = time_ns = 0
    value: Decimal | None = None
    usual = False
    slow = slow_bytes = 0
    for data in numbers:
        if data[: _TIMES.size] != times:
            times = data[: _TIMES.size]
            usual = False
            if len(times) == _TIMES.size:
                first, start_ns, second, time_ns = _TIMES.unpack(times)
                usual = (first, second) == _TIMES_TAGS and 0 < start_ns <= time_ns and oldest <= time_ns <= latest
        if usual:
            if data[_TIMES.size : TIMES_AND_VALUE] != measured:
                measured = data[_TIMES.size : TIMES_AND_VALUE]
                value = _small(measured)
            # Nothing can be wrong with such a point of a known stream: it is within all limits. (`_rest`, in place.)
            found = known.get(data[TIMES_AND_VALUE:])
            if value is not None and type(found) is Stream:
                add(_new(Point, (found, start_ns, time_ns, value, 0, ())))
                continue
        _decode_number(NumberDataPoint.FromString(data), streams, window, decoded)
        slow += 1
        slow_bytes += len(data)
        if slow >= SLOW_PIECE or slow_bytes >= SLOW_BYTES:
            slow = slow_bytes = 0
            yield


def _small(measured: bytes) -> Decimal | None:
    """A positive integer as a point has it on the wire; None of anything else."""
    if len(measured) < _INTEGER.size:
        return None
    tag, whole = _INTEGER.unpack(measured)
    return Decimal(whole) if tag == _INTEGER_TAG and whole > 0 else None


def _decode_number(number: NumberDataPoint, streams: MetricStreams, window: tuple[int, int], decoded: Decoded) -> None:
    """Any point."""
    stream = streams.resolve(number)
    if number.flags & NO_RECORDED_VALUE:
        if isinstance(stream, Stream) and (end := level_end(stream, number.time_unix_nano, window)) is not None:
            decoded.points.append(end)
        return
    value = validation.read_value(number) if streams.adds_up else validation.read_level(number)
    if isinstance(stream, Refusal):
        refusal: Refusal | None = stream
    elif isinstance(value, Refusal):
        refusal = value
    else:
        refusal = validation.check_times(number.start_time_unix_nano, number.time_unix_nano, *window)
        if refusal is None:
            decoded.points.append(Point(stream, number.start_time_unix_nano, number.time_unix_nano, value))
            return
    assert refusal is not None, "the point was added above"
    decoded.rejected += 1
    decoded.keep([streams.refused(number, stream, refusal)])


def level_end(stream: Stream, time_ns: int, window: tuple[int, int]) -> Point | None:
    """What it means that a stream has ended; None where that says nothing: of amounts, or at a time that nobody can
    believe, from which on a level is stale some time."""
    if stream.temporality is not Temporality.LEVEL or validation.check_times(0, time_ns, *window) is not None:
        return None
    return Point(stream, 0, time_ns, Decimal(0), ENDED)


def _keep_aside(tenant: str, metric: Metric, payload: bytes, decoded: Decoded) -> None:
    kind = metric.WhichOneof("data")
    if kind is None:
        decoded.pass_over(metric.name)
        return
    try:
        found = getattr(metrics_pb2.Metric.FromString(metric.SerializeToString()), kind).data_points
    except DecodeError as error:
        refusal = Refusal(Reason.ATTRIBUTES_INVALID, f"not an OTLP Metric: {error}")
        decoded.rejected += 1
        decoded.keep([Quarantined(tenant, "", metric.name, 0, refusal, "metrics", payload)])
        return
    if not found:
        decoded.pass_over(metric.name)
        return
    detail = f"a {_TYPES[kind]} is not billed: send a sum (Counter), or name its count or sum in a file of meters"
    refusal = Refusal(Reason.TYPE_UNSUPPORTED, detail)
    time_ns = max(point.time_unix_nano for point in found)
    decoded.rejected += len(found)
    decoded.keep([Quarantined(tenant, "", metric.name, time_ns, refusal, "metrics", payload)])
