"""A collector as a client sees it, over each of OTLP's protocols: an answer, or why there is none."""

from __future__ import annotations

import http.client
import json
from typing import Final, NamedTuple, Protocol

import grpc
from google.protobuf.json_format import MessageToJson
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

Request = ExportMetricsServiceRequest | ExportTraceServiceRequest
CALL_S: Final = 3.0
"""How long a client waits for an answer."""

_RETRYABLE: Final = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_RETRYABLE_HTTP: Final = {429, 502, 503, 504}
"""What a client sends again after (OTLP specification, "Failures"); any other status would lose the usage."""

_QUICK: Final = (
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 100),
    # Channels to one address share their connections otherwise, and with them each other's pauses.
    ("grpc.use_local_subchannel_pool", 1),
)


class Answer(NamedTuple):
    """How one attempt ended."""

    name: str
    acknowledged: bool = False
    problem: str = ""
    """What would make a client lose usage, or says that it has."""


class Target(Protocol):
    """Where one collector takes requests."""

    def send(self, request: Request, token: str) -> Answer:
        """One attempt, by whoever holds the token; without one where it is empty."""
        ...

    def close(self) -> None:
        """No more."""
        ...


class Grpc:
    """OTLP over gRPC."""

    def __init__(self, port: int) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=_QUICK)

    def send(self, request: Request, token: str) -> Answer:
        """One attempt."""
        metrics = isinstance(request, ExportMetricsServiceRequest)
        service = "metrics.v1.MetricsService" if metrics else "trace.v1.TraceService"
        call = self._channel.unary_unary(
            f"/opentelemetry.proto.collector.{service}/Export",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=_response(request).FromString,
        )
        try:
            return _read(call(request, timeout=CALL_S, metadata=list(_credential(token).items())))
        except grpc.RpcError as error:
            code = error.code()
            if code not in _RETRYABLE:
                return Answer(code.name, problem=f"{code.name}: {error.details()}")
            delays = [key for key, _ in error.trailing_metadata() or () if key == "google.rpc.retryinfo-bin"]
            if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not delays:
                return Answer(code.name, problem="RESOURCE_EXHAUSTED without RetryInfo")
            return Answer(code.name)

    def close(self) -> None:
        """No more."""
        self._channel.close()


class Http:
    """OTLP over HTTP, in protobuf or JSON; each request on a connection of its own."""

    def __init__(self, port: int, *, as_json: bool) -> None:
        self._port = port
        self._as_json = as_json

    def send(self, request: Request, token: str) -> Answer:
        """One attempt."""
        metrics = isinstance(request, ExportMetricsServiceRequest)
        # Protobuf's own JSON is OTLP's but for the ids of spans.
        as_json = self._as_json and metrics
        body = MessageToJson(request).encode() if as_json else request.SerializeToString()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=CALL_S)
        try:
            connection.request(
                "POST",
                "/v1/metrics" if metrics else "/v1/traces",
                body,
                {"Content-Type": "application/json" if as_json else "application/x-protobuf", **_credential(token)},
            )
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            return Answer(type(error).__name__)
        finally:
            connection.close()
        if answer.status != 200:
            retryable = answer.status in _RETRYABLE_HTTP
            return Answer(f"HTTP {answer.status}", problem="" if retryable else f"HTTP {answer.status}: {text[:300]!r}")
        if as_json:
            partial = json.loads(text).get("partialSuccess")
            return Answer("acknowledged", acknowledged=True, problem=f"refused: {partial}" if partial else "")
        return _read(_response(request).FromString(text))

    def close(self) -> None:
        """No more."""


def _credential(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"} if token else {}


def _response(request: Request) -> type[ExportMetricsServiceResponse] | type[ExportTraceServiceResponse]:
    if isinstance(request, ExportMetricsServiceRequest):
        return ExportMetricsServiceResponse
    return ExportTraceServiceResponse


def _read(response: ExportMetricsServiceResponse | ExportTraceServiceResponse) -> Answer:
    refused = response.HasField("partial_success")
    return Answer("acknowledged", acknowledged=True, problem=f"refused: {response.partial_success}" if refused else "")
