"""What each answer of a collector leads to, over real gRPC."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.json_format import ParseDict
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

from tallymark import flush, identify, record
from tallymark.assembly import Runtime
from tallymark.endpoint import endpoint_of
from tallymark.sending import RETRY_INFO, STATUS_DETAILS, retry_delay
from tallymark.settings import Settings
from tallymark.testing import delivery_stats
from tests.sdk.fake_collector import SERVICE

Answering = Callable[[bytes, grpc.ServicerContext], ExportMetricsServiceResponse]


class Server:
    """Calls `answer` with the request and the call's context."""

    def __init__(self, answer: Answering, **options: int) -> None:
        self.requests: list[bytes] = []
        self.times: list[float] = []

        def export(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.requests.append(request)
            self.times.append(time.monotonic())
            return answer(request, context).SerializeToString()

        self._server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0), *options.items()])
        handler = grpc.unary_unary_rpc_method_handler(export)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": handler}),))
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def serve_otlp() -> Any:
    started: list[Server] = []

    def start(answer: Answering, **options: int) -> Server:
        started.append(Server(answer, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def retry_info(seconds: float) -> RetryInfo:
    info = RetryInfo()
    info.retry_delay.FromNanoseconds(int(seconds * 1e9))
    return info


def details(info: RetryInfo) -> bytes:
    wrapped = AnyMessage()
    wrapped.Pack(info)
    return Status(code=14, details=[wrapped]).SerializeToString()


@pytest.mark.parametrize("form", [RETRY_INFO, STATUS_DETAILS])
def test_the_server_is_left_in_peace_as_long_as_it_asks(
    fresh: Runtime, serve_otlp: Any, settings: Any, form: str
) -> None:
    def answer(request: bytes, context: grpc.ServicerContext) -> ExportMetricsServiceResponse:
        if len(server.requests) == 1:
            info = retry_info(1.2)
            context.set_trailing_metadata(((form, info.SerializeToString() if form == RETRY_INFO else details(info)),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")
        return ExportMetricsServiceResponse()

    server = serve_otlp(answer)
    fresh.configure(settings(server.endpoint))
    record("calls")
    for _ in range(2):
        assert flush(0.3) is False or time.monotonic() >= server.times[0] + 1.2
    assert flush(60) is True
    assert len(server.requests) == 2
    assert server.times[1] - server.times[0] >= 1.2


def test_what_no_server_wrote_asks_for_nothing() -> None:
    assert retry_delay(None) is None
    assert retry_delay((("x", "y"), (RETRY_INFO, b"\xff\xff\xff"))) is None
    assert retry_delay(((STATUS_DETAILS, details(retry_info(2.5))),)) == 2.5
    assert retry_delay(((RETRY_INFO, retry_info(10**6).SerializeToString()),)) == 300


def test_partial_success_goes_to_a_dead_letter_and_blocks_nobody(
    fresh: Runtime, serve_otlp: Any, settings: Any, state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(request: bytes, context: grpc.ServicerContext) -> ExportMetricsServiceResponse:
        response = ExportMetricsServiceResponse()
        if b"bad" in request:
            response.partial_success.rejected_data_points = 1
            response.partial_success.error_message = "no such account: bad"
        return response

    server = serve_otlp(answer)
    fresh.configure(settings(server.endpoint, interval_s=30))
    with identify(account="bad"):
        record("calls", 3)
    with identify(account="good"):
        record("calls", 4)
    assert flush(60) is False, "what was refused is not acknowledged"
    assert flush(60) is True, "and has been told"
    record("calls")
    assert flush(60) is True
    assert len(server.requests) == 2
    (path,) = state_dir.rglob("dead-letter/*.json")
    letter = json.loads(path.read_text())
    assert (letter["reason"], letter["rejected_points"]) == ("no such account: bad", 1)
    assert ParseDict(letter["request"], ExportMetricsServiceRequest()).SerializeToString() == server.requests[0]
    assert delivery_stats()["rejected_points"] == 1
    assert "no such account: bad" in caplog.text


def test_an_invalid_point_is_searched_for_and_the_others_are_delivered(
    fresh: Runtime, serve_otlp: Any, settings: Any, state_dir: Path
) -> None:
    taken: list[bytes] = []

    def answer(request: bytes, context: grpc.ServicerContext) -> ExportMetricsServiceResponse:
        if b"poison" in request:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "poison")
        taken.append(request)
        return ExportMetricsServiceResponse()

    fresh.configure(settings(serve_otlp(answer).endpoint, interval_s=30))
    for n in range(50):
        with identify(account="poison" if n == 33 else f"account-{n}."):
            record("calls")
    assert flush(60) is False
    assert sum(raw.count(b"account-") for raw in taken) == 49
    (path,) = state_dir.rglob("dead-letter/*.json")
    assert json.loads(path.read_text())["rejected_points"] == 1
    assert "INVALID_ARGUMENT: poison" in path.read_text()


def test_a_request_over_the_servers_limit_is_split(
    fresh: Runtime, serve_otlp: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    points: set[tuple[str, int, int, int]] = set()  # a half whose answer came late is sent again, the same

    def answer(request: bytes, context: grpc.ServicerContext) -> ExportMetricsServiceResponse:
        message = ExportMetricsServiceRequest.FromString(request)
        for metric in message.resource_metrics[0].scope_metrics[0].metrics:
            for point in metric.sum.data_points:
                name = point.attributes[0].value.string_value
                points.add((name, point.start_time_unix_nano, point.time_unix_nano, point.as_int))
        return ExportMetricsServiceResponse()

    server = serve_otlp(answer, **{"grpc.max_receive_message_length": 20_000})
    fresh.configure(settings(server.endpoint, interval_s=30))
    for n in range(1000):
        with identify(account=f"account-{n}"):
            record("calls")
    assert flush(60)
    assert sorted((name, value) for name, _, _, value in points) == sorted((f"account-{n}", 1) for n in range(1000))


def test_an_answer_that_is_not_otlp_acknowledges_nothing(fresh: Runtime, serve_otlp: Any, settings: Any) -> None:
    class Garbage:
        def SerializeToString(self) -> bytes:  # noqa: N802
            return b"\xff\xff" if len(server.requests) == 1 else b""

    server = serve_otlp(lambda request, context: Garbage())
    fresh.configure(settings(server.endpoint, interval_s=30))
    record("calls")
    assert flush(60)
    assert len(server.requests) == 2


def test_opentelemetrys_variables_have_their_meaning() -> None:
    nothing = endpoint_of(Settings(), {})
    assert (nothing.target, nothing.insecure, nothing.timeout_s, nothing.headers) == ("localhost:4317", True, 10.0, ())
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "https://all:4317",
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "collector:4317",
        "OTEL_EXPORTER_OTLP_HEADERS": "Authorization=Bearer%20x",
        "OTEL_EXPORTER_OTLP_METRICS_COMPRESSION": "GZIP",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "3",
        "OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE": "/ca.pem",
        "OTEL_EXPORTER_OTLP_CLIENT_KEY": "/key.pem",
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": "/cert.pem",
    }
    found = endpoint_of(Settings(), environ)
    assert (found.target, found.insecure, found.timeout_s) == ("collector:4317", False, 3.0)
    assert found.headers == (("authorization", "Bearer x"),)
    assert (found.compression, found.certificate) == ("gzip", "/ca.pem")
    assert (found.client_key, found.client_certificate) == ("/key.pem", "/cert.pem")
    assert endpoint_of(Settings(), {**environ, "OTEL_EXPORTER_OTLP_METRICS_INSECURE": "true"}).insecure is True
    given = Settings(endpoint="https://own:1", headers=(("a", "b"),), insecure=True, timeout_s=1.0)
    assert endpoint_of(given, environ).insecure is False
    assert endpoint_of(given, environ).headers == (("a", "b"),)
    assert "Bearer" not in repr(found)
