"""What was let through to the collector, added up from the requests' bytes by other means than the collector's.

An entry is (meter, account, route); a span's is ("span:" and the meter, account, ""). A point that comes again is the
same point: that is what a retry promises. Cumulative sums count by their last total in each epoch.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue

Entry = tuple[str, str, str]
Quantities = dict[Entry, Decimal]

PREFIX = "tallymark.meter."


class Ledger:
    """Safe to be used by several threads."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        """How values came: "integer" or "double"; and how often a point came again."""
        self._deltas: dict[tuple[Any, ...], tuple[Entry, Decimal]] = {}
        self._totals: dict[tuple[Any, ...], tuple[Entry, int, Decimal]] = {}
        self._spans: dict[tuple[bytes, bytes], list[tuple[Entry, Decimal]]] = {}
        self._lock = threading.Lock()

    def take(self, signal: str, body: bytes, as_json: bool = False) -> None:
        """A request that the collector has acknowledged: `signal` is "metrics", "traces" or something else."""
        with self._lock:
            if signal == "metrics":
                self._metrics(_parse(ExportMetricsServiceRequest(), body, as_json))
            elif signal == "traces":
                self._traces(_parse(ExportTraceServiceRequest(), body, as_json))

    def quantities(self) -> Quantities:
        """What the collector must have, no more and no less."""
        found: Quantities = defaultdict(Decimal)
        with self._lock:
            for entry, value in self._deltas.values():
                found[entry] += value
            for entry, _, value in self._totals.values():
                found[entry] += value
            for entries in self._spans.values():
                for entry, value in entries:
                    found[entry] += value
        return {entry: value for entry, value in found.items() if value}

    def intervals(self) -> dict[tuple[Any, ...], list[tuple[int, int]]]:
        """Of each delta stream (its producer, meter, account and route) what its points cover, in nanoseconds."""
        found: dict[tuple[Any, ...], list[tuple[int, int]]] = defaultdict(list)
        with self._lock:
            for producer, entry, start, time in self._deltas:
                found[producer, entry].append((start, time))
        return found

    def _metrics(self, request: ExportMetricsServiceRequest) -> None:
        for resource in request.resource_metrics:
            producer = tuple(sorted(_texts(resource.resource.attributes).items()))
            for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
                for point in metric.sum.data_points:
                    attributes = _texts(point.attributes)
                    entry = (metric.name, attributes["tallymark.account.id"], attributes["http.route"])
                    is_integer = point.WhichOneof("value") == "as_int"
                    self.seen["integer" if is_integer else "double"] += 1
                    value = Decimal(point.as_int) if is_integer else Decimal(repr(point.as_double))
                    start, time = point.start_time_unix_nano, point.time_unix_nano
                    if metric.sum.aggregation_temporality == 1:
                        key = (producer, entry, start, time)
                        self.seen["again"] += key in self._deltas
                        assert self._deltas.setdefault(key, (entry, value)) == (entry, value), f"two values of {key}"
                    else:
                        _, last, _ = self._totals.get((producer, entry, start), (entry, -1, value))
                        self.seen["again"] += time == last
                        if time > last:
                            self._totals[producer, entry, start] = (entry, time, value)

    def _traces(self, request: ExportTraceServiceRequest) -> None:
        for span in (s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans):
            account = _texts(span.attributes)["tallymark.account.id"]
            self.seen["again"] += (span.trace_id, span.span_id) in self._spans
            self._spans[span.trace_id, span.span_id] = [
                (("span:" + item.key.removeprefix(PREFIX), account, ""), _number(item))
                for item in span.attributes
                if item.key.startswith(PREFIX)
            ]


def _parse(message: Any, body: bytes, as_json: bool) -> Any:
    if as_json:
        parsed: Message = json_format.Parse(body, message, ignore_unknown_fields=True)
        return parsed
    return message.FromString(body)


def _texts(attributes: Iterable[KeyValue]) -> dict[str, str]:
    return {item.key: item.value.string_value for item in attributes}


def _number(item: KeyValue) -> Decimal:
    if item.value.WhichOneof("value") == "int_value":
        return Decimal(item.value.int_value)
    return Decimal(repr(item.value.double_value))
