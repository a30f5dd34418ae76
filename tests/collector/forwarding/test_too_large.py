"""A next hop that takes smaller requests than we do: all that fits arrives, once and in order."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from aiohttp import web
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tallymark_collector.forwarding import forwarding
from tallymark_collector.forwarding.hops import SURELY_TAKEN, Fate, Verdict, hop
from tallymark_collector.settings import Compression, Forwarding
from tests.collector.forwarding.test_forwarder import LATER, Scripted, running, until
from tests.support.receiving import ACME, NOW
from tests.support.usage import BASE, number, request, sum_metric

LIMIT = 3000
Taken = list[tuple[str, int]]
"""Name of the metric and value of each point, in the order in which they came."""


def numbered(counts: list[int]) -> bytes:
    """A request of metrics with so many points each, all of them with different values."""
    values = itertools.count()
    whole = request(sum_metric([], name="empty"))
    for index, count in enumerate(counts):
        points = [number(BASE, NOW, next(values), ACME) for _ in range(count)]
        whole.MergeFrom(request(sum_metric(points, name=f"m{index}"), producer=f"p{index % 2}"))
    return whole.SerializeToString()


def points_of(body: bytes) -> Taken:
    return [
        (metric.name, point.as_int)
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.sum.data_points
    ]


Export = Callable[[bytes, grpc.aio.ServicerContext[bytes, bytes]], Awaitable[bytes]]


class Services(grpc.GenericRpcHandler):
    """OTLP's services over gRPC, all of them one function."""

    def __init__(self, export: Export) -> None:
        self.handler = grpc.unary_unary_rpc_method_handler(export)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        return self.handler


@asynccontextmanager
async def over_grpc(export: Export, limit: int = -1) -> AsyncIterator[int]:
    """A server with these services; its port."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", limit)])
    server.add_generic_rpc_handlers((Services(export),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield port
    await server.stop(None)


class Narrow:
    """A next hop that takes LIMIT bytes, after decompression."""

    def __init__(self) -> None:
        self.taken = Taken()
        self.refused = 0
        self.encodings: set[str] = set()

    @asynccontextmanager
    async def over_grpc(self) -> AsyncIterator[str]:
        async def export(body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            self.taken += points_of(body)
            return b""

        async with over_grpc(export, LIMIT) as port:
            yield f"grpc://127.0.0.1:{port}"

    async def answer(self, request: web.BaseRequest) -> web.Response:
        self.encodings.add(request.headers.get("Content-Encoding", "none"))
        body = await request.read()
        if len(body) <= LIMIT:
            self.taken += points_of(body)
            return web.Response()
        self.refused += 1
        return self.too_large()

    def too_large(self) -> web.Response:
        return web.Response(status=413)

    @asynccontextmanager
    async def over_http(self) -> AsyncIterator[str]:
        runner = web.ServerRunner(web.Server(self.answer))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        await runner.cleanup()


class NarrowLikeGo(Narrow):
    """OpenTelemetry's Collector over HTTP."""

    def too_large(self) -> web.Response:
        return web.Response(status=400, body=Status(code=3, message="http: request body too large").SerializeToString())


WAYS = ["grpc", "http", "http of Go"]


@asynccontextmanager
async def narrow(way: str) -> AsyncIterator[tuple[Narrow, str]]:
    """A next hop of one of these ways, and where it is."""
    end = NarrowLikeGo() if way == "http of Go" else Narrow()
    async with end.over_grpc() if way == "grpc" else end.over_http() as endpoint:
        yield end, endpoint


@pytest.mark.parametrize("compression", Compression)
@pytest.mark.parametrize("way", WAYS)
async def test_every_point_arrives_at_a_next_hop_that_takes_less(
    tmp_path: Path, way: str, compression: Compression, caplog: pytest.LogCaptureFixture
) -> None:
    bodies = [numbered(counts) for counts in ([1], [400], [1] * 300, [3, 0, 200, 1, 7], [1])]
    assert max(map(len, bodies)) > 5 * LIMIT
    async with narrow(way) as (end, endpoint):
        settings = Forwarding(endpoint, tmp_path, compression=compression)
        async with forwarding(settings) as forwarder:
            for body in bodies:
                forwarder.accepted("metrics", body)
            await until(lambda: forwarder.totals.sent == len(bodies))
            assert (forwarder.waiting, forwarder.totals.refused) == (0, 0)
    assert end.taken == [point for body in bodies for point in points_of(body)]
    told = [record.message for record in caplog.records if "such requests are sent in parts" in record.message]
    assert len(told) == 1
    if way != "grpc":
        assert end.encodings == {compression.value}
        assert end.refused < 30, "what was too large once is not sent again"


@pytest.mark.parametrize("way", WAYS)
async def test_one_point_that_is_too_large_is_left_out_and_told_and_the_others_arrive(
    tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    huge = sum_metric([number(BASE, NOW, 7, {**ACME, "note": "x" * LIMIT})], name="huge")
    body, small = request(sum_metric([number(BASE, NOW, i, ACME) for i in range(100)])), numbered([2])
    body.resource_metrics[0].scope_metrics[0].metrics.insert(0, huge)
    async with narrow(way) as (end, endpoint), forwarding(Forwarding(endpoint, tmp_path)) as forwarder:
        forwarder.accepted("metrics", body.SerializeToString())
        forwarder.accepted("metrics", small)
        await until(lambda: forwarder.totals.sent == 1)
        assert (forwarder.waiting, forwarder.totals.refused) == (0, 1)
    assert end.taken == points_of(body.SerializeToString())[1:] + points_of(small)
    [told] = [record.message for record in caplog.records if "for good" in record.message]
    assert "refuses 1 of " in told
    assert {"grpc": "larger than max", "http": "HTTP 413", "http of Go": "HTTP 400"}[way] in told


class Small(Scripted):
    """A scripted one that refuses what is larger than LIMIT."""

    async def send(self, signal: str, body: bytes, timeout: float = 0.0) -> Verdict:
        if len(body) > LIMIT:
            return Verdict(Fate.TOO_LARGE, "too large")
        return await super().send(signal, body, timeout)


async def test_parts_that_were_taken_are_not_sent_again_while_later_ones_wait(tmp_path: Path) -> None:
    body, taken = numbered([400]), Verdict(Fate.TAKEN)
    hop = Small(taken, LATER, LATER, taken, LATER)
    async with running(tmp_path, hop) as forwarder:
        forwarder.accepted("metrics", body)
        await until(lambda: forwarder.totals.sent == 1)
    assert [point for part in hop.taken for point in points_of(part)] == points_of(body)
    assert hop.sent[1] == hop.sent[2] == hop.sent[3]


async def test_an_end_between_two_parts_loses_nothing(tmp_path: Path) -> None:
    body = numbered([400])
    first = Small(Verdict(Fate.TAKEN), *[LATER] * 100_000)
    async with running(tmp_path, first) as forwarder:
        forwarder.accepted("metrics", body)
        await until(lambda: len(first.sent) > 2)
    assert len(list(tmp_path.glob("*.metrics"))) == 1, "all of it is still there"
    second = Small()
    async with running(tmp_path, second) as forwarder:
        await until(lambda: forwarder.totals.sent == 1)
    assert [point for part in second.taken for point in points_of(part)] == points_of(body)
    assert list(tmp_path.glob("*.metrics")) == []


async def test_a_part_that_is_refused_for_good_takes_no_other_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body, taken = numbered([400]), Verdict(Fate.TAKEN)
    hop = Small(taken, Verdict(Fate.NEVER, "INVALID_ARGUMENT: so"), Verdict(Fate.TAKEN, "no", rejected=3))
    async with running(tmp_path, hop) as forwarder:
        forwarder.accepted("metrics", body)
        await until(lambda: forwarder.totals.refused == 1)
        assert (forwarder.totals.sent, forwarder.totals.rejected, forwarder.waiting) == (0, 3, 0)
    arrived = {point for part in hop.taken for point in points_of(part)}
    assert arrived == set(points_of(body)) - set(points_of(hop.sent[1][1]))
    assert "INVALID_ARGUMENT: so" in caplog.text


@pytest.mark.parametrize(
    ("code", "said", "size", "fate"),
    [
        ("RESOURCE_EXHAUSTED", "grpc: received message larger than max (5000000 vs. 4194304)", 10, Fate.TOO_LARGE),
        ("RESOURCE_EXHAUSTED", "gRPC message exceeds maximum size 4194304: 5000000", 10, Fate.TOO_LARGE),
        ("RESOURCE_EXHAUSTED", "Received message exceeds the maximum configured message size.", 10, Fate.TOO_LARGE),
        ("OUT_OF_RANGE", "Error, decoded message length too large: found 5, the limit is: 4", 10, Fate.TOO_LARGE),
        ("OUT_OF_RANGE", "not now", 10, Fate.LATER),
        ("RESOURCE_EXHAUSTED", "quota", SURELY_TAKEN, Fate.UNCLEAR),
        ("RESOURCE_EXHAUSTED", "quota", SURELY_TAKEN + 1, Fate.TOO_LARGE),
    ],
)
async def test_how_grpc_says_that_a_request_is_too_large(code: str, said: str, size: int, fate: Fate) -> None:
    async def export(body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await context.abort(grpc.StatusCode[code], said)
        raise AssertionError

    async with over_grpc(export) as port, hop(f"grpc://127.0.0.1:{port}", ()) as next_hop:
        assert (await next_hop.send("metrics", bytes(size))).fate is fate


@pytest.mark.parametrize(("compression", "least", "most"), [("gzip", 0, 100_000), ("none", 1_000_000, 2_000_000)])
async def test_what_goes_over_grpc_is_compressed_as_was_asked(compression: str, least: int, most: int) -> None:
    """Counted on the wire: gRPC shows a server no more than the message."""
    heard, passed = list[bytes](), 0

    async def export(body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        heard.append(body)
        return b""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal passed
        back, forth = await asyncio.open_connection("127.0.0.1", port)
        answers = asyncio.create_task(pump(back, writer))
        while data := await reader.read(65536):
            passed += len(data)
            forth.write(data)
        forth.close()
        await answers

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async with over_grpc(export) as port:
        between = await asyncio.start_server(relay, "127.0.0.1", 0)
        address = f"grpc://127.0.0.1:{between.sockets[0].getsockname()[1]}"
        async with hop(address, (), Compression(compression)) as next_hop:
            assert (await next_hop.send("metrics", bytes(1_000_000))).fate is Fate.TAKEN
        between.close()
    assert heard == [bytes(1_000_000)]
    assert least < passed < most
