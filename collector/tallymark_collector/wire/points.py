"""A metric taken apart into its points without looking into them, where one of them cannot be read."""

from __future__ import annotations

from typing import Final

from tallymark_collector.errors import MalformedRequest
from tallymark_collector.wire.fields import fields
from tallymark_collector.wire.tallymark_metrics_view_pb2 import Metric

_DATA_POINTS: Final = 1
"""The field's number in Gauge, Histogram, ExponentialHistogram and Summary alike."""


def alone(metric: Metric) -> list[Metric]:
    """The metric once for each of its points, with that point only. Raises MalformedRequest."""
    kind = metric.WhichOneof("data")
    if kind is None:
        return []
    bare = Metric()
    bare.CopyFrom(metric)
    if kind == "sum":
        del bare.sum.data_points[:]
        return [_with_sum(bare, point.SerializeToString()) for point in metric.sum.data_points]
    header, points = b"", []
    data = getattr(metric, kind)
    setattr(bare, kind, b"")  # or each would be copied with all of them
    for field in fields(data):
        if field.number == _DATA_POINTS:
            points.append(data[field.begin : field.end])
        else:
            header += data[field.begin : field.end]
    found = []
    for point in points:
        one = Metric()
        one.CopyFrom(bare)
        setattr(one, kind, header + point)
        found.append(one)
    return found


def number(metric: Metric) -> int:
    """How many points it has; 1 where they cannot be told from each other."""
    kind = metric.WhichOneof("data")
    if kind is None:
        return 0
    if kind == "sum":
        return len(metric.sum.data_points)
    try:
        return sum(field.number == _DATA_POINTS for field in fields(getattr(metric, kind)))
    except MalformedRequest:
        return 1


def _with_sum(bare: Metric, point: bytes) -> Metric:
    one = Metric()
    one.CopyFrom(bare)
    one.sum.data_points.add().ParseFromString(point)
    return one
