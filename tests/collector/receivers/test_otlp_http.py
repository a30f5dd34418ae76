"""OTLP over HTTP as a client sees it: real sockets, real database, and stores that fail on purpose."""

from __future__ import annotations

import asyncio
import gzip
import json
import ssl
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import grpc
import psycopg
import pytest
import trustme
from google.protobuf import json_format
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tallymark_collector.access.tls import ServerCertificate
from tallymark_collector.errors import Forbidden, StoreUnavailable, Unauthenticated
from tallymark_collector.pipeline import Writing
from tallymark_collector.receivers.admission import Share
from tallymark_collector.receivers.otlp_http import media_of
from tallymark_collector.settings import TlsFiles
from tallymark_collector.store import Store
from tests.support.messages import otlp_json
from tests.support.receiving import ACME, GOOD, NOW, Counting, Failing, Stuck, receiving
from tests.support.usage import BASE, key_values, number, request, sum_metric

PROTOBUF = "application/x-protobuf"
JSON = "application/json"
NOTHING = Failing(AssertionError("nothing to write"))


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def media(self) -> str:
        return self.headers["Content-Type"].split(";")[0]

    def refusal(self) -> Status:
        if self.media == PROTOBUF:
            return Status.FromString(self.body)
        return json_format.Parse(self.body, Status())


class Client:
    def __init__(self, session: aiohttp.ClientSession, port: int | None) -> None:
        self.session, self.base = session, f"http://127.0.0.1:{port}"

    async def send(self, method: str, path: str, data: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        async with self.session.request(method, self.base + path, data=data, headers=headers) as response:
            return Answer(response.status, response.headers.copy(), await response.read())

    async def post(self, body: Any, media: str = PROTOBUF, signal: str = "metrics", **headers: str) -> Answer:
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.send("POST", f"/v1/{signal}", body, {"Content-Type": media, **more})


@asynccontextmanager
async def connected(store: Writing, **more: Any) -> AsyncIterator[Client]:
    async with receiving(store, **more) as server, aiohttp.ClientSession() as session:
        yield Client(session, server.http_port)


@pytest.mark.parametrize("media", [PROTOBUF, JSON, "application/json; charset=UTF-8"])
@pytest.mark.parametrize("encoding", ["gzip", "identity", None])
async def test_success_leaves_partial_success_unset_and_is_committed(
    store: Store, dsn: str, media: str, encoding: str | None
) -> None:
    body = GOOD.SerializeToString() if media == PROTOBUF else otlp_json(GOOD)
    async with connected(store) as client:
        for _ in range(2):
            answer = await (
                client.post(gzip.compress(body), media, Content_Encoding="gzip")
                if encoding == "gzip"
                else client.post(body, media, **({"Content_Encoding": encoding} if encoding else {}))
            )
            assert answer.status == 200
            assert answer.headers["Content-Type"] == media.lower()
            assert answer.body == (b"" if media == PROTOBUF else b"{}")
            assert answer.headers["Server"] == "tallymark"
            with psycopg.connect(dsn) as another:
                assert another.execute("SELECT sum(quantity) FROM tallymark.usage_point").fetchone() == (5,)


async def test_the_three_signals_answer_in_their_own_messages() -> None:
    requests = {
        "metrics": (ExportMetricsServiceRequest(), ExportMetricsServiceResponse()),
        "traces": (ExportTraceServiceRequest(), ExportTraceServiceResponse()),
        "logs": (ExportLogsServiceRequest(), ExportLogsServiceResponse()),
    }
    async with connected(NOTHING) as client:
        for signal, (message, expected) in requests.items():
            plain = await client.post(message.SerializeToString(), signal=signal)
            assert (plain.status, type(expected).FromString(plain.body)) == (200, expected)
            text = await client.post(b"{}", JSON, signal=signal)
            assert (text.status, json_format.Parse(text.body, type(expected)())) == (200, expected)


async def test_bad_points_are_refused_by_partial_success_and_the_rest_is_kept(store: Store, dsn: str) -> None:
    points = [number(BASE + i, NOW, value, ACME) for i, value in enumerate((1, -1, 2))] + [number(BASE, NOW, 9, {})]
    message = request(sum_metric(points))
    async with connected(store) as client:
        text = json.loads((await client.post(otlp_json(message), JSON)).body)
        assert text["partialSuccess"]["rejectedDataPoints"] == "2"
        assert "value_negative" in text["partialSuccess"]["errorMessage"]
        plain = ExportMetricsServiceResponse.FromString((await client.post(message.SerializeToString())).body)
        assert plain.partial_success.rejected_data_points == 2
        assert "account_missing" in plain.partial_success.error_message
    with psycopg.connect(dsn) as another:
        assert another.execute("SELECT sum(quantity) FROM tallymark.usage_point").fetchone() == (3,)
        assert another.execute("SELECT count(*) FROM tallymark.usage_quarantine").fetchone() == (2,)


async def test_spans_in_json_are_evidence_under_their_hexadecimal_ids(store: Store, dsn: str) -> None:
    traces = ExportTraceServiceRequest()
    span = (
        traces.resource_spans.add()
        .scope_spans.add()
        .spans.add(
            trace_id=bytes.fromhex("5b8efff798038103d269b633813fc60c"),
            span_id=bytes.fromhex("eee19b7ec3c1b174"),
            start_time_unix_nano=BASE,
            end_time_unix_nano=NOW,
        )
    )
    span.attributes.extend(key_values({**ACME, "tallymark.meter.api.requests": 1}))
    text = otlp_json(traces)
    assert b'"5b8efff798038103d269b633813fc60c"' in text
    async with connected(store) as client:
        for body, media in ((text, JSON), (traces.SerializeToString(), PROTOBUF)):
            assert (await client.post(body, media, "traces")).status == 200
    with psycopg.connect(dsn) as another:
        rows = another.execute("SELECT trace_id, span_id FROM tallymark.usage_evidence").fetchall()
    assert rows == [(bytes.fromhex("5b8efff798038103d269b633813fc60c"), bytes.fromhex("eee19b7ec3c1b174"))]


@pytest.mark.parametrize("media", [PROTOBUF, JSON])
@pytest.mark.parametrize(
    "error", [StoreUnavailable("host=secret"), ZeroDivisionError("a bug of ours"), RecursionError()]
)
async def test_a_failing_store_is_503_with_a_delay_and_then_it_works(
    error: Exception, media: str, store: Store
) -> None:
    body = GOOD.SerializeToString() if media == PROTOBUF else otlp_json(GOOD)
    async with connected(Failing(error, behind=store, times=1)) as client:
        answer = await client.post(body, media)
        assert (answer.status, answer.media, answer.headers["Retry-After"]) == (503, media, "1")
        info = RetryInfo()
        assert answer.refusal().code == grpc.StatusCode.UNAVAILABLE.value[0]
        assert answer.refusal().details[0].Unpack(info)
        assert info.retry_delay.seconds == 1
        assert "secret" not in answer.refusal().message
        assert (await client.post(body, media)).status == 200


@pytest.mark.parametrize("signal", ["metrics", "traces", "logs"])
async def test_malformed_bodies_are_400_in_their_content_type(signal: str) -> None:
    async with connected(NOTHING) as client:
        plain = await client.post(b"\x0a\xff\xff\xff\xff\x0f", signal=signal)
        assert (plain.status, plain.media, "Retry-After" in plain.headers) == (400, PROTOBUF, False)
        assert "not an OTLP Export" in plain.refusal().message
        text = await client.post(b'{"resourceMetrics": 1, "resourceSpans": 1, "resourceLogs": 1}', JSON, signal)
        assert (text.status, text.media) == (400, JSON)
        assert "is 1 and has to be an array" in text.refusal().message


@pytest.mark.parametrize(
    "media", ["text/plain", "application/grpc", "", "application/json; charset=utf-16", "application/x-protobuf2"]
)
async def test_other_content_types_are_415(media: str) -> None:
    async with connected(NOTHING) as client:
        answer = await client.post(b"{}", media)
        assert (answer.status, answer.media) == (415, JSON)
        assert "is not read here: send" in answer.refusal().message


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip"])
async def test_other_encodings_are_415_and_told_which_are_read(encoding: str) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"whatever"  # of a generator aiohttp's client encodes nothing itself

    async with connected(NOTHING) as client:
        answer = await client.post(body(), Content_Encoding=encoding)
        assert (answer.status, answer.headers["Accept-Encoding"]) == (415, "gzip, identity")
        assert repr(encoding) in answer.refusal().message


async def test_other_paths_and_methods() -> None:
    async with connected(NOTHING) as client:
        for path in ("/", "/v1/metric", "/v1/metrics/", "/v1development/profiles"):
            answer = await client.send("POST", path, b"{}", {"Content-Type": JSON})
            assert answer.status == 404
            assert answer.refusal().message == "nothing is here: post to /v1/metrics, /v1/traces, /v1/logs"
        for method in ("GET", "PUT", "DELETE", "OPTIONS"):
            answer = await client.send(method, "/v1/metrics")
            assert (answer.status, answer.headers["Allow"]) == (405, "POST")
            assert answer.refusal().message == "/v1/metrics takes POST alone"
        assert (await client.send("HEAD", "/v1/metrics")).status == 405


def described(text: str) -> bytes:
    """A good request with so much beside the usage."""
    metric = sum_metric([number(BASE, NOW, 5, ACME)])
    metric.description = text
    return request(metric).SerializeToString()


BROKEN_GZIP = {
    "no gzip": b"hello",
    "cut off": gzip.compress(GOOD.SerializeToString())[:-5],
    "damaged": gzip.compress(GOOD.SerializeToString())[:-8] + b"\0" * 8,
    "zlib": zlib.compress(GOOD.SerializeToString()),
    "and something": gzip.compress(GOOD.SerializeToString()) + b"hello",
}


@pytest.mark.parametrize("body", BROKEN_GZIP.values(), ids=BROKEN_GZIP)
async def test_broken_gzip_is_400(body: bytes) -> None:
    async with connected(NOTHING) as client:
        answer = await client.post(body, Content_Encoding="gzip")
        assert answer.status == 400
        assert "gzip" in answer.refusal().message


async def test_members_of_gzip_after_each_other_are_one_body() -> None:
    counting, body = Counting(), GOOD.SerializeToString()
    async with connected(counting) as client:
        parts = b"".join(gzip.compress(part) for part in (body[:7], b"", body[7:]))
        assert (await client.post(parts, Content_Encoding="gzip")).status == 200
    assert counting.points == 1


async def test_the_limit_on_a_request_is_413_and_applies_after_decompression() -> None:
    limit, counting = 100_000, Counting()
    big, fits = (described("x" * length) for length in (limit, limit - 300))

    async def chunks(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    async with connected(counting, request_bytes=limit) as client:
        for body, headers in ((big, {}), (gzip.compress(big), {"Content_Encoding": "gzip"}), (chunks(big), {})):
            answer = await client.post(body, **headers)
            assert (answer.status, "Retry-After" in answer.headers) == (413, False)
            assert answer.refusal().code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert not answer.refusal().details
        assert (await client.post(gzip.compress(fits), Content_Encoding="gzip")).status == 200
        endless = gzip.compress(b"") * (limit // 10)
        chunked = await client.post(chunks(endless), Content_Encoding="gzip")
        assert chunked.status == 413, "nothing, for ever, is too much too"
    assert counting.points == 1


async def test_a_bomb_takes_no_more_memory_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    take = Share.take

    def noted(self: Share, size: int) -> None:
        nonlocal most
        take(self, size)
        most = max(most, self._admission.under_way)

    monkeypatch.setattr(Share, "take", noted)
    bomb = gzip.compress(bytes(200 << 20), 6)
    async with connected(NOTHING, request_bytes=4 << 20) as client:
        answer = await client.post(bomb, JSON, Content_Encoding="gzip")
        assert (answer.status, answer.media) == (413, JSON)
        assert "after decompression" in answer.refusal().message
    assert 0 < most <= 4 << 20


async def test_json_with_more_values_than_memory_should_take_is_413() -> None:
    async with connected(NOTHING, json_values=1000) as client:
        answer = await client.post(b'{"x": [' + b"0," * 1000 + b"0]}", JSON)
        assert answer.status == 413
        assert "JSON values in one request, at most 1000 are taken" in answer.refusal().message


async def test_chunked_bodies_and_expect_100() -> None:
    counting = Counting()

    async def one_by_one() -> AsyncIterator[bytes]:
        for byte in GOOD.SerializeToString():
            yield bytes([byte])

    async with connected(counting) as client:
        assert (await client.post(one_by_one())).status == 200
        async with client.session.post(
            f"{client.base}/v1/metrics",
            data=GOOD.SerializeToString(),
            headers={"Content-Type": PROTOBUF},
            expect100=True,
        ) as response:
            assert response.status == 200
    assert counting.points == 2


async def test_a_flood_is_429_with_a_delay_over_both_protocols_together() -> None:
    stuck, body = Stuck(), GOOD.SerializeToString()
    async with (
        receiving(stuck, in_flight_bytes=2 * len(body)) as server,
        aiohttp.ClientSession() as session,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        client = Client(session, server.http_port)
        waiting = [
            asyncio.ensure_future(client.post(body)),
            asyncio.ensure_future(MetricsServiceStub(channel).Export(GOOD)),
        ]
        await stuck.reached(2)
        refused = await client.post(body)
        assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
        assert refused.refusal().code == grpc.StatusCode.UNAVAILABLE.value[0]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await MetricsServiceStub(channel).Export(GOOD)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        stuck.go.set()
        await asyncio.gather(*waiting)
        assert (await client.post(body)).status == 200, "what was answered is no longer counted"


async def test_the_tenant_comes_from_the_headers(store: Store, dsn: str) -> None:
    async def tenant_of(headers: Mapping[str, str], certificate: Sequence[str] = ()) -> str:
        assert certificate == ()
        match headers.get("authorization"):  # in any case of letters
            case None:
                raise Unauthenticated("send a token")
            case "Bearer globex":
                return "globex"
            case _:
                raise Forbidden("this token may only read")

    async with connected(store, serve={"tenant_of": tenant_of}) as client:
        none = await client.post(GOOD.SerializeToString())
        assert (none.status, none.refusal().code, none.refusal().message) == (401, 16, "send a token")
        other = await client.post(otlp_json(GOOD), JSON, Authorization="Bearer reader")
        assert (other.status, other.refusal().code, other.media) == (403, 7, JSON)
        assert (await client.post(GOOD.SerializeToString(), AUTHORIZATION="Bearer globex")).status == 200
    with psycopg.connect(dsn) as another:
        assert another.execute("SELECT tenant, quantity FROM tallymark.usage_point").fetchall() == [("globex", 5)]


def test_content_types() -> None:
    assert media_of("Application/JSON").type == JSON
    assert media_of('application/json;charset="utf-8"; x=y') == (JSON, "utf-8")
    assert media_of("application/x-protobuf; messageType=x") == (PROTOBUF, None)


async def test_over_tls_with_a_client_certificate(tmp_path: Path) -> None:
    authority, clients = trustme.CA(), trustme.CA()
    files = TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "clients.pem")
    pair = authority.issue_cert("localhost")
    files.certificate.write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
    files.key.write_bytes(pair.private_key_pem.bytes())
    clients.cert_pem.write_to_path(str(tmp_path / "clients.pem"))
    counting = Counting()
    shown: list[Sequence[str]] = []

    async def tenant_of(_headers: Mapping[str, str], certificate: Sequence[str] = ()) -> str:
        shown.append(certificate)
        return "default"

    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with (
        receiving(counting, serve={"certificate": ServerCertificate(files), "tenant_of": tenant_of}) as server,
        aiohttp.ClientSession() as session,
    ):

        async def posted() -> int:
            async with session.post(
                f"https://localhost:{server.http_port}/v1/metrics",
                data=GOOD.SerializeToString(),
                headers={"Content-Type": PROTOBUF},
                ssl=trusting,
            ) as response:
                return response.status

        with pytest.raises(aiohttp.ClientError):
            await posted()
        clients.issue_cert("gateway.example").configure_cert(trusting)
        assert await posted() == 200
    assert counting.points == 1
    [identities] = shown
    assert identities[1:] == ("dns:gateway.example",)
