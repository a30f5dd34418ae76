"""The control totals that a request holds, read and added up without the decoder's help."""

from __future__ import annotations

import math
from collections import defaultdict
from fractions import Fraction
from typing import Final

from google.protobuf.message import DecodeError
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

from tallymark import conventions
from tallymark_collector.processors import control
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.wire import parse_metrics

_PARTS: Final = ((conventions.CONTROL_PART, 0), (conventions.CONTROL_PARTS, 1))


# An index into the strings of profiles: "process the data as if this value were absent or empty" (OTLP, common.proto).
_ABSENT: Final = (None, "string_value_strindex")


def _whole(value: AnyValue | None, default: int) -> int:
    kind = None if value is None else value.WhichOneof("value")
    if value is None or kind in _ABSENT:
        return default
    return value.int_value if kind == "int_value" else -1


def whole_totals(body: bytes) -> dict[tuple[object, ...], list[int]]:
    """(resource, meter, unit, start, time, total) to how many points say so, of each metric in its turn."""
    found: dict[tuple[object, ...], list[int]] = defaultdict(list)
    names_of = StreamCache()
    for resource in parse_metrics(body).resource_metrics:
        for scope in resource.scope_metrics:
            if names_of.scope_name(scope.scope) != conventions.CONTROL_SCOPE:
                continue
            for metric in scope.metrics:
                if metric.name != conventions.CONTROL_TOTAL:
                    continue
                totals: dict[tuple[object, ...], list[tuple[int, Fraction]]] = defaultdict(list)
                for point in metric.sum.data_points:
                    try:
                        said = {item.key: item.value for item in map(KeyValue.FromString, point.attributes)}
                    except DecodeError:
                        continue
                    value = Fraction(point.as_int) if point.HasField("as_int") else _exact(point.as_double)
                    if value < 0 or (point.HasField("as_double") and not math.isfinite(point.as_double)):
                        continue
                    names = (conventions.CONTROL_METER, conventions.CONTROL_UNIT)
                    meter, unit = (said[name].string_value if name in said else "" for name in names)
                    part, parts = (_whole(said.get(name), default) for name, default in _PARTS)
                    if not 0 <= part < parts <= control.MAX_PARTS:
                        continue  # refused for itself
                    key = (meter, unit, point.start_time_unix_nano, point.time_unix_nano)
                    totals[key].append((part, value))
                for key, parts in totals.items():
                    found[(resource.resource, *key, sum(dict(parts).values()))].append(len(parts))
    return found


def _exact(value: float) -> Fraction:
    """The shortest decimal of a double, as a fraction."""
    return Fraction(repr(value)) if math.isfinite(value) else Fraction(0)
