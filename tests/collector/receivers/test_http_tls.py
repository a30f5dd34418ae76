"""TLS on the HTTP port: a handshake is within the same bounds as a connection without one."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trustme

from tallymark_collector.access.tls import ServerCertificate
from tallymark_collector.receivers.server import Server
from tallymark_collector.settings import TlsFiles
from tests.collector.receivers.test_http_connections import HEAD, WAIT, Streams, dialled, everything
from tests.support.receiving import GOOD, Counting, receiving

BODY = GOOD.SerializeToString()
WHOLE = f"{HEAD}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def certificate(tmp_path: Path, authority: trustme.CA) -> ServerCertificate:
    pair = authority.issue_cert("localhost")
    pair.private_key_pem.write_to_path(tmp_path / "tls.key")
    pair.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    return ServerCertificate(TlsFiles(tmp_path / "tls.crt", tmp_path / "tls.key"))


@asynccontextmanager
async def shaken(server: Server, authority: trustme.CA) -> AsyncIterator[Streams]:
    """A client that has done its handshake."""
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    opening = asyncio.open_connection("127.0.0.1", server.http_port, ssl=context, server_hostname="localhost")
    reader, writer = await asyncio.wait_for(opening, WAIT)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def sent(streams: Streams) -> bytes:
    """The head of the answer to a good request; the connection stays."""
    reader, writer = streams
    writer.write(WHOLE)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT)
    await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
    return head


@pytest.mark.parametrize("begun", [b"", b"\x16\x03\x01"], ids=["nothing", "half a greeting"])
async def test_a_client_that_does_not_shake_hands_is_cut_off(certificate: ServerCertificate, begun: bytes) -> None:
    serve = {"certificate": certificate}
    async with receiving(Counting(), head_seconds=0.2, serve=serve) as server, dialled(server) as (reader, writer):
        writer.write(begun)
        assert await asyncio.wait_for(everything(reader), WAIT / 2) == b""  # asyncio's own limit is 60 s


async def test_a_client_that_shakes_hands_and_sends_no_head_is_cut_off(
    certificate: ServerCertificate, authority: trustme.CA
) -> None:
    async with (
        receiving(Counting(), head_seconds=1, serve={"certificate": certificate}) as server,
        shaken(server, authority) as (reader, writer),
    ):
        writer.write(b"POST /v1/met")
        assert await everything(reader) == b""


async def test_handshakes_count_as_connections_and_the_oldest_go_first(
    certificate: ServerCertificate, authority: trustme.CA
) -> None:
    counting = Counting()
    limits = {"http_connections": 3, "head_seconds": WAIT}
    async with receiving(counting, serve={"certificate": certificate}, **limits) as server, AsyncExitStack() as opened:
        silent = [await opened.enter_async_context(dialled(server)) for _ in range(10)]
        for reader, _ in silent[:7]:
            assert await everything(reader) == b""
        for _ in range(3):
            assert (await sent(await opened.enter_async_context(shaken(server, authority)))).startswith(b"HTTP/1.1 200")
        for reader, _ in silent[7:]:
            assert await everything(reader) == b""
    assert counting.points == 3


async def test_a_handshake_that_fails_gives_its_place_back(
    certificate: ServerCertificate, authority: trustme.CA
) -> None:
    limits = {"http_connections": 2, "head_seconds": WAIT}
    async with (
        receiving(Counting(), serve={"certificate": certificate}, **limits) as server,
        shaken(server, authority) as kept,
    ):
        assert (await sent(kept)).startswith(b"HTTP/1.1 200")
        for _ in range(5):
            async with dialled(server) as (reader, writer):
                writer.write(b"GET / HTTP/1.1\r\n\r\n")
                await everything(reader)
        async with shaken(server, authority) as another:
            assert (await sent(another)).startswith(b"HTTP/1.1 200")
            assert (await sent(kept)).startswith(b"HTTP/1.1 200"), "it was idle the longest, and there was room"
