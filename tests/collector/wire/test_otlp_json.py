"""OTLP's JSON against protobuf's own mapping, and what is refused, with where it was wrong."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tallymark_collector.errors import MalformedRequest, TooLarge
from tallymark_collector.processors.decoding import decode_metrics
from tallymark_collector.processors.spans import decode_spans
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits
from tallymark_collector.wire import otlp_json
from tests.support.messages import as_otlp_json, messages
from tests.support.messages import otlp_json as written
from tests.support.usage import BASE, HOUR, SECOND, key_values, number, request, sum_metric

REQUESTS: list[type[Message]] = [ExportMetricsServiceRequest, ExportTraceServiceRequest, ExportLogsServiceRequest]
NOW = BASE + HOUR


def read(text: bytes | dict[str, Any], kind: type[Message] = ExportMetricsServiceRequest) -> Any:
    data = text if isinstance(text, bytes) else json.dumps(text).encode()
    return kind.FromString(otlp_json.to_protobuf(data, kind, 1_000_000))


@pytest.mark.parametrize("kind", REQUESTS)
def test_any_message_is_the_same_in_both_encodings(kind: type[Message]) -> None:
    @settings(max_examples=150, deadline=None)
    @given(messages(kind))
    def check(message: Message) -> None:
        # Bytes: NaN is not equal to itself.
        again = otlp_json.to_protobuf(written(message), kind, 1_000_000)
        assert kind.FromString(again).SerializeToString(deterministic=True) == message.SerializeToString(
            deterministic=True
        )

    check()


VALUES = st.one_of(
    st.integers(-5, 2**63 - 1), st.floats(allow_nan=False), st.sampled_from([0, 1, 0.1, 1e300, math.nan])
)
ATTRIBUTES = st.dictionaries(
    st.sampled_from(["tallymark.account.id", "http.route", "n", "b"]),
    st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.integers(-9, 9), st.binary(max_size=3)),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), VALUES, ATTRIBUTES), max_size=6),
    st.integers(0, 3),
    st.booleans(),
)
def test_usage_is_the_same_in_both_encodings(
    rows: list[tuple[int, int, float, dict[str, object]]], temporality: int, monotonic: bool
) -> None:
    points = [number(BASE + a * SECOND, BASE + b * SECOND, value, attributes) for a, b, value, attributes in rows]
    message = request(sum_metric(points, temporality=temporality, monotonic=monotonic))
    converted = otlp_json.to_protobuf(written(message), ExportMetricsServiceRequest, 1_000_000)
    found, expected = (
        decode_metrics("t", body, StreamCache(), TimeLimits(), NOW) for body in (converted, message.SerializeToString())
    )
    assert repr(found) == repr(expected)  # of NaN, too


def test_spans_are_the_same_in_both_encodings() -> None:
    traces = ExportTraceServiceRequest()
    spans = traces.resource_spans.add().scope_spans.add().spans
    usage = {"tallymark.account.id": "acme", "tallymark.meter.api.requests": 2**53 + 1}
    span = spans.add(
        trace_id=bytes(range(16)), span_id=bytes(range(8)), start_time_unix_nano=BASE, end_time_unix_nano=NOW
    )
    span.attributes.extend(key_values(usage))
    text = written(traces)
    assert b'"000102030405060708090a0b0c0d0e0f"' in text
    converted = otlp_json.to_protobuf(text.replace(b"0a0b0c", b"0A0b0C"), ExportTraceServiceRequest, 1000)
    [found] = decode_spans("t", converted, TimeLimits(), NOW).evidence
    assert [found] == decode_spans("t", traces.SerializeToString(), TimeLimits(), NOW).evidence
    assert (found.trace_id, found.quantity) == (bytes(range(16)), 2**53 + 1)


def point(**fields: object) -> dict[str, Any]:
    return {"resourceMetrics": [{"scopeMetrics": [{"metrics": [{"sum": {"dataPoints": [fields]}}]}]}]}


def the_point(text: bytes | dict[str, Any]) -> Any:
    return read(text).resource_metrics[0].scope_metrics[0].metrics[0].sum.data_points[0]


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ({"asInt": "9223372036854775807"}, 2**63 - 1),
        ({"asInt": -(2**63)}, -(2**63)),
        ({"asInt": 9007199254740993}, 2**53 + 1),
        ({"asInt": 5.0}, 5),
        ({"asInt": "-5"}, -5),
        ({"as_int": 5}, 5),
        ({"asDouble": 5}, 5.0),
        ({"asDouble": "0.1"}, 0.1),
        ({"asDouble": "1e3"}, 1000.0),
        ({"asDouble": "-Infinity"}, -math.inf),
        ({"asDouble": math.inf}, math.inf),
        ({"asInt": 5, "asDouble": None, "exemplars": [], "unknown": [{"asInt": {}}]}, 5),
    ],
)
def test_numbers(given_: dict[str, object], expected: float) -> None:
    found = the_point(point(**given_))
    assert getattr(found, found.WhichOneof("value")) == expected


def test_nan() -> None:
    assert math.isnan(the_point(point(asDouble="NaN")).as_double)
    assert math.isnan(the_point(json.dumps(point(asDouble=math.nan)).encode()).as_double)


WHERE = "resourceMetrics[0].scopeMetrics[0].metrics[0].sum.dataPoints[0]"
INT64 = "an integer from -9223372036854775808 to 9223372036854775807, as a number or a string of digits"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"asInt": 2**63}, f"asInt is 9223372036854775808 and has to be {INT64}"),
        ({"asInt": "9223372036854775808"}, f'asInt is "9223372036854775808" and has to be {INT64}'),
        ({"asInt": 1e19}, f"asInt is 1e+19 and has to be {INT64}"),
        ({"asInt": 9007199254740994.0}, f"asInt is 9007199254740994.0 and has to be {INT64}"),
        ({"asInt": 0.5}, f"asInt is 0.5 and has to be {INT64}"),
        ({"asInt": True}, f"asInt is true and has to be {INT64}"),
        ({"asInt": "1_0"}, f'asInt is "1_0" and has to be {INT64}'),
        ({"asInt": " 1"}, f'asInt is " 1" and has to be {INT64}'),
        ({"asInt": "٣"}, f'asInt is "\\u0663" and has to be {INT64}'),
        ({"asInt": ""}, f'asInt is "" and has to be {INT64}'),
        ({"asInt": [1]}, f"asInt is an array and has to be {INT64}"),
        ({"asDouble": "much"}, 'asDouble is "much" and has to be a number, or "NaN", "Infinity" or "-Infinity"'),
        ({"asDouble": "1e999"}, 'asDouble is "1e999" and has to be a number, or "NaN", "Infinity" or "-Infinity"'),
        ({"asDouble": 10**400}, "asDouble is 1000000000000000000000000000000000000000 and has to be a number"),
        ({"asDouble": False}, "asDouble is false and has to be a number"),
        ({"timeUnixNano": -1}, "timeUnixNano is -1 and has to be an integer from 0 to 18446744073709551615"),
        ({"flags": 2**32}, "flags is 4294967296 and has to be an integer from 0 to 4294967295"),
        ({"attributes": {}}, "attributes is {} and has to be an array"),
        ({"attributes": {"cookie": "s3cr3t"}}, "attributes is an object and has to be an array"),
        ({"attributes": [{"key": "a", "value": "s3cr3t"}]}, "attributes[0].value is a string and has to be an object"),
        (
            {"attributes": [{"value": {"intValue": "x"}}]},
            f"attributes[0].value.intValue is a string and has to be {INT64}",
        ),
        ({"attributes": [5]}, "attributes[0] is 5 and has to be an object"),
        ({"attributes": [None]}, "attributes[0] is null and has to be an object"),
        ({"attributes": [{}, {"key": 5}]}, "attributes[1].key is 5 and has to be a string"),
        (
            {"attributes": [{"value": {"bytesValue": "%%%"}}]},
            "attributes[0].value.bytesValue is a string and has to be base64",
        ),
        (
            {"attributes": [{"value": {"boolValue": "true"}}]},
            "attributes[0].value.boolValue is a string and has to be true or false",
        ),
        (
            {"attributes": [{"value": {"intValue": 1, "stringValue": "x"}}]},
            "attributes[0].value.stringValue is a string and has to be left out where there is int_value already",
        ),
        ({"asInt": 1, "asDouble": 2}, "asDouble is 2 and has to be left out where there is as_int already"),
        ({"exemplars": [{"traceId": "AAECAw=="}]}, 'exemplars[0].traceId is "AAECAw==" and has to be a string of hexa'),
        ({"exemplars": [{"spanId": "abc"}]}, 'exemplars[0].spanId is "abc" and has to be a string of hexadecimal'),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(MalformedRequest) as caught:
        read(point(**fields))
    assert f"not an OTLP ExportMetricsServiceRequest in JSON: {WHERE}.{sentence}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b'{"resourceMetrics": [}', "not JSON: Expecting value: line 1 column 22 (char 21)"),
        (b'{"a": "\xff"}', "the JSON is not UTF-8: byte 7"),
        (b"[]", "the request is [] and has to be an object"),
        (b'"x"', "the request is a string and has to be an object"),
        (b"null", "the request is null and has to be an object"),
        (b'{"resourceMetrics": "x"}', "resourceMetrics is a string and has to be an array"),
        (b'{"a": 1, "b": 2, "a": 3}', 'not JSON: "a" is in one object twice'),
        (b'{"resourceMetrics": [], "resource_metrics": []}', "resourceMetrics, the same field"),
        (b"[" * 200_000, "the JSON is nested too deeply"),
        (b'{"x":' * 200_000, "the JSON is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    ],
)
def test_what_is_no_request(text: bytes, sentence: str) -> None:
    with pytest.raises(MalformedRequest) as caught:
        read(text)
    assert sentence in str(caught.value)


def test_more_values_than_the_limit_are_refused_unread() -> None:
    with pytest.raises(TooLarge, match="at most 1000 are taken"):
        otlp_json.to_protobuf(b"[" * 1001, ExportMetricsServiceRequest, 1000)


def test_json_that_can_just_be_read_is_refused_as_what_it_is() -> None:
    """What is shown of it is written by a recursion of its own, which may be at its end a level sooner."""
    most, too_many = 1, 1_000_000
    while most < too_many - 1:
        depth = (most + too_many) // 2
        try:
            json.loads(b"[" * depth + b"]" * depth)
        except RecursionError:
            too_many = depth
        else:
            most = depth
    for depth in range(most - 60, most + 5):
        for text in (b"[" * depth + b"]" * depth, b'{"resourceMetrics": {"a": %s}}' % (b"[" * depth + b"]" * depth)):
            with pytest.raises(MalformedRequest):
                read(text)


def test_deep_attributes_are_refused_with_a_sentence_and_unknown_ones_ignored() -> None:
    value: dict[str, Any] = {"intValue": 1}
    for _ in range(60):
        value = {"arrayValue": {"values": [value]}}
    with pytest.raises(MalformedRequest, match="nested less deeply, 90 levels at most"):
        read(point(attributes=[{"key": "k", "value": value}]))
    read({"resourceMetrics": [], "unknown": value})


def test_enums_by_number_and_by_name() -> None:
    for given_ in (1, "AGGREGATION_TEMPORALITY_DELTA", 1.0):
        tree = {"resourceMetrics": [{"scopeMetrics": [{"metrics": [{"sum": {"aggregationTemporality": given_}}]}]}]}
        assert read(tree).resource_metrics[0].scope_metrics[0].metrics[0].sum.aggregation_temporality == 1
    tree = {"resourceMetrics": [{"scopeMetrics": [{"metrics": [{"sum": {"aggregationTemporality": "DELTA"}}]}]}]}
    with pytest.raises(MalformedRequest, match="or one of AGGREGATION_TEMPORALITY_UNSPECIFIED, AGGREGATION_TEMPOR"):
        read(tree)


def test_halves_of_surrogate_pairs_become_the_replacement_character() -> None:
    text = json.dumps(point(attributes=[{"key": "k", "value": {"stringValue": "a"}}])).encode()
    found = the_point(text.replace(b'"a"', rb'"\ud83d\ude00 \ud83d"'))
    assert found.attributes[0].value.string_value == "😀 \ufffd"


def test_base64_of_both_alphabets_with_and_without_padding() -> None:
    for text in ("+/8=", "-_8=", "+/8", "-_8"):
        value = the_point(point(attributes=[{"key": "k", "value": {"bytesValue": text}}])).attributes[0].value
        assert value.bytes_value == b"\xfb\xff"


def test_a_byte_order_mark_is_nothing() -> None:
    assert read(b"\xef\xbb\xbf{}") == ExportMetricsServiceRequest()


def test_the_oracle_writes_what_the_specification_says() -> None:
    tree = as_otlp_json(request(sum_metric([number(BASE, NOW, 5, {"k": b"\xff"})])))
    metric = tree["resourceMetrics"][0]["scopeMetrics"][0]["metrics"][0]
    assert metric["sum"]["aggregationTemporality"] == 1
    assert metric["sum"]["dataPoints"][0]["asInt"] == "5"
    assert metric["sum"]["dataPoints"][0]["timeUnixNano"] == str(NOW)
