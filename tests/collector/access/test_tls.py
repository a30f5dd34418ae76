"""TLS over real sockets: rotation, broken pairs, and clients that show certificates."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import grpc
import psycopg
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc

from tallymark_collector.access import Authenticator, Scope, certificates, records
from tallymark_collector.access.records import InDatabase
from tallymark_collector.access.requests import anybody, tenant_of
from tallymark_collector.access.tls import ServerCertificate
from tallymark_collector.errors import UserError
from tallymark_collector.model import Batch, WriteResult
from tallymark_collector.pipeline import Pipeline, Writing
from tallymark_collector.receivers.server import Server, serving
from tallymark_collector.settings import Settings, TlsFiles
from tallymark_collector.store import Store
from tests.support.usage import BASE, SECOND, number, request, sum_metric

NOW = BASE + 60 * SECOND
GOOD = request(sum_metric([number(BASE, NOW, 5, {"tallymark.account.id": "acme"})]))


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> TlsFiles:
    found = TlsFiles(tmp_path / "tls.crt", tmp_path / "tls.key")
    install(found, authority.issue_cert("localhost", "127.0.0.1"))
    return found


def install(files: TlsFiles, pair: trustme.LeafCert) -> None:
    """As a well-behaved tool does it: written beside, then moved to its place."""
    put(files.key, pair.private_key_pem.bytes())
    put(files.certificate, b"".join(pem.bytes() for pem in pair.cert_chain_pems))


def put(path: Path, content: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.replace(new, path)  # noqa: PTH105 - the same thing


def pem(pair: trustme.LeafCert) -> bytes:
    return pair.cert_chain_pems[0].bytes()


def shown_at(port: int, authority: trustme.CA, *, alpn: str = "h2", client: trustme.LeafCert | None = None) -> str:
    """The certificate that a new connection is shown, as PEM. Raises ssl.SSLError."""
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    context.set_alpn_protocols([alpn])
    if client is not None:
        client.configure_cert(context)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        certificate = connection.getpeercert(binary_form=True)
    assert certificate is not None
    return ssl.DER_cert_to_PEM_cert(certificate)


def lines(text: str | bytes) -> str:
    return "".join((text.decode() if isinstance(text, bytes) else text).split())


class Gate:
    """A store whose writes wait."""

    def __init__(self) -> None:
        self.entered, self.go = asyncio.Event(), asyncio.Event()

    async def write(self, batch: Batch) -> WriteResult:
        self.entered.set()
        await self.go.wait()
        return WriteResult(inserted=len(batch.points))


@asynccontextmanager
async def secured(store: Writing, files: TlsFiles, authenticator: Authenticator | None = None) -> AsyncIterator[Server]:
    settings = Settings("unused", port=0, drain_seconds=3)
    found = anybody if authenticator is None else tenant_of(authenticator)
    certificate = ServerCertificate(files)
    pipeline = Pipeline(store, now_ns=lambda: NOW)
    async with serving(pipeline, settings, tenant_of=found, certificate=certificate) as server:
        yield server


def channel(port: int, authority: trustme.CA, client: trustme.LeafCert | None = None) -> grpc.aio.Channel:
    key, chain = (None, None) if client is None else (client.private_key_pem.bytes(), pem(client))
    return grpc.aio.secure_channel(
        f"localhost:{port}", grpc.ssl_channel_credentials(authority.cert_pem.bytes(), key, chain)
    )


async def export(channel: grpc.aio.Channel) -> None:
    await metrics_service_pb2_grpc.MetricsServiceStub(channel).Export(GOOD, timeout=60)


async def test_new_connections_see_the_new_certificate_and_requests_under_way_live_on(
    files: TlsFiles, authority: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gate = Gate()
    async with secured(gate, files) as server, channel(server.port, authority) as first:
        before = await asyncio.to_thread(shown_at, server.port, authority)
        assert lines(before) == lines(files.certificate.read_bytes())
        waiting = asyncio.ensure_future(export(first))
        await gate.entered.wait()
        after = authority.issue_cert("localhost", "127.0.0.1")
        install(files, after)
        for _ in range(2):
            assert lines(await asyncio.to_thread(shown_at, server.port, authority)) == lines(pem(after))
        gate.go.set()
        await waiting
        await export(first)  # the old connection goes on
        async with channel(server.port, authority) as second:
            await export(second)
    assert caplog.text.count("new connections are shown the new certificate") == 1
    assert "BEGIN" not in caplog.text


async def test_a_broken_new_pair_is_told_once_and_the_old_one_stays(
    files: TlsFiles, authority: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    good = files.certificate.read_bytes()
    other = authority.issue_cert("localhost")
    private = other.private_key_pem.bytes()
    gate = Gate()
    gate.go.set()
    breaks = {
        "no pair that can be used": lambda: put(files.key, private),
        "is not in PEM format": lambda: put(files.key, b"secret of mine"),
        "cannot be read: No such file": files.key.unlink,
    }
    async with secured(gate, files) as server:
        for said, break_ in breaks.items():
            caplog.clear()
            break_()
            for _ in range(3):
                assert lines(await asyncio.to_thread(shown_at, server.port, authority)) == lines(good)
            [record] = [record for record in caplog.records if "are not used" in record.message]
            assert said in record.message
        # Whole again: a new pair, whose certificate is written first.
        put(files.certificate, pem(other))
        assert lines(await asyncio.to_thread(shown_at, server.port, authority)) == lines(good)
        put(files.key, private)
        assert lines(await asyncio.to_thread(shown_at, server.port, authority)) == lines(pem(other))
    secret = "".join(private.decode().splitlines()[1:-1])
    assert secret[:40] not in caplog.text.replace("\n", "")
    assert "secret of mine" not in caplog.text


def test_what_cannot_be_used_at_the_start_is_a_sentence(files: TlsFiles, authority: trustme.CA) -> None:
    other = authority.issue_cert("localhost")
    original = files.key.read_bytes()
    for content, sentence in [
        (other.private_key_pem.bytes(), "are no pair that can be used"),
        (b"", "is not in PEM format"),
        (b"-----BEGIN PRIVATE KEY-----\nnonsense\n-----END PRIVATE KEY-----\n", "are no pair that can be used"),
    ]:
        files.key.write_bytes(content)
        with pytest.raises(UserError, match=sentence) as refused:
            ServerCertificate(files)
        assert "nonsense" not in str(refused.value)
    files.key.write_bytes(original)
    files.key.with_suffix(".ca").write_bytes(b"-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    with pytest.raises(UserError, match=r"clients' authority \(--tls-client-ca\)"):
        ServerCertificate(replace(files, client_authority=files.key.with_suffix(".ca")))
    assert "BEGIN" not in repr(ServerCertificate(files).current())


def test_a_key_with_a_password_is_refused_and_not_asked_for(files: TlsFiles) -> None:
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"hunter2")
    files.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    with pytest.raises(UserError, match="not encrypted"):
        ServerCertificate(files)


async def test_a_client_certificate_says_the_tenant(
    files: TlsFiles, authority: trustme.CA, store: Store, dsn: str, tmp_path: Path
) -> None:
    clients, strangers = trustme.CA(), trustme.CA()
    (tmp_path / "clients.pem").write_bytes(clients.cert_pem.bytes())
    shop = clients.issue_cert("shop.acme.example")
    unnamed = clients.issue_cert("unnamed.example")
    async with store.transaction() as connection:
        await records.add(connection, "acme-corp", [Scope.WRITE], identity="DNS:Shop.ACME.example")
    mutual = replace(files, client_authority=tmp_path / "clients.pem")
    async with secured(store, mutual, Authenticator(InDatabase(store), closed=True)) as server:
        async with channel(server.port, authority, shop) as connected:
            await export(connected)
        async with channel(server.port, authority, unnamed) as connected:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await export(connected)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "is named for no tenant" in str(caught.value.details())
        for client in (None, strangers.issue_cert("shop.acme.example")):
            async with channel(server.port, authority, client) as connected:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await export(connected)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, "the connection never comes about"
    with psycopg.connect(dsn) as another:
        assert another.execute("SELECT tenant, quantity FROM tallymark.usage_point").fetchall() == [("acme-corp", 5)]


async def test_a_fingerprint_names_one_certificate_and_not_its_successor(
    files: TlsFiles, authority: trustme.CA, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "clients.pem").write_bytes(authority.cert_pem.bytes())
    one, successor = (authority.issue_cert("shop.acme.example") for _ in range(2))
    digest = x509.load_pem_x509_certificate(pem(one)).fingerprint(hashes.SHA256()).hex(":")
    async with store.transaction() as connection:
        await records.add(connection, "acme-corp", [Scope.WRITE], identity=f"sha256:{digest.upper()}")
    mutual = replace(files, client_authority=tmp_path / "clients.pem")
    async with secured(store, mutual, Authenticator(InDatabase(store), closed=True)) as server:
        async with channel(server.port, authority, one) as connected:
            await export(connected)
        async with channel(server.port, authority, successor) as connected:
            with pytest.raises(grpc.aio.AioRpcError, match="is named for no tenant"):
                await export(connected)


async def test_pythons_ssl_follows_the_files_too_authorities_of_clients_included(
    files: TlsFiles, authority: trustme.CA, tmp_path: Path
) -> None:
    old, new = trustme.CA(), trustme.CA()
    mutual = replace(files, client_authority=tmp_path / "clients.pem")
    put(tmp_path / "clients.pem", old.cert_pem.bytes())
    names: asyncio.Queue[tuple[str, ...]] = asyncio.Queue()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("ssl_object")
        names.put_nowait(certificates.of_connection(connection))
        writer.close()

    context = ServerCertificate(mutual).ssl_context("http/1.1")
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    of_old, of_new = old.issue_cert("old.example"), new.issue_cert("new.example")

    async def connect(client: trustme.LeafCert) -> str:
        return await asyncio.to_thread(shown_at, port, authority, alpn="http/1.1", client=client)

    async with server:
        await connect(of_old)
        assert (await names.get())[1:] == ("dns:old.example",)
        after = authority.issue_cert("localhost")
        install(files, after)
        put(tmp_path / "clients.pem", new.cert_pem.bytes())
        assert lines(await connect(of_new)) == lines(pem(after))
        assert (await names.get())[1:] == ("dns:new.example",)
        # With TLS 1.3 a client hears of its refusal after its own handshake: what counts is that nobody was let in.
        with suppress(ssl.SSLError, OSError, ValueError):
            await connect(of_old)
        await connect(of_new)
        assert (await names.get())[1:] == ("dns:new.example",)
    assert names.empty()


def with_uri(authority: trustme.CA, uri: str) -> tuple[bytes, bytes]:
    """The key and the certificate, as PEM, of a client that is named by a URI alone."""
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    signer = serialization.load_pem_private_key(authority.private_key_pem.bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "globex.example")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, certificate.public_bytes(serialization.Encoding.PEM)


async def test_a_uri_names_a_client_and_a_common_name_does_not(
    files: TlsFiles, authority: trustme.CA, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "clients.pem").write_bytes(authority.cert_pem.bytes())
    async with store.transaction() as connection:
        await records.add(connection, "acme-corp", [Scope.WRITE], identity="uri:spiffe://acme.example/shop")
        await records.add(connection, "globex", [Scope.WRITE], identity="dns:globex.example")
    mutual = replace(files, client_authority=tmp_path / "clients.pem")
    async with secured(store, mutual, Authenticator(InDatabase(store), closed=True)) as server:
        for uri, let_in in {"spiffe://acme.example/shop": True, "spiffe://acme.example/Shop": False}.items():
            key, chain = with_uri(authority, uri)
            credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes(), key, chain)
            async with grpc.aio.secure_channel(f"localhost:{server.port}", credentials) as connected:
                if let_in:
                    await export(connected)
                    continue
                with pytest.raises(grpc.aio.AioRpcError, match="is named for no tenant"):
                    await export(connected)
