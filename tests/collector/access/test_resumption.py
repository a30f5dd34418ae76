"""Clients that go on with a TLS session of before: who is not trusted any more is not let in by it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from tallymark_collector.access import certificates
from tallymark_collector.access.tls import ServerCertificate
from tallymark_collector.settings import TlsFiles
from tests.collector.access.test_tls import install, put

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def clients() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA, clients: trustme.CA) -> TlsFiles:
    found = TlsFiles(tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "clients.pem")
    install(found, authority.issue_cert("localhost"))
    put(tmp_path / "clients.pem", clients.cert_pem.bytes())
    return found


@asynccontextmanager
async def naming(files: TlsFiles) -> AsyncIterator[int]:
    """A server that tells each client how it is named."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        names = certificates.of_connection(writer.get_extra_info("ssl_object"))
        writer.write(",".join(names[1:] or ("nobody",)).encode())
        writer.close()

    context = ServerCertificate(files).ssl_context("http/1.1")
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


class Client:
    """A client that keeps its last session."""

    def __init__(self, authority: trustme.CA, version: ssl.TLSVersion, shown: trustme.LeafCert | None) -> None:
        self._context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
        self._context.minimum_version = self._context.maximum_version = version
        if shown is not None:
            shown.configure_cert(self._context)
        self._session: ssl.SSLSession | None = None
        self.reused = False

    def _named(self, port: int) -> str:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=60) as plain,
            self._context.wrap_socket(plain, server_hostname="localhost", session=self._session) as connection,
        ):
            found = connection.recv(1000).decode()
            self._session, self.reused = connection.session, bool(connection.session_reused)
        return found

    async def named(self, port: int) -> str:
        """How the server names it, "" where it is not let in."""
        try:
            return await asyncio.to_thread(self._named, port)
        except (ssl.SSLError, OSError):
            return ""


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
async def test_a_session_does_not_outlive_the_trust_in_its_clients_authority(
    files: TlsFiles, authority: trustme.CA, clients: trustme.CA, version: ssl.TLSVersion
) -> None:
    other = trustme.CA()
    known = Client(authority, version, clients.issue_cert("shop.example"))
    async with naming(files) as port:
        assert [await known.named(port) for _ in range(3)] == ["dns:shop.example"] * 3
        put(files.client_authority or Path(), other.cert_pem.bytes())
        assert [await known.named(port) for _ in range(3)] == [""] * 3
        successor = Client(authority, version, other.issue_cert("shop.example"))
        assert [await successor.named(port) for _ in range(2)] == ["dns:shop.example"] * 2


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
async def test_who_has_shown_no_certificate_is_not_let_in_once_certificates_are_asked_for(
    files: TlsFiles, authority: trustme.CA, version: ssl.TLSVersion
) -> None:
    """It is another server then; what it issues is its own."""
    stranger = Client(authority, version, None)
    async with naming(replace(files, client_authority=None)) as port:
        assert [await stranger.named(port) for _ in range(2)] == ["nobody"] * 2
    async with naming(files) as port:
        assert await stranger.named(port) == ""


async def test_where_clients_show_certificates_each_shows_it_each_time(
    files: TlsFiles, authority: trustme.CA, clients: trustme.CA
) -> None:
    """A session would spare a certificate that has ended meanwhile its end."""
    known = Client(authority, ssl.TLSVersion.TLSv1_3, clients.issue_cert("shop.example"))
    async with naming(files) as port:
        for _ in range(3):
            assert await known.named(port) == "dns:shop.example"
            assert not known.reused
