"""To the next hop: in order, at least once, through its faults and ours, never at the cost of an acknowledgement."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import grpc
import pytest
from aiohttp import web
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

from tallymark_collector.errors import UserError
from tallymark_collector.forwarding import forwarder as forwarder_module
from tallymark_collector.forwarding import forwarding
from tallymark_collector.forwarding.forwarder import Forwarder
from tallymark_collector.forwarding.hops import Fate, Hop, Verdict, endpoint_of, hop
from tallymark_collector.forwarding.spool import Entry, Spool
from tallymark_collector.settings import Forwarding
from tests.support.messages import otlp_json
from tests.support.receiving import GOOD, Counting, receiving

LATER = Verdict(Fate.LATER, "UNAVAILABLE: away")


class Scripted:
    """A next hop that answers as it is told, then takes everything."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts = list(verdicts)
        self.sent: list[tuple[str, bytes]] = []
        self.taken: list[bytes] = []

    async def send(self, signal: str, body: bytes, timeout: float = 0.0) -> Verdict:
        self.sent.append((signal, body))
        verdict = self.verdicts.pop(0) if self.verdicts else Verdict(Fate.TAKEN)
        if verdict.fate is Fate.TAKEN:
            self.taken.append(body)
        return verdict


@asynccontextmanager
async def running(folder: Path, hop: Hop, max_bytes: int = 1 << 20) -> AsyncIterator[Forwarder]:
    spool = Spool(folder, max_bytes, 1000)
    forwarder = Forwarder(spool, hop, first_pause=0.001)
    task = asyncio.create_task(forwarder.run())
    try:
        yield forwarder
    finally:
        await forwarder.end(task)
        spool.close()
        assert task.exception() is None


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.metrics")]


BODIES = [b"body %d" % i for i in range(20)]


async def test_order_is_kept_through_retries(tmp_path: Path) -> None:
    hop = Scripted(LATER, LATER, Verdict(Fate.TAKEN), LATER)
    async with running(tmp_path, hop) as forwarder:
        for body in BODIES:
            forwarder.accepted("metrics", body)
        await until(lambda: forwarder.totals.sent == len(BODIES))
    assert hop.taken == BODIES
    assert [body for _, body in hop.sent[:5]] == [BODIES[0]] * 3 + [BODIES[1]] * 2
    assert forwarder.waiting == 0
    assert files(tmp_path) == []


async def test_a_request_counts_once_it_has_left_a_slow_or_failing_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, calls = Spool.remove, 0

    def troubled(spool: Spool, entry: Entry) -> bool:
        nonlocal calls
        calls += 1
        time.sleep(0.05)
        if calls == 1:
            raise OSError(errno.EIO, "the disk")
        return remove(spool, entry)

    monkeypatch.setattr(Spool, "remove", troubled)
    monkeypatch.setattr(forwarder_module, "MAX_PAUSE", 0.01)
    hop = Scripted()
    async with running(tmp_path, hop) as forwarder:
        for body in BODIES[:3]:
            forwarder.accepted("metrics", body)
        await until(lambda: forwarder.totals.sent == 3)
        assert forwarder.waiting == 0
        assert files(tmp_path) == []
    assert hop.taken == [BODIES[0], *BODIES[:3]]


async def test_an_orderly_end_keeps_what_waits_and_the_next_start_sends_it(tmp_path: Path) -> None:
    async with running(tmp_path, Scripted(*[LATER] * 10_000)) as forwarder:
        for body in BODIES:
            forwarder.accepted("traces", body)  # and the end comes before the disk has had a turn
    hop = Scripted()
    async with running(tmp_path, hop) as forwarder:
        await until(lambda: forwarder.totals.sent == len(BODIES))
    assert hop.sent == [("traces", body) for body in BODIES]


@pytest.mark.parametrize("count", [1, forwarder_module.MAX_UNCLEAR])
async def test_what_is_refused_for_good_is_left_out_counted_and_told(
    tmp_path: Path, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    verdict = Verdict(Fate.NEVER if count == 1 else Fate.UNCLEAR, "HTTP 400 Bad Request")
    hop = Scripted(*[verdict] * count)
    async with running(tmp_path, hop) as forwarder:
        for body in BODIES[:3]:
            forwarder.accepted("metrics", body)
        await until(lambda: forwarder.totals.sent == 2)
    assert (hop.taken, forwarder.totals.refused) == (BODIES[1:3], 1)
    [told] = [record.message for record in caplog.records if "for good" in record.message]
    assert "HTTP 400 Bad Request" in told


async def test_partial_success_is_taken_and_told(tmp_path: Path) -> None:
    async with running(tmp_path, Scripted(Verdict(Fate.TAKEN, "no", rejected=3))) as forwarder:
        forwarder.accepted("metrics", b"x")
        await until(lambda: forwarder.totals.sent == 1)
        assert forwarder.totals.rejected == 3


async def test_a_full_folder_drops_the_oldest_loudly_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hop = Scripted(*[LATER] * 100_000)
    async with running(tmp_path, hop, max_bytes=5 * (16 + 7)) as forwarder:
        for body in BODIES[:10]:
            forwarder.accepted("metrics", body[:6] + b"!")
        await until(lambda: forwarder.totals.dropped == 5)
        hop.verdicts.clear()
        await until(lambda: forwarder.waiting == 0)
    assert hop.taken == [body[:6] + b"!" for body in BODIES[5:10]]
    assert any(r.levelno == logging.ERROR and "NOT forwarded" in r.message for r in caplog.records)


async def test_a_disk_that_takes_nothing_is_counted_and_the_next_one_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, failures = Spool.append, 2

    def failing(self: Spool, signal: str, body: bytes) -> int:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(self, signal, body)

    monkeypatch.setattr(Spool, "append", failing)
    hop = Scripted()
    async with running(tmp_path, hop) as forwarder:
        for body in BODIES[:3]:
            forwarder.accepted("metrics", body)
        await until(lambda: forwarder.totals.sent == 1)
    assert (hop.taken, forwarder.totals.dropped) == ([BODIES[2]], 2)


async def test_memory_that_waits_for_the_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder_module, "QUEUE_BYTES", 100)
    async with running(tmp_path, Scripted()) as forwarder:
        for _ in range(5):  # without a turn for the disk in between
            forwarder.accepted("metrics", bytes(40))
        assert (forwarder.waiting, forwarder.totals.dropped) == (2, 3)


async def test_what_the_next_hop_asks_for_is_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    asked = [Verdict(Fate.LATER, "", 7.0), LATER, LATER, Verdict(Fate.LATER, "", 1e9)]
    async with running(tmp_path, Scripted(*asked)) as forwarder:
        monkeypatch.setattr(forwarder_module.asyncio, "sleep", noted)
        forwarder.accepted("metrics", b"x")
        while not forwarder.totals.sent:
            await sleep(0.005)
        monkeypatch.undo()
    assert pauses[0] == 7.0
    assert 0.001 <= pauses[1] <= 0.002
    assert 0.002 <= pauses[2] <= 0.004
    assert pauses[3] == forwarder_module.MAX_ASKED_PAUSE


class Refusing:
    """OTLP's services over gRPC that end each call as they are told."""

    def __init__(self, code: grpc.StatusCode, *metadata: tuple[str, bytes]) -> None:
        self.code, self.metadata = code, metadata

    def service(self, details: grpc.HandlerCallDetails) -> object:
        async def export(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            await context.abort(self.code, "because", self.metadata)
            raise AssertionError

        return grpc.unary_unary_rpc_method_handler(export)


INFO = ("google.rpc.retryinfo-bin", RetryInfo(retry_delay=Duration(seconds=3, nanos=500_000_000)).SerializeToString())


@pytest.mark.parametrize(
    ("code", "metadata", "fate", "delay"),
    [
        (grpc.StatusCode.UNAVAILABLE, [INFO], Fate.LATER, 3.5),
        (grpc.StatusCode.UNAVAILABLE, [], Fate.LATER, None),
        (grpc.StatusCode.UNAVAILABLE, [("google.rpc.retryinfo-bin", b"\xff")], Fate.LATER, None),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [INFO], Fate.LATER, 3.5),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [], Fate.UNCLEAR, None),
        (grpc.StatusCode.UNAUTHENTICATED, [], Fate.LATER, None),
        (grpc.StatusCode.UNIMPLEMENTED, [], Fate.LATER, None),
        (grpc.StatusCode.INTERNAL, [], Fate.UNCLEAR, None),
        (grpc.StatusCode.INVALID_ARGUMENT, [], Fate.NEVER, None),
    ],
)
async def test_what_grpc_answers_mean(
    code: grpc.StatusCode, metadata: list[tuple[str, bytes]], fate: Fate, delay: float | None
) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Refusing(code, *metadata),))  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with hop(f"grpc://127.0.0.1:{port}", ()) as next_hop:
        found = await next_hop.send("metrics", b"")
    await server.stop(None)
    assert (found.fate, found.delay) == (fate, delay)
    assert found.words == f"{code.name}: because"


@pytest.mark.parametrize(
    ("status", "headers", "fate", "delay"),
    [
        (200, {}, Fate.TAKEN, None),
        (429, {"Retry-After": "5"}, Fate.LATER, 5.0),
        (503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, Fate.LATER, 0.0),
        (503, {"Retry-After": "soon"}, Fate.LATER, None),
        (502, {}, Fate.LATER, None),
        (301, {"Location": "http://127.0.0.1:1/"}, Fate.LATER, None),
        (401, {}, Fate.LATER, None),
        (404, {}, Fate.LATER, None),
        (415, {}, Fate.LATER, None),
        (500, {}, Fate.UNCLEAR, None),
        (400, {}, Fate.NEVER, None),
        (413, {}, Fate.TOO_LARGE, None),
    ],
)
async def test_what_http_answers_mean(status: int, headers: dict[str, str], fate: Fate, delay: float | None) -> None:
    async def answer(request: web.BaseRequest) -> web.Response:
        return web.Response(status=status, headers=headers)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    async with hop(f"http://127.0.0.1:{runner.addresses[0][1]}/base/", ()) as next_hop:
        found = await next_hop.send("metrics", b"")
    await runner.cleanup()
    assert (found.fate, found.delay) == (fate, delay)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_a_next_hop_that_is_not_there_is_later(scheme: str) -> None:
    async with hop(f"{scheme}://127.0.0.1:1", ()) as next_hop:
        assert (await next_hop.send("logs", b"")).fate is Fate.LATER


@pytest.mark.parametrize(
    "text",
    [
        "collector:4317",
        "grpc://collector",
        "grpc://collector:4317/path",
        "ftp://collector:1",
        "http://",
        "grpc://:1",
        "http://me:hunter2@collector:4318",
        "http://collector:99999",
        "http://collector/?x=1",
    ],
)
def test_addresses_that_are_none_are_a_sentence_without_them(text: str) -> None:
    with pytest.raises(UserError, match="--forward-to is no address") as caught:
        endpoint_of(text)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_from_collector_to_collector_as_the_bytes_that_came(tmp_path: Path, scheme: str) -> None:
    last, heard = Counting(), list[tuple[str, bytes]]()
    async with receiving(last, serve={"accepted": lambda _, *request: heard.append(request)}) as end:
        port = end.port if scheme == "grpc" else end.http_port
        settings = Forwarding(f"{scheme}://127.0.0.1:{port}", tmp_path)
        async with forwarding(settings) as forwarder, aiohttp.ClientSession() as session:
            async with receiving(Counting(), serve={"accepted": forwarder.of_tenant("default")}) as start:
                base = f"http://127.0.0.1:{start.http_port}/v1/"
                for signal, body, media in [
                    ("metrics", GOOD.SerializeToString(), "application/x-protobuf"),
                    ("metrics", otlp_json(GOOD), "application/json"),
                    ("logs", b"", "application/x-protobuf"),
                    ("metrics", b"\xff", "application/x-protobuf"),
                    ("traces", b"", "application/x-protobuf"),
                ]:
                    async with session.post(base + signal, data=body, headers={"Content-Type": media}) as answer:
                        assert answer.status == (400 if body == b"\xff" else 200)
            await until(lambda: forwarder.totals.sent == 4)
    assert heard == [("metrics", GOOD.SerializeToString())] * 2 + [("logs", b""), ("traces", b"")]
    assert last.points == 2


async def test_headers_go_along_and_partial_success_is_read() -> None:
    seen: list[str | None] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        seen.append(request.headers.get("authorization"))
        response = ExportMetricsServiceResponse()
        response.partial_success.rejected_data_points = 2
        return web.Response(body=response.SerializeToString())

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    settings = Forwarding("grpc://x:1", Path("x"), headers=(("authorization", "Bearer hunter2"),))
    async with hop(f"http://127.0.0.1:{runner.addresses[0][1]}", settings.headers) as next_hop:
        assert (await next_hop.send("metrics", b"")).rejected == 2
    await runner.cleanup()
    assert seen == ["Bearer hunter2"]
    assert "hunter2" not in repr(settings)


async def test_one_tenants_requests_are_sent_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """There all of them would be one tenant's, and two accounts of one name one account."""
    hop = Scripted()
    async with running(tmp_path, hop) as forwarder:
        accepted = forwarder.of_tenant("acme-corp")
        for tenant in ("other", "acme-corp", "other"):
            accepted(tenant, "metrics", tenant.encode())
        await until(lambda: forwarder.totals.sent == 1)
        assert (forwarder.waiting, forwarder.totals.other_tenants) == (0, 2)
    assert hop.taken == [b"acme-corp"]
    assert sum("are not sent on" in record.message for record in caplog.records) == 1
