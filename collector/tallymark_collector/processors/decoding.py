"""From a metrics request to points that can be written, and the points that cannot, each with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Final, TypeAlias

from google.protobuf.message import DecodeError
from opentelemetry.proto.metrics.v1 import metrics_pb2

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.model import (
    Attributes,
    Closing,
    ControlTotal,
    EvidenceCount,
    Origin,
    Point,
    Quarantined,
    Reading,
    Reason,
    Refusal,
    Series,
    Stream,
    Temporality,
    fingerprint,
)
from tallymark_collector.processors import control, meters, validation
from tallymark_collector.wire.tallymark_metrics_view_pb2 import Metric, NumberDataPoint, Sum

if TYPE_CHECKING:
    from tallymark_collector.metering import Metering

MAX_CACHED_STREAMS: Final = 200_000
"""Streams whose decoded form is kept. At the limit all are dropped and decoded again as they come: about 1 KB each."""

NO_RECORDED_VALUE: Final = 1  # DataPointFlags: the stream has ended, the point carries nothing
_TYPES: Final = {
    "gauge": "gauge",
    "histogram": "histogram",
    "exponential_histogram": "exponential histogram",
    "summary": "summary",
}

_GAUGE: Final = Reading("gauge", "value", Decimal(1))

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


class StreamCache:
    """Remembers what the repeating bytes of requests mean. Not thread-safe: one event loop owns it."""

    def __init__(self, limit: int = MAX_CACHED_STREAMS) -> None:
        self._limit = limit
        self._counted = 0
        self._metrics: dict[tuple[str, Origin], dict[tuple[bytes, ...], Resolved]] = {}
        self._scopes: dict[bytes, str] = {}

    @property
    def size(self) -> int:
        """What is remembered now; never more than the limit."""
        return len(self._scopes) + len(self._metrics) + sum(map(len, self._metrics.values()))

    def scope_name(self, scope: bytes) -> str:
        """The name in an InstrumentationScope message, "" where it cannot be read."""
        name = self._scopes.get(scope)
        if name is None:
            try:
                name = wire.decode_scope(scope).name
            except MalformedRequest:
                name = ""  # its points are refused one by one, if they are usage at all
            self.make_room()
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
            reading=_GAUGE if metric.WhichOneof("data") == "gauge" else None,
        )
        known = self._metrics.get((tenant, origin))
        if known is None:
            self.make_room()
            known = self._metrics[tenant, origin] = {}
        return MetricStreams(self, tenant, origin, known)

    def make_room(self) -> None:
        """Counts one more entry; at the limit everything is forgotten, which costs time and changes nothing."""
        self._counted += 1
        if self._counted > self._limit:
            self._metrics.clear()
            self._scopes.clear()
            self._counted = 1


class MetricStreams:
    """The streams of one metric of one request."""

    def __init__(
        self, cache: StreamCache, tenant: str, origin: Origin, known: dict[tuple[bytes, ...], Resolved]
    ) -> None:
        self._cache = cache
        self._tenant = tenant
        self._origin = origin
        self._known = known
        self.adds_up = origin.monotonic
        """True for amounts, False for levels."""

    def resolve(self, attributes: tuple[bytes, ...]) -> Resolved:
        """The stream of a point with these attributes, or why it has none."""
        found = self._known.get(attributes)
        if found is None:
            try:
                found = self._decode(self._origin._replace(attributes=attributes))
            except MalformedRequest as error:
                found = Refusal(Reason.ATTRIBUTES_INVALID, str(error))
            self._cache.make_room()
            self._known[attributes] = found
        return found

    def refused(self, number: NumberDataPoint, stream: Resolved, refusal: Refusal) -> Quarantined:
        """The point as it came, with the reason why it is not billed."""
        origin = self._origin
        header = Metric(name=origin.name, unit=origin.unit)
        if origin.reading is _GAUGE:
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
        gauge = origin.reading is _GAUGE
        refusal = validation.check_metric(origin.name, origin.unit, origin.temporality, origin.monotonic, gauge=gauge)
        attributes = wire.decode_point_attributes(origin.attributes)
        refusal = refusal or validation.check_attributes(attributes)
        if refusal is not None:
            return refusal
        account = validation.account_name(attributes.get(conventions.ACCOUNT))
        assert account is not None, "check_attributes refuses a point without an account"
        resource = wire.decode_resource(origin.resource)
        scope = wire.decode_scope(origin.scope)
        series = Series(self._tenant, account, origin.name, origin.unit, attributes.without(conventions.ACCOUNT))
        identity = fingerprint(
            "stream",
            self._tenant,
            identifying(resource),
            scope.name,
            scope.version,
            wire.decode_attributes(scope.attributes),
            origin.name,
            origin.unit,
            "gauge" if gauge else "sum",
            origin.temporality,
            origin.monotonic,
            attributes,
        )
        temporality = Temporality(origin.temporality) if origin.monotonic else Temporality.LEVEL
        return Stream(identity, series, temporality, resource, scope.name, origin)


def identifying(resource: Attributes) -> Attributes:
    """The attributes that say which process sent a point.

    With `service.instance.id` those three that OpenTelemetry calls identifying: a gateway may decorate the rest
    without making another stream of it. Without it, all of them: better two streams than two processes in one.
    """
    if resource.get(conventions.SERVICE_INSTANCE) is None:
        return resource
    names = (conventions.SERVICE_NAMESPACE, conventions.SERVICE_NAME, conventions.SERVICE_INSTANCE)
    return Attributes((key, value) for key, value in resource if key in names)


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
    window = limits.window(now_ns)
    for resource_metrics in wire.parse_metrics(body).resource_metrics:
        for scope_metrics in resource_metrics.scope_metrics:
            scope_name = cache.scope_name(scope_metrics.scope)
            resource, scope = resource_metrics.resource, scope_metrics.scope
            metered = None if metering is None else metering.metrics(tenant, resource, scope)
            for metric in scope_metrics.metrics:
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
                elif metric.WhichOneof("data") == "sum":
                    streams = cache.streams(tenant, resource_metrics.resource, scope_metrics.scope, metric)
                    _decode_numbers(metric.sum.data_points, streams, window, decoded)
                elif metric.WhichOneof("data") == "gauge" and (gauge := _gauge(metric)) is not None:
                    streams = cache.streams(tenant, resource_metrics.resource, scope_metrics.scope, metric)
                    _decode_numbers(gauge.data_points, streams, window, decoded)
                else:
                    payload = wire.encode_metric(resource_metrics.resource, scope_metrics.scope, metric)
                    _keep_aside(tenant, metric, payload, decoded)
    return decoded


def _gauge(metric: Metric) -> Sum | None:
    """A gauge's points, which lie in it as in a sum; None where they cannot be read or are none."""
    try:
        gauge = Sum.FromString(metric.gauge)
    except DecodeError:
        return None
    return gauge if gauge.data_points else None


def _decode_numbers(
    numbers: Iterable[NumberDataPoint], streams: MetricStreams, window: tuple[int, int], decoded: Decoded
) -> None:
    oldest, latest = window
    for number in numbers:
        stream = streams.resolve(tuple(number.attributes))
        if number.flags & NO_RECORDED_VALUE:
            continue
        start_ns, time_ns = number.start_time_unix_nano, number.time_unix_nano
        value = validation.read_value(number) if streams.adds_up else validation.read_level(number)
        if isinstance(stream, Refusal):
            refusal: Refusal | None = stream
        elif isinstance(value, Refusal):
            refusal = value
        else:
            refusal = validation.check_times(start_ns, time_ns, oldest, latest)
            if refusal is None:
                decoded.points.append(Point(stream, start_ns, time_ns, value))
                continue
        assert refusal is not None, "the point was appended above"
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
