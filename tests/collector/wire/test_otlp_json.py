"""OTLP as JSON, against what protobuf's own JSON says of the same message."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from tallymark_collector.errors import MalformedRequest
from tallymark_collector.wire import otlp_json
from tests.support.telemetry import histogram, histogram_point, metrics_of, span, spans_of
from tests.support.usage import BASE, SECOND, number, sum_metric

NAMES = ("traceId", "spanId", "parentSpanId")


def as_otlp_json(message: Message) -> bytes:
    """The message as OTLP's JSON: protobuf's, with identifiers in hexadecimal."""

    def hexadecimal(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: base64.b64decode(item).hex() if key in NAMES else hexadecimal(item) for key, item in value.items()
            }
        return [hexadecimal(item) for item in value] if isinstance(value, list) else value

    plain = json_format.MessageToDict(message, use_integers_for_enums=True)
    return json.dumps(hexadecimal(plain)).encode()


def test_metrics_with_exemplars_and_attributes_of_every_kind() -> None:
    point = histogram_point(BASE, BASE + SECOND, 2**60, 0.1, {"a": 1, "b": "x", "c": 1.5, "d": True, "traceId": "no"})
    point.exemplars.add(trace_id=b"t" * 16, span_id=b"s" * 8, as_double=1.0)
    message = metrics_of({"r": b"\x00\xff"}, histogram([point]), sum_metric([number(BASE, BASE, 7, {})]))
    assert otlp_json.metrics(as_otlp_json(message)) == message


def test_traces_with_links_and_logs() -> None:
    one = span(3, {"a": 1}, parent_span_id=b"p" * 8, trace_state="ot=th:8", flags=0x101)
    one.links.add(trace_id=b"l" * 16, span_id=b"k" * 8)
    message = spans_of({"service.name": "x"}, [one])
    assert otlp_json.traces(as_otlp_json(message)) == message
    logs = ExportLogsServiceRequest()
    logs.resource_logs.add().scope_logs.add().log_records.add(trace_id=b"t" * 16, severity_number=9)  # type: ignore[arg-type]
    assert otlp_json.logs(as_otlp_json(logs)) == logs


def test_integers_as_text_or_number_and_unknown_fields() -> None:
    document = {
        "resourceMetrics": [{"scopeMetrics": [{"metrics": [{"name": "a", "sum": {"dataPoints": []}}]}]}],
        "x": 1,
    }
    points = document["resourceMetrics"][0]["scopeMetrics"][0]["metrics"][0]["sum"]["dataPoints"]  # type: ignore[index]
    points += [{"asInt": "7", "timeUnixNano": "5"}, {"asInt": 7, "timeUnixNano": 5, "later": []}, {"asDouble": 7}]
    metric = {"name": "a", "sum": {"dataPoints": points}}
    document = {"resourceMetrics": [{"scopeMetrics": [{"metrics": [metric]}]}], "x": 1}
    message = otlp_json.metrics(document)
    found = message.resource_metrics[0].scope_metrics[0].metrics[0].sum.data_points
    assert [(p.as_int, p.as_double, p.time_unix_nano) for p in found] == [(7, 0, 5), (7, 0, 5), (0, 7, 0)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "not JSON at line 1, column 2"),
        (b"[]", "expected a JSON object, got a list"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"resourceSpans": 7}', "resourceSpans"),
        (
            b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "xyz"}]}]}]}',
            "spans[0].traceId is not hex",
        ),
        (b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"startTimeUnixNano": "x"}]}]}]}', "startTimeUnixNano"),
    ],
)
def test_what_is_malformed_names_its_place(text: bytes, said: str) -> None:
    with pytest.raises(MalformedRequest) as raised:
        otlp_json.traces(text)
    assert said in str(raised.value)
