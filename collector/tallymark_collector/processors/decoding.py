"""From a metrics request to points that can be written, and the points that cannot, each with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from struct import Struct
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError
from opentelemetry.proto.metrics.v1 import metrics_pb2

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.model import (
    Closing,
    ControlTotal,
    EvidenceCount,
    Point,
    Quarantined,
    Reason,
    Refusal,
    Stream,
)
from tallymark_collector.processors import control, meters, validation
from tallymark_collector.processors.streams import START_TAG, TIMES_AND_VALUE, MetricStreams, StreamCache
from tallymark_collector.wire.tallymark_metrics_view_pb2 import Metric, NumberDataPoint, Sum, SumOfBytes

if TYPE_CHECKING:
    from tallymark_collector.metering import Metering

NO_RECORDED_VALUE: Final = 1  # DataPointFlags: the stream has ended, the point carries nothing
PIECE: Final = 4096
"""Points that are decoded at once, some ten milliseconds; then others have their turn."""

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
) -> None:
    oldest, latest = window
    add = decoded.points.append
    known = streams.known()
    # The points of an interval share their times, and most counts are small: what the bytes before the attributes say
    # is read where it changes.
    times = measured = b""
    start_ns = time_ns = 0
    value: Decimal | None = None
    usual = False
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
                add(_new(Point, (found, start_ns, time_ns, value, 0, b"")))
                continue
        _decode_number(NumberDataPoint.FromString(data), streams, window, decoded)


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
