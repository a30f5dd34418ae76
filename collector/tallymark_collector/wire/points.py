"""A metric taken apart into its points without looking into them, where one of them cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tallymark_collector.errors import MalformedRequest
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
    for number, field in _fields(getattr(metric, kind)):
        if number == _DATA_POINTS:
            points.append(field)
        else:
            header += field
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
        return sum(field == _DATA_POINTS for field, _ in _fields(getattr(metric, kind)))
    except MalformedRequest:
        return 1


def _with_sum(bare: Metric, point: bytes) -> Metric:
    one = Metric()
    one.CopyFrom(bare)
    one.sum.data_points.add().ParseFromString(point)
    return one


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, the field with its tag) of each field."""
    at = 0
    while at < len(message):
        tag, value = _varint(message, at)
        match tag & 7:
            case 0:
                _, end = _varint(message, value)
            case 1:
                end = value + 8
            case 2:
                size, value = _varint(message, value)
                end = value + size
            case 5:
                end = value + 4
            case other:
                raise MalformedRequest(f"a metric's field has the wire type {other}")
        if end > len(message):
            raise MalformedRequest("a metric's field is cut off")
        yield tag >> 3, message[at:end]
        at = end


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise MalformedRequest("a number in a metric is cut off")
