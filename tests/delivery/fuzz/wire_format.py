"""Protobuf's wire format read by hand: mutations take it apart, and points are counted without the code under test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError
from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope
from opentelemetry.proto.metrics.v1 import metrics_pb2

from tallymark import conventions
from tallymark_collector.wire.tallymark_metrics_view_pb2 import Sum

VARINT: Final = 0
FIXED64: Final = 1
BYTES: Final = 2
GROUP: Final = 3
END: Final = 4
FIXED32: Final = 5


class Unreadable(ValueError):  # noqa: N818 - what the bytes are
    """Not protobuf's wire format."""


class Field(NamedTuple):
    """One field as it stands in a message's bytes."""

    number: int
    kind: int
    """The wire type."""
    start: int
    """Of the tag."""
    value: int
    """Where the value begins; of bytes, behind their length."""
    end: int


def varint(value: int) -> bytes:
    """An unsigned number as a varint."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def fields(data: bytes) -> list[Field]:
    """The fields of a message, those inside of it unread. Raises Unreadable."""
    found = []
    at = 0
    while at < len(data):
        one = _field(data, at)
        if one.kind == END:
            raise Unreadable("a group ends that has not begun")
        found.append(one)
        at = one.end
    return found


def _field(data: bytes, start: int) -> Field:
    tag, at = _varint(data, start)
    number, kind = tag >> 3 & 0x1FFFFFFF, tag & 7
    value = at
    if kind == VARINT:
        at = _varint(data, at)[1]
    elif kind == FIXED64:
        at += 8
    elif kind == FIXED32:
        at += 4
    elif kind == BYTES:
        length, value = _varint(data, at)
        at = value + length
    elif kind == GROUP:
        while True:
            inner = _field(data, at)
            at = inner.end
            if inner.kind == END:
                if inner.number != number:
                    raise Unreadable("a group ends as another")
                break
    elif kind != END:
        raise Unreadable(f"no wire type {kind}")
    if at > len(data):
        raise Unreadable("it is cut off")
    return Field(number, kind, start, value, at)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    if at < len(data) and data[at] < 0x80:
        return data[at], at + 1
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise Unreadable("a varint without an end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


_RESOURCES: Final = 1
_SCOPES: Final = 2
_SCOPE: Final = 1
_METRICS: Final = 2
_NAME: Final = 1
_SUM: Final = 7
_GAUGE: Final = 5
KINDS: Final = {5: "gauge", 7: "sum", 9: "histogram", 10: "exponential_histogram", 11: "summary"}
_POINTS: Final = 1
_ATTRIBUTES: Final = 7
_FLAGS: Final = 8
_ACCOUNT: Final = conventions.ACCOUNT.encode()


@dataclass
class Census:
    """How many data points a metrics request holds, by what has to become of them."""

    usage: int = 0
    """Points of sums that are usage, without those that say that they carry nothing."""
    ended: int = 0
    """Those."""
    kept_aside: int = 0
    """Points of other types under usage, which go to quarantine."""
    control: int = 0
    """Points of control metrics that are known."""
    foreign: int = 0
    repeated: bool = False
    """A message that can be there once is there again: readers may merge the two, or take the last."""

    @property
    def points(self) -> int:
        """All of them."""
        return self.usage + self.ended + self.kept_aside + self.control + self.foreign


def census(body: bytes) -> Census:
    """Counts a metrics request's points. For bytes that are a message; raises Unreadable."""
    found = Census()
    for resource in _each(body, _RESOURCES):
        inside = fields(resource)
        found.repeated |= sum(one.number == 1 and one.kind == BYTES for one in inside) > 1
        for scope in _each(resource, _SCOPES):
            inside = fields(scope)
            names = [scope[one.value : one.end] for one in inside if one.number == _SCOPE and one.kind == BYTES]
            found.repeated |= len(names) > 1
            scope_name = _scope_name(names[-1]) if names else ""
            for metric in _each(scope, _METRICS):
                _count(found, scope_name, metric)
    return found


def _count(found: Census, scope_name: str, metric: bytes) -> None:
    name, kind, values = b"", 0, []
    for one in fields(metric):
        if one.kind != BYTES:
            continue
        value = metric[one.value : one.end]
        if one.number == _NAME:
            found.repeated |= bool(name)
            name = value
        elif one.number in KINDS:
            if kind not in (0, one.number) or (kind and kind != _SUM):
                values = []
                found.repeated = True
            kind = one.number
            values.append(value)
    if kind == _GAUGE and not _readable_gauge(values[-1]):
        points = [b""]  # kept whole, as one item
    elif kind not in (0, _SUM, _GAUGE) and not _readable(metric):
        points = [b""]
    else:
        points = [point for value in values for point in _each(value, _POINTS)]
    if scope_name == conventions.CONTROL_SCOPE:
        known = name.decode() in (conventions.CONTROL_TOTAL, conventions.CONTROL_CLOSED, conventions.CONTROL_EVIDENCE)
        if known and kind == _SUM:
            found.control += len(points)
        elif known:
            found.control += 1  # one item, whatever it holds
        else:
            found.foreign += len(points)
    elif scope_name == conventions.MIRROR_SCOPE_NAME:
        found.foreign += len(points)
    elif kind == _SUM or (kind == _GAUGE and _readable_gauge(values[-1])):
        attributes = [list(_each(point, _ATTRIBUTES)) for point in points]
        named = _ACCOUNT in metric if kind == _GAUGE else any(_ACCOUNT in item for some in attributes for item in some)
        if scope_name != conventions.SCOPE_NAME and not named:
            found.foreign += len(points)
            return
        ended = sum(_flags(point) & 1 for point in points)
        found.ended += ended
        found.usage += len(points) - ended
    elif scope_name == conventions.SCOPE_NAME or _ACCOUNT in metric:
        found.kept_aside += len(points)
    else:
        found.foreign += len(points)


def _each(data: bytes, number: int) -> Iterator[bytes]:
    return (data[one.value : one.end] for one in fields(data) if one.number == number and one.kind == BYTES)


def _flags(point: bytes) -> int:
    flags = 0
    for one in fields(point):
        if one.number == _FLAGS and one.kind == VARINT:
            flags = _varint(point, one.value)[0] & 0xFFFFFFFF
    return flags


def _readable_gauge(gauge: bytes) -> bool:
    try:
        Sum.FromString(gauge)
    except DecodeError:
        return False
    return True


def _readable(metric: bytes) -> bool:
    try:
        metrics_pb2.Metric.FromString(metric)
    except DecodeError:
        return False
    return True


def _scope_name(scope: bytes) -> str:
    try:
        return str(InstrumentationScope.FromString(scope).name)
    except DecodeError:
        return ""
