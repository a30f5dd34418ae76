"""A collector small enough to trust."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

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
                for metric in resource.scope_metrics[0].metrics:
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
                        kind = point.WhichOneof("value")
                        value = Decimal(point.as_int) if kind == "as_int" else Decimal(repr(point.as_double))
                        assert value > 0
                        assert point.start_time_unix_nano < point.time_unix_nano
                        assert points.setdefault(key, value) == value
        return points

    def totals(self) -> dict[str, Decimal]:
        totals: dict[str, Decimal] = {}
        for key, value in self.points().items():
            totals[key[1]] = EXACT.add(totals.get(key[1], Decimal(0)), value)
        return totals
