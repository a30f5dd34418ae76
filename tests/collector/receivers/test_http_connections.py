"""Raw bytes on the HTTP port: slow, idle, broken and too many clients; and ports that are taken."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tallymark_collector.errors import UserError
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.receivers.admission import Admission
from tallymark_collector.receivers.listening import listen
from tallymark_collector.receivers.server import Server, serving
from tallymark_collector.settings import Connections, Settings
from tallymark_collector.store import Store
from tests.support.messages import otlp_json
from tests.support.receiving import GOOD, NOW, Counting, Stuck, receiving
from tests.support.usage import BASE, number, request, sum_metric

HEAD = "POST /v1/metrics HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-protobuf\r\n"
WAIT = 60
"""Seconds that nothing here takes, on any machine."""

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def dialled(server: Server) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def everything(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes the connection."""
    try:
        return await asyncio.wait_for(reader.read(), WAIT)
    except ConnectionResetError:
        return b""


async def exchange(server: Server, sent: bytes, *, eof: bool = False) -> bytes:
    """What the server answers to these bytes, and to the end of sending."""
    async with dialled(server) as (reader, writer):
        writer.write(sent)
        if eof:
            writer.write_eof()
        return await everything(reader)


@pytest.mark.parametrize("begun", ["", "POST /v1/met", HEAD])
async def test_a_client_that_sends_no_whole_head_is_cut_off(begun: str) -> None:
    async with receiving(Counting(), head_seconds=0.2) as server, dialled(server) as (reader, writer):
        writer.write(begun.encode())
        assert await everything(reader) == b""


async def test_a_client_that_sends_no_whole_body_hears_503_and_is_cut_off() -> None:
    async with receiving(Counting(), body_seconds=0.2) as server, dialled(server) as (reader, writer):
        writer.write(f"{HEAD}Content-Length: 1000\r\n\r\nx".encode())
        answer = await everything(reader)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"Retry-After: 1" in answer
    assert b"did not arrive within 0.2 s" in answer


async def test_a_slow_client_is_not_counted_for_what_it_has_only_announced() -> None:
    body, counting = GOOD.SerializeToString(), Counting()
    async with (
        receiving(counting, in_flight_bytes=len(body)) as server,
        dialled(server) as (_, slow),
        dialled(server) as (reader, writer),
    ):
        slow.write(f"{HEAD}Content-Length: 50000000\r\n\r\n".encode())
        await slow.drain()
        writer.write(f"{HEAD}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        assert (await everything(reader)).startswith(b"HTTP/1.1 200")


async def test_an_idle_connection_is_closed_and_one_at_work_is_not() -> None:
    body, stuck = GOOD.SerializeToString(), Stuck()
    whole = f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
    async with receiving(stuck, idle_seconds=0.2, head_seconds=0.3) as server, dialled(server) as (reader, writer):
        writer.write(whole)
        await stuck.entered.wait()
        await asyncio.sleep(1)  # longer than both; only a wrong server notices
        stuck.go.set()
        writer.write(whole)
        answers = await everything(reader)
        assert answers.count(b"HTTP/1.1 200") == 2
        assert stuck.writes == 2


async def test_connections_past_the_limit_are_closed_at_once_where_all_are_at_work() -> None:
    body, stuck = GOOD.SerializeToString(), Stuck()
    whole = f"{HEAD}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
    async with receiving(stuck, http_connections=2) as server:
        async with dialled(server) as (first, writer), dialled(server) as (second, other):
            writer.write(whole)
            other.write(whole)
            await stuck.reached(2)
            assert await exchange(server, b"") == b""
            stuck.go.set()
            for reader in (first, second):
                assert (await everything(reader)).startswith(b"HTTP/1.1 200")
        assert (await exchange(server, whole)).startswith(b"HTTP/1.1 200")


async def test_slow_heads_and_bodies_do_not_keep_others_out() -> None:
    """Places are taken by clients that drip a byte at a time; each of many good ones finds one."""
    body, counting = GOOD.SerializeToString(), Counting()
    whole = f"{HEAD}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
    begun = f"{HEAD}Content-Length: 100000\r\n\r\n".encode()
    async with receiving(counting, http_connections=6, head_seconds=WAIT, body_seconds=WAIT) as server:
        dripping: list[tuple[asyncio.Task[None], asyncio.StreamWriter]] = []
        for _ in range(10):
            for first in (b"POST /v1/", begun):
                reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
                writer.write(first)
                dripping.append((asyncio.create_task(drip(reader, writer)), writer))
            assert (await exchange(server, whole)).startswith(b"HTTP/1.1 200")
        while sum(not task.done() for task, _ in dripping) > 6:  # noqa: ASYNC110 - who was cut off hears of it later
            await asyncio.sleep(0.01)
        for task, writer in dripping:
            task.cancel()
            writer.close()
    assert counting.points == 10


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A byte at a time, until the server has enough."""
    while not reader.at_eof() and not writer.is_closing():
        writer.write(b"x")
        with contextlib.suppress(asyncio.TimeoutError, ConnectionError):
            await asyncio.wait_for(reader.read(1), 0.05)


async def test_idle_connections_go_before_those_that_send_something() -> None:
    body, counting, admission = GOOD.SerializeToString(), Counting(), Admission(1 << 20, 1.0)
    head = f"{HEAD}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    async with (
        receiving(counting, http_connections=3, serve={"admission": admission}) as server,
        dialled(server) as (sends, writer),
        dialled(server) as (idle, _),
        dialled(server) as (later, _unused),
    ):
        writer.write(head + body[:-1])
        while not admission.under_way:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(3):
            async with dialled(server) as (answered, quick):
                quick.write(head + body)
                assert (await everything(answered)).startswith(b"HTTP/1.1 200")
        assert await everything(idle) == b""
        writer.write(body[-1:])
        assert (await everything(sends)).startswith(b"HTTP/1.1 200")
        assert not later.at_eof()
    assert counting.points == 4


MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "gRPC": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no version": b"POST /v1/metrics\r\n\r\n",
    "a long head": HEAD.encode() + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
    "no length": f"{HEAD}Content-Length: many\r\n\r\n".encode(),
    "two lengths": f"{HEAD}Content-Length: 5\r\nContent-Length: 6\r\n\r\n123456".encode(),
    "length and chunks": f"{HEAD}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(),
    "no chunk": f"{HEAD}Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n".encode(),
    "half a chunk": f"{HEAD}Transfer-Encoding: chunked\r\n\r\n10\r\nhello".encode(),
    "half a body": f"{HEAD}Content-Length: 1000\r\n\r\nhello".encode(),
}
CUT_OFF = (MALFORMED["half a chunk"], MALFORMED["half a body"])
"""There is nobody left to answer."""


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED)
async def test_malformed_http_is_a_4xx_and_the_server_goes_on(sent: bytes) -> None:
    body, counting = GOOD.SerializeToString(), Counting()
    async with receiving(counting) as server:
        answer = await exchange(server, sent, eof=sent in CUT_OFF)
        assert (answer == b"" and sent in CUT_OFF) or re.match(rb"HTTP/\d\.\d 4\d\d ", answer), answer
        good = f"{HEAD}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
        assert (await exchange(server, good)).startswith(b"HTTP/1.1 200")
    assert counting.points == 1


async def test_chunks_with_extensions_and_trailers_are_a_body() -> None:
    body, counting = GOOD.SerializeToString(), Counting()
    chunks = b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in body) + b"0\r\nChecksum: 5\r\n\r\n"
    async with receiving(counting) as server:
        answer = await exchange(
            server, f"{HEAD}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode() + chunks
        )
    assert answer.startswith(b"HTTP/1.1 200"), answer
    assert counting.points == 1


async def test_a_client_that_hangs_up_has_what_it_sent_written() -> None:
    body, stuck = GOOD.SerializeToString(), Stuck()
    async with receiving(stuck) as server:
        async with dialled(server) as (_, writer):
            writer.write(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await stuck.entered.wait()
        stuck.go.set()
    assert stuck.writes == 1


MUTATIONS = 3000


async def test_mutated_json_is_never_a_fault_of_ours(store: Store, dsn: str) -> None:
    """Thousands of damaged requests: each is 200 or 400, and the database takes the next good one."""
    rng = random.Random(11)
    spans = ExportTraceServiceRequest()
    spans.resource_spans.add().scope_spans.add().spans.add(trace_id=bytes(16), span_id=bytes(8), name="x").events.add()
    logs = ExportLogsServiceRequest()
    logs.resource_logs.add().scope_logs.add().log_records.add(trace_id=bytes(16)).body.int_value = 5
    seeds = {"metrics": otlp_json(GOOD), "traces": otlp_json(spans), "logs": otlp_json(logs)}
    statuses: dict[int, int] = {}
    good = request(sum_metric([number(BASE, NOW, 11, {"tallymark.account.id": "intact"})]))
    async with receiving(store) as server, dialled(server) as (reader, writer):
        for attempt in range(MUTATIONS):
            signal = rng.choice(sorted(seeds))
            body = mutated(rng, seeds[signal])
            status, answer = await posted(reader, writer, signal, body)
            assert status in (200, 400), f"request {attempt}: {body!r} was answered {status} {answer!r}"
            assert isinstance(json.loads(answer), dict)
            statuses[status] = statuses.get(status, 0) + 1
        for _ in range(2):
            assert await posted(reader, writer, "metrics", otlp_json(good)) == (200, b"{}")
    with psycopg.connect(dsn) as another:
        intact = "SELECT sum(quantity) FROM tallymark.usage_hourly WHERE account = 'intact'"
        assert another.execute(intact).fetchone() == (11,)
    assert min(statuses.get(200, 0), statuses.get(400, 0)) > MUTATIONS // 10, statuses


async def posted(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, signal: str, body: bytes
) -> tuple[int, bytes]:
    """Status and body of the answer, on a kept connection."""
    writer.write(
        f"POST /v1/{signal} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT)).decode()
    length = next(int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length:"))
    return int(head.split(" ")[1]), await asyncio.wait_for(reader.readexactly(length), WAIT)


PIECES = [b"null", b"-1", b"1e400", b"NaN", b"{}", b"[]", b'"', b"\\u0000", b"\\ud800", b"\xff", b"[" * 500, b"9" * 30,
          b"true", b",", b":", b"asDouble", b"bytesValue", b"arrayValue", b"kvlistValue", b"\xef\xbb\xbf"]  # fmt: skip


def mutated(rng: random.Random, seed: bytes) -> bytes:
    """The request with one to four cuts, repetitions, exchanges or insertions; or with one value for another."""
    if rng.random() < 0.4:
        tree = json.loads(seed)
        _exchange_value(rng, tree)
        return json.dumps(tree).encode()
    body = bytearray(seed)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(body) + 1)
        end = min(len(body), at + rng.randint(0, 12))
        match rng.randrange(4):
            case 0:
                del body[at:end]
            case 1:
                body[at:at] = body[at:end] * rng.randint(1, 3)
            case 2:
                body[at:at] = rng.choice(PIECES)
            case _:
                body[at:end] = rng.choice(PIECES)
    return bytes(body)


def _exchange_value(rng: random.Random, tree: object) -> None:
    here = tree
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))  # type: ignore[call-overload, arg-type]
        if not keys:
            return
        key = rng.choice(keys)
        below = here[key]  # type: ignore[index]
        if isinstance(below, (dict, list)) and rng.random() < 0.85:
            here = below
            continue
        here[key] = rng.choice([None, -1, 0, 2**63, 1e300, 0.5, True, "", "x", "5", "\0", [], {}, [{}], "é" * 300])  # type: ignore[index]
        return


async def test_a_second_server_on_either_port_is_refused_and_leaves_nothing() -> None:
    async with receiving(Counting()) as server:
        for taken in ("port", "http_port"):
            ports = {"port": free_port(), "http_port": free_port(), taken: getattr(server, taken)}
            sentence = f"cannot listen on 127.0.0.1:{ports[taken]}: is another collector"
            with pytest.raises(UserError, match=sentence):
                async with serving(Pipeline(Counting()), Settings("unused", **ports)):
                    pass
            ports.pop(taken)
            with socket.socket() as again:
                assert again.connect_ex(("127.0.0.1", *ports.values())) != 0, "of the server that did not start"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(("first", "second"), [("127.0.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1"), ("localhost",) * 2])
def test_addresses_that_overlap_are_refused(first: str, second: str) -> None:
    sockets = listen(first, 0)
    try:
        ports = {one.getsockname()[1] for one in sockets}
        assert len(ports) == 1, "every address of the host has the same one"
        with pytest.raises(UserError, match="is another collector running there"):
            listen(second, ports.pop())
    finally:
        for one in sockets:
            one.close()


async def test_a_host_of_which_one_address_is_taken_is_refused_by_both_protocols() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        for ports in ({"port": number}, {"port": 0, "http_port": number}):
            with pytest.raises(UserError, match=f"cannot listen on localhost:{number}"):
                async with serving(Pipeline(Counting()), Settings("unused", host="localhost", **ports)):
                    pass


def test_a_host_that_is_none_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"cannot listen on nowhere\.invalid:4318"):
        listen("nowhere.invalid", 4318)


async def test_an_old_connection_ends_with_an_answer_so_that_its_client_finds_other_collectors() -> None:
    body, counting = GOOD.SerializeToString(), Counting()
    good = f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
    answers = []
    async with (
        receiving(counting, connections=Connections(max_age=0.5)) as server,
        dialled(server) as (reader, writer),
    ):
        while not answers or b"connection: close" not in answers[-1].lower():
            writer.write(good)
            answers.append(await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT))
            await asyncio.sleep(0.05)
            assert len(answers) < 1000
        assert await everything(reader) == b"", "nothing more comes"
        assert {answer[:12] for answer in answers} == {b"HTTP/1.1 200"}
        again = await exchange(server, good.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        assert again.startswith(b"HTTP/1.1 200")
    assert counting.points == len(answers) + 1


async def test_a_young_connection_stays() -> None:
    body = GOOD.SerializeToString()
    async with receiving(Counting()) as server, dialled(server) as (reader, writer):
        for _ in range(20):
            writer.write(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT)
            assert b"close" not in head.lower()
