"""A collector small enough to trust."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint

from tallymark.quantities import EXACT

SERVICE = "opentelemetry.proto.collector.metrics.v1.MetricsService"


class FakeCollector:
    """Takes metrics as bytes. `answer(n)` says for the n-th request, from 0: None to store and acknowledge, a status
    to refuse, or (status, "stored") to store it and lose the acknowledgement."""

    def __init__(self, answer: Callable[[int], Any] = lambda n: None, port: int = 0) -> None:
        self.answer = answer
        self.requests: list[bytes] = []
        self.stored: list[bytes] = []
        self.metadata: list[dict[str, Any]] = []
        self._server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        handler = grpc.unary_unary_rpc_method_handler(self._export)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": handler}),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._server.start()

    def _export(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        number = len(self.requests)
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        answer = self.answer(number)
        if answer is None or isinstance(answer, tuple):
            self.stored.append(request)
        if answer is not None:
            context.abort(answer[0] if isinstance(answer, tuple) else answer, "as the test wants it")
        return ExportMetricsServiceResponse().SerializeToString()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def points(self) -> dict[tuple[Any, ...], Decimal]:
        """Each stored point once: (producer, meter, unit, attributes, start, time) -> value. A point stored again
        must have the same value."""
        points: dict[tuple[Any, ...], Decimal] = {}
        for raw in self.stored:
            for resource in ExportMetricsServiceRequest.FromString(raw).resource_metrics:
                producer = {a.key: a.value.string_value for a in resource.resource.attributes}["service.instance.id"]
                for metric in (m for s in resource.scope_metrics if s.scope.name == "tallymark" for m in s.metrics):
                    assert metric.sum.is_monotonic
                    assert metric.sum.aggregation_temporality == 1
                    for point in metric.sum.data_points:
                        attributes = tuple(sorted((a.key, a.value.SerializeToString()) for a in point.attributes))
                        key = (
                            producer,
                            metric.name,
                            metric.unit,
                            attributes,
                            point.start_time_unix_nano,
                            point.time_unix_nano,
                        )
                        value = _value(point)
                        assert value > 0
                        assert point.start_time_unix_nano < point.time_unix_nano
                        assert points.setdefault(key, value) == value
        return points

    def totals(self) -> dict[str, Decimal]:
        totals: dict[str, Decimal] = {}
        for key, value in self.points().items():
            totals[key[1]] = EXACT.add(totals.get(key[1], Decimal(0)), value)
        return totals

    def control(self) -> dict[tuple[str, str, str, int, int], Decimal]:
        """Control totals: (producer, meter, unit, since, time) -> total. One stored again must have the same value."""
        parts: dict[tuple[Any, ...], Decimal] = {}
        for producer, metric, names, point in self._beside():
            if metric.name == "tallymark.control.total":
                assert metric.sum.aggregation_temporality == 2
                meter, unit = names["tallymark.control.meter"], names["tallymark.control.unit"]
                times = (point.start_time_unix_nano, point.time_unix_nano)
                key = (producer, meter, unit, *times, names.get("tallymark.control.part", 0))
                assert parts.setdefault(key, _value(point)) == _value(point)
        totals: dict[tuple[str, str, str, int, int], Decimal] = {}
        for (*key, _), value in parts.items():
            totals[tuple(key)] = EXACT.add(totals.get(tuple(key), Decimal(0)), value)  # type: ignore[index,arg-type]
        return totals

    def closed(self) -> dict[tuple[str, int], int]:
        """Runs that have ended: (producer, since) -> when."""
        found: dict[tuple[str, int], int] = {}
        for producer, metric, _, point in self._beside():
            if metric.name == "tallymark.control.closed":
                key = (producer, point.start_time_unix_nano)
                found[key] = max(found.get(key, 0), point.time_unix_nano)
        return found

    def evidence(self) -> dict[tuple[str, str], Decimal]:
        """What is on spans by (account, meter)."""
        points: dict[tuple[Any, ...], Decimal] = {}
        for producer, metric, names, point in self._beside():
            if metric.name == "tallymark.control.evidence":
                assert metric.sum.aggregation_temporality == 1
                key = (producer, *sorted(names.items()), point.start_time_unix_nano, point.time_unix_nano)
                assert points.setdefault(key, _value(point)) == _value(point)
        totals: dict[tuple[str, str], Decimal] = {}
        for (_, account, meter, _, _, _), value in points.items():
            totals[account[1], meter[1]] = EXACT.add(totals.get((account[1], meter[1]), Decimal(0)), value)
        return totals

    def _beside(self) -> Iterator[tuple[str, Metric, dict[str, Any], NumberDataPoint]]:
        for raw in self.stored:
            for resource in ExportMetricsServiceRequest.FromString(raw).resource_metrics:
                producer = {a.key: a.value.string_value for a in resource.resource.attributes}["service.instance.id"]
                for scope in resource.scope_metrics:
                    assert scope.scope.name in ("tallymark", "tallymark.control")
                    for metric in scope.metrics if scope.scope.name == "tallymark.control" else ():
                        for point in metric.sum.data_points:
                            names = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in point.attributes}
                            assert "tallymark.account.id" not in names, "any collector would take it for usage"
                            yield producer, metric, names, point


def _value(point: NumberDataPoint) -> Decimal:
    return Decimal(point.as_int) if point.WhichOneof("value") == "as_int" else Decimal(repr(point.as_double))
