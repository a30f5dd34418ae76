"""OTLP's JSON encoding, which is protobuf's own but for a few rules: trace and span identifiers are hexadecimal
instead of base64, enumerations are integers, unknown fields are ignored (OTLP specification, "JSON Protobuf Encoding").
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, Final, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tallymark_collector.errors import MalformedRequest

_IDENTIFIERS: Final = frozenset({"traceId", "spanId", "parentSpanId", "trace_id", "span_id", "parent_span_id"})
_MAX_SAID: Final = 300
"""Characters of what protobuf says about a wrong document."""

Request = TypeVar("Request", bound=Message)


def metrics(document: bytes | dict[str, Any]) -> ExportMetricsServiceRequest:
    """An ExportMetricsServiceRequest. Raises MalformedRequest, which names the place."""
    return _read(document, ExportMetricsServiceRequest())


def traces(document: bytes | dict[str, Any]) -> ExportTraceServiceRequest:
    """An ExportTraceServiceRequest. Raises MalformedRequest, which names the place."""
    return _read(document, ExportTraceServiceRequest())


def logs(document: bytes | dict[str, Any]) -> ExportLogsServiceRequest:
    """An ExportLogsServiceRequest. Raises MalformedRequest, which names the place."""
    return _read(document, ExportLogsServiceRequest())


def load(text: bytes) -> dict[str, Any]:
    """A JSON object. Raises MalformedRequest."""
    try:
        found = json.loads(text)
    except UnicodeDecodeError as error:
        raise MalformedRequest(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise MalformedRequest(f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise MalformedRequest("JSON that is nested too deeply") from None
    except ValueError as error:
        raise MalformedRequest(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise MalformedRequest(f"expected a JSON object, got a {type(found).__name__}")
    return found


def _read(document: bytes | dict[str, Any], request: Request) -> Request:
    try:
        data = _in_base64(load(document) if isinstance(document, bytes) else document, "")
        return json_format.ParseDict(data, request, ignore_unknown_fields=True)
    except json_format.ParseError as error:
        raise MalformedRequest(f"not an OTLP {type(request).__name__}: {str(error)[:_MAX_SAID]}") from None
    except RecursionError:
        raise MalformedRequest("JSON that is nested too deeply") from None


def _in_base64(value: Any, place: str) -> Any:
    """The document with identifiers as protobuf's JSON has bytes."""
    if isinstance(value, dict):
        return {
            key: _identifier(item, f"{place}.{key}") if key in _IDENTIFIERS else _in_base64(item, f"{place}.{key}")
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_in_base64(item, f"{place}[{number}]") for number, item in enumerate(value)]
    return value


def _identifier(value: Any, place: str) -> Any:
    if value is None:
        return None
    try:
        if not isinstance(value, str):
            raise binascii.Error  # noqa: TRY301 - one message for both
        return base64.b64encode(binascii.unhexlify(value)).decode()
    except (binascii.Error, ValueError):
        raise MalformedRequest(f"{place.removeprefix('.')} is not hexadecimal: {str(value)[:64]!r}") from None
