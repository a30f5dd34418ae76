"""OTLP's three services, whatever carries them: where their requests go and how their answers are written."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsPartialSuccess,
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tallymark_collector.pipeline import Outcome, Pipeline
from tallymark_collector.telemetry import requests

Stage = Callable[[str, bytes], Awaitable[Outcome]]
Accepted = Callable[[str, str, bytes], None]
"""Is told tenant, signal and body of each request that has been committed, before it is answered; must neither block
nor raise."""


class Service(NamedTuple):
    """One of OTLP's services."""

    signal: str
    """"metrics", "traces" or "logs"; over HTTP its path is /v1/ and this."""
    name: str
    """Over gRPC."""
    message: type[Message]
    """A request; its Export method's argument."""
    stage: Stage
    respond: Callable[[Outcome], Message]


def nothing(_tenant: str, _signal: str, _body: bytes) -> None:
    """Nobody wants to know."""


def services(pipeline: Pipeline, accepted: Accepted = nothing) -> list[Service]:
    """OTLP's three services over a pipeline."""

    def told(signal: str, stage: Stage) -> Stage:
        async def take(tenant: str, body: bytes) -> Outcome:
            requests.arrived(len(body))
            outcome = await stage(tenant, body)
            accepted(tenant, signal, body)
            return outcome

        return take

    known: list[tuple[str, str, type[Message], Stage, Callable[[Outcome], Message]]] = [
        ("metrics", "metrics.v1.MetricsService", ExportMetricsServiceRequest, pipeline.metrics, _metrics_response),
        ("traces", "trace.v1.TraceService", ExportTraceServiceRequest, pipeline.traces, _traces_response),
        ("logs", "logs.v1.LogsService", ExportLogsServiceRequest, pipeline.logs, _logs_response),
    ]
    return [
        Service(signal, f"opentelemetry.proto.collector.{name}", message, told(signal, stage), respond)
        for signal, name, message, stage, respond in known
    ]


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
