"""Telemetry that was written to a file: what the OpenTelemetry Collector's file exporter makes, and plain requests.

JSON: one OTLP request a line, or one document. Protobuf: requests behind their lengths (four bytes, big-endian, as the
exporter writes them, or a varint), or a single one. Which of these it is follows from the bytes; in protobuf, which
signal too, because spans have identifiers of 16 and 8 bytes where metrics have texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tallymark import conventions
from tallymark_collector.errors import MalformedRequest, UserError
from tallymark_collector.processors.meters import Meter
from tallymark_collector.wire import otlp_json

Request = ExportMetricsServiceRequest | ExportTraceServiceRequest | ExportLogsServiceRequest

_KINDS: Final[dict[str, tuple[str, type[Request]]]] = {
    "resourceMetrics": ("metrics", ExportMetricsServiceRequest),
    "resourceSpans": ("traces", ExportTraceServiceRequest),
    "resourceLogs": ("logs", ExportLogsServiceRequest),
}
_ZSTANDARD: Final = b"\x28\xb5\x2f\xfd"
_GZIP: Final = b"\x1f\x8b"
_BLANKS: Final = b" \t\r\n"
_BOM: Final = b"\xef\xbb\xbf"


class Captured(NamedTuple):
    """One request of a file."""

    place: str
    """`file:line` of JSON lines, `file#request` of protobuf."""
    signal: str
    """metrics, traces or logs."""
    request: Request


class Reading(NamedTuple):
    """What a file holds."""

    requests: list[Captured]
    torn: str | None = None
    """Where its last line is not whole and why, a sentence: somebody may still be writing it."""


def read_captured(data: bytes, name: str) -> Reading:
    """The requests in a file's bytes. Raises UserError, which says where it cannot be read."""
    if data.startswith(_ZSTANDARD) or data.startswith(_GZIP):
        raise UserError(f"{name} is compressed: decompress it first, e.g. zstd -d, gunzip")
    data = data.removeprefix(_BOM)
    if not data.strip(_BLANKS):
        return Reading([])
    if data.lstrip(_BLANKS)[:1] in (b"{", b"["):
        return _json(data, name)
    for framed in (_fixed, _varint):
        frames = framed(data)
        found = None if frames is None else [_protobuf(frame) for frame in frames]
        if found and all(one is not None for one in found):
            requests = [Captured(f"{name}#{n}", *one) for n, one in enumerate(found, 1) if one is not None]
            return Reading(requests)
    single = _protobuf(data)
    if single is None:
        raise UserError(
            f"{name} is neither OTLP as JSON (one request a line) nor OTLP as protobuf: capture it with the"
            " OpenTelemetry Collector's file exporter"
        )
    return Reading([Captured(f"{name}#1", *single)])


def _json(data: bytes, name: str) -> Reading:
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip(_BLANKS)]
    try:
        otlp_json.load(lines[0][1])
    except MalformedRequest:
        # Written over several lines: one document.
        lines = [(lines[0][0], data)] if len(lines) > 1 else lines
    torn = None
    if len(lines) > 1 and not data.endswith(b"\n"):
        try:
            otlp_json.load(lines[-1][1])
        except MalformedRequest as error:
            number, _ = lines.pop()
            torn = f"{name}:{number}: the last line is not whole and is left out, as if it were still written: {error}"
    return Reading([found for number, line in lines for found in _of_document(line, f"{name}:{number}")], torn)


def _of_document(line: bytes, place: str) -> Iterator[Captured]:
    try:
        document = otlp_json.load(line)
        present = [key for key in _KINDS if isinstance(document, dict) and key in document]
        if not present:
            raise UserError(f"{place} has none of {', '.join(_KINDS)}: it is no OTLP request")
        for key in present:
            signal, message = _KINDS[key]
            yield Captured(place, signal, otlp_json.read({key: document[key]}, message))
    except MalformedRequest as error:
        raise UserError(f"{place}: {error}") from None


def _fixed(data: bytes) -> list[bytes] | None:
    frames, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        at += 4
        if at + size > len(data) or not size:
            return None
        frames.append(data[at : at + size])
        at += size
    return frames


def _varint(data: bytes) -> list[bytes] | None:
    frames, at = [], 0
    while at < len(data):
        size, shift = 0, 0
        while True:
            if at >= len(data) or shift > 31:
                return None
            byte = data[at]
            at += 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        if at + size > len(data) or not size:
            return None
        frames.append(data[at : at + size])
        at += size
    return frames


def _protobuf(data: bytes) -> tuple[str, ExportMetricsServiceRequest | ExportTraceServiceRequest] | None:
    try:
        traces = ExportTraceServiceRequest.FromString(data)
        spans = [s for r in traces.resource_spans for scope in r.scope_spans for s in scope.spans]
        if spans and all(len(span.trace_id) == 16 and len(span.span_id) == 8 for span in spans):
            return "traces", traces
    except DecodeError:
        pass  # a metric's name need not be UTF-8 where a span has a text
    try:
        metrics = ExportMetricsServiceRequest.FromString(data)
    except DecodeError:
        return None
    named = [m for r in metrics.resource_metrics for scope in r.scope_metrics for m in scope.metrics]
    return ("metrics", metrics) if named and all(m.name and m.WhichOneof("data") for m in named) else None


def _metrics(request: ExportMetricsServiceRequest) -> Iterator[tuple[Any, Any, Any, Any]]:
    """(resource, scope, metric, its points) of each metric that has a type."""
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                if (kind := metric.WhichOneof("data")) is not None:
                    yield resource, scope, metric, getattr(metric, kind).data_points


def latest(captured: Captured) -> int:
    """The latest time of its points, spans and records."""
    request = captured.request
    if isinstance(request, ExportMetricsServiceRequest):
        times = (point.time_unix_nano for _, _, _, points in _metrics(request) for point in points)
    elif isinstance(request, ExportTraceServiceRequest):
        scopes = (scope for resource in request.resource_spans for scope in resource.scope_spans)
        times = (span.end_time_unix_nano for scope in scopes for span in scope.spans)
    else:
        logs = (scope for resource in request.resource_logs for scope in resource.scope_logs)
        times = (record.time_unix_nano for scope in logs for record in scope.log_records)
    return max(times, default=0)


def named(captured: Iterable[Captured]) -> set[Meter]:
    """The meters whose points name an account by themselves: those that a plan would charge for."""
    return {
        (metric.name, metric.unit)
        for one in captured
        if isinstance(one.request, ExportMetricsServiceRequest)
        for _, _, metric, points in _metrics(one.request)
        if any(item.key == conventions.ACCOUNT for point in points for item in point.attributes)
    }


def items(captured: Captured) -> Iterator[tuple[str, Any]]:
    """(name, request with this item alone) of each point and span, one after the other: each is a copy, with its
    resource and scope."""
    request = captured.request
    if isinstance(request, ExportMetricsServiceRequest):
        for resource, scope, metric, points in _metrics(request):
            bare = type(metric)()
            bare.CopyFrom(metric)
            kind = metric.WhichOneof("data")
            del getattr(bare, kind).data_points[:]  # once: a copy with all points for each of them is their square
            for point in points:
                alone = ExportMetricsServiceRequest()
                outer = alone.resource_metrics.add(resource=resource.resource)
                kept = outer.scope_metrics.add(scope=scope.scope).metrics.add()
                kept.CopyFrom(bare)
                getattr(kept, kind).data_points.append(point)
                yield metric.name, alone
    elif isinstance(request, ExportTraceServiceRequest):
        for spans in request.resource_spans:
            for within in spans.scope_spans:
                for span in within.spans:
                    one = ExportTraceServiceRequest()
                    one.resource_spans.add(resource=spans.resource).scope_spans.add(scope=within.scope, spans=[span])
                    yield span.name, one
    else:
        for logs in request.resource_logs:
            for records in logs.scope_logs:
                for record in records.log_records:
                    yield record.event_name or "log record", None
