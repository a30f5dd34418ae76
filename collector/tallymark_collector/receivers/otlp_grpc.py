"""OTLP over gRPC: the metrics, traces and logs services, on bytes.

The services take and give bytes instead of messages, so that malformed requests are ours to refuse (gRPC's own
deserialisation would end the call as INTERNAL) and metrics can be read through the pipeline's own view.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsPartialSuccess, ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)

from tallymark_collector.access import certificates
from tallymark_collector.access.requests import TenantOf
from tallymark_collector.errors import Overloaded
from tallymark_collector.pipeline import Outcome, Pipeline
from tallymark_collector.receivers import status

Context = grpc.aio.ServicerContext[bytes, bytes]
Stage = Callable[[str, bytes], Awaitable[Outcome]]


class Service(NamedTuple):
    """One of OTLP's services: where its requests go and how its answer is written."""

    name: str
    stage: Stage
    respond: Callable[[Outcome], Message]


def services(pipeline: Pipeline) -> list[Service]:
    """OTLP's three services."""
    prefix = "opentelemetry.proto.collector"
    return [
        Service(f"{prefix}.metrics.v1.MetricsService", pipeline.metrics, _metrics_response),
        Service(f"{prefix}.trace.v1.TraceService", pipeline.traces, _traces_response),
        Service(f"{prefix}.logs.v1.LogsService", pipeline.logs, _logs_response),
    ]


class Admission:
    """Counts the bytes between arrival and answer; past the limit a request is refused, retryable."""

    def __init__(self, limit: int, retry_after: float) -> None:
        self._limit = limit
        self._retry_after = retry_after
        self._bytes = 0

    def enter(self, size: int) -> None:
        """Raises Overloaded. A request larger than the whole limit is let in alone."""
        if self._bytes and self._bytes + size > self._limit:
            error = Overloaded(f"{self._bytes} bytes of requests are under way, at most {self._limit} are taken")
            error.retry_after = self._retry_after
            raise error
        self._bytes += size

    def leave(self, size: int) -> None:
        """The request has been answered."""
        self._bytes -= size


def handler(service: Service, tenant_of: TenantOf, admission: Admission) -> grpc.GenericRpcHandler:
    """A gRPC handler for the service's Export method."""

    async def export(request: bytes, context: Context) -> bytes:
        try:
            admission.enter(len(request))
            try:
                shown = certificates.of_call(context.auth_context())
                tenant = await tenant_of(context.invocation_metadata() or (), shown)
                outcome = await service.stage(tenant, request)
            finally:
                admission.leave(len(request))
        except asyncio.CancelledError:
            # The client hung up, or the server stops. Whatever was committed, the retry will be a duplicate.
            raise
        except Exception as error:
            code, message, metadata = status.answer(error)
            await context.abort(code, message, metadata)
        return service.respond(outcome).SerializeToString()

    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {"Export": grpc.unary_unary_rpc_method_handler(export)}
    return grpc.method_handlers_generic_handler(service.name, methods)


# Success leaves partial_success unset (OTLP specification, "Full Success").
_MAX_MESSAGE: Final = 4096


def _metrics_response(outcome: Outcome) -> Message:
    if not outcome.rejected:
        return ExportMetricsServiceResponse()
    partial = ExportMetricsPartialSuccess(
        rejected_data_points=outcome.rejected, error_message=outcome.message[:_MAX_MESSAGE]
    )
    return ExportMetricsServiceResponse(partial_success=partial)


def _traces_response(outcome: Outcome) -> Message:
    if not outcome.rejected:
        return ExportTraceServiceResponse()
    partial = ExportTracePartialSuccess(rejected_spans=outcome.rejected, error_message=outcome.message[:_MAX_MESSAGE])
    return ExportTraceServiceResponse(partial_success=partial)


def _logs_response(outcome: Outcome) -> Message:
    if not outcome.rejected:
        return ExportLogsServiceResponse()
    partial = ExportLogsPartialSuccess(
        rejected_log_records=outcome.rejected, error_message=outcome.message[:_MAX_MESSAGE]
    )
    return ExportLogsServiceResponse(partial_success=partial)
