"""A cut as OpenTelemetry metrics: delta sums, in batches that fit one request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from tallymark import conventions, quantities
from tallymark.dimensions import Value
from tallymark.meters import Meter
from tallymark.outbox import Batch
from tallymark.quantities import Exact, Wire
from tallymark.recorder import Cut, Stream

MAX_BATCH_POINTS: Final = 2_000

MAX_BATCH_BYTES: Final = 2 * 2**20
"""Estimated, and half of gRPC's default limit of 4 MiB: a batch over the receiver's limit could never be sent."""

_POINT_BYTES: Final = 60  # times, value and the framing of a point
_ATTRIBUTE_BYTES: Final = 16  # a number and the framing of an attribute


def batches_of(
    cut: Cut,
    resource: Resource,
    scope: InstrumentationScope,
    max_points: int = MAX_BATCH_POINTS,
    max_bytes: int = MAX_BATCH_BYTES,
) -> Iterator[Batch]:
    """The cut's values as batches of at most `max_points` points and about `max_bytes` bytes, all of one interval."""
    values: list[tuple[Stream, Wire]] = []
    size = 0
    for stream, value in cut.values:
        cost = _size_of(stream)
        if values and (len(values) >= max_points or size + cost > max_bytes):
            yield _batch(values, cut, resource, scope)
            values, size = [], 0
        values.append((stream, value))
        size += cost
    if values:
        yield _batch(values, cut, resource, scope)


def _batch(values: list[tuple[Stream, Wire]], cut: Cut, resource: Resource, scope: InstrumentationScope) -> Batch:
    points: dict[Meter, list[NumberDataPoint]] = {}
    amounts: dict[str, Exact] = {}
    for stream, value in values:
        meter = stream[0]
        points.setdefault(meter, []).append(
            NumberDataPoint(
                attributes=attributes_of(stream),
                start_time_unix_nano=cut.start_ns,
                time_unix_nano=cut.time_ns,
                value=value,
            )
        )
        amounts[meter.name] = quantities.add(amounts.get(meter.name, 0), quantities.shortest(value))
    metrics = [
        Metric(
            name=meter.name,
            description="",
            unit=meter.unit,
            data=Sum(data_points=own, aggregation_temporality=AggregationTemporality.DELTA, is_monotonic=True),
        )
        for meter, own in points.items()
    ]
    data = MetricsData(
        resource_metrics=[
            ResourceMetrics(
                resource=resource,
                scope_metrics=[ScopeMetrics(scope=scope, metrics=metrics, schema_url="")],
                schema_url=resource.schema_url,
            )
        ]
    )
    return Batch(data, len(values), tuple(amounts.items()))


def attributes_of(stream: Stream) -> dict[str, Value]:
    """A stream's attributes as they go on the wire, without those that are not known."""
    _, account, plan, dimensions = stream
    attributes: dict[str, Value] = {}
    if account is not None:
        attributes[conventions.ACCOUNT] = account
    if plan is not None:
        attributes[conventions.PLAN] = plan
    for name, _, value in dimensions:
        attributes[name] = value
    return attributes


def _size_of(stream: Stream) -> int:
    size = _POINT_BYTES + len(stream[0].name)
    for name, value in attributes_of(stream).items():
        size += _ATTRIBUTE_BYTES + len(name)
        if isinstance(value, str):
            size += len(value) if value.isascii() else 4 * len(value)
    return size
