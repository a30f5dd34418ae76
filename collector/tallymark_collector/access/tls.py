"""What the server shows of itself, and whom it asks for a certificate: read from files, again when they change.

Every new connection looks whether the files are what they were; connections that are there already go on as they began.
A new pair that does not fit, or cannot be read, is told in the log once and the one in use stays: a certificate that is
written before its key is a broken pair for a moment, and none the moment after.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc

from tallymark_collector.errors import UserError
from tallymark_collector.settings import TlsFiles

logger = logging.getLogger(__name__)

WATCH_INTERVAL: Final = 10.0
"""Seconds between looks at the files while nobody connects: for the log, which should not wait for a client."""

_PEM: Final = b"-----BEGIN "


class Pair(NamedTuple):
    """What the files held at one moment, checked."""

    key: bytes
    certificate: bytes
    client_authority: bytes | None
    context: ssl.SSLContext

    def __repr__(self) -> str:
        """Nothing of the key."""
        return "Pair(…)"

    def for_grpc(self) -> grpc.ServerCertificateConfiguration:
        """As gRPC takes it."""
        return grpc.ssl_server_certificate_configuration(
            [(self.key, self.certificate)], root_certificates=self.client_authority
        )


class _Changing(Exception):  # noqa: N818 - no error: somebody is writing the files just now
    """The files changed while they were read."""


class ServerCertificate:
    """The files' last good content. May be asked from any thread: gRPC asks from its own."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises UserError with what is wrong with the files."""
        self._files = files
        self._lock = threading.Lock()
        self._seen = _signature(files)
        try:
            self._pair = _read(files)
        except _Changing:
            raise UserError(f"the TLS files ({files.certificate}, …) change while they are read: start again") from None

    def current(self) -> Pair:
        """What is shown to whoever connects now. Raises nothing."""
        # Somebody else looks already: what was good a moment ago will do.
        if self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._lock.release()
        return self._pair

    def _look(self) -> None:
        try:
            signature = _signature(self._files)
            if signature == self._seen:
                return
            self._pair = _read(self._files)
        except _Changing:
            return  # seen again at the next look
        except UserError as error:
            logger.error("the new TLS files are not used, the ones before stay in use: %s", error)  # noqa: TRY400
        else:
            logger.info("TLS: new connections are shown the new certificate of %s", self._files.certificate)
        self._seen = signature

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`."""
        last = self._pair

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal last
            pair = self.current()
            if pair is last:
                return None
            last = pair
            return pair.for_grpc()

        return grpc.dynamic_ssl_server_credentials(
            last.for_grpc(),
            fetch,  # type: ignore[arg-type] # None is "no change", by gRPC's own documentation
            require_client_authentication=self._files.client_authority is not None,
        )

    def ssl_context(self, *protocols: str) -> ssl.SSLContext:
        """For servers on asyncio; `protocols` are what is offered by ALPN. It follows the files, too."""

        def now() -> ssl.SSLContext:
            context = self.current().context
            context.set_alpn_protocols([*protocols])
            return context

        return _Following(now)


class _Following(ssl.SSLContext):
    """What a server is given for good, where each connection begins with what there is at that moment.

    From its beginning: a context that were only exchanged during the handshake would have resumed a session by then,
    under its own keys, and believe of the client what an authority said that is not trusted any more.
    """

    def __new__(cls, _now: Callable[[], ssl.SSLContext]) -> _Following:
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def __init__(self, now: Callable[[], ssl.SSLContext]) -> None:
        self._now = now

    def wrap_bio(self, *given: Any, **named: Any) -> ssl.SSLObject:
        """As asyncio asks for each connection."""
        return self._now().wrap_bio(*given, **named)


async def keep_certificate(certificate: ServerCertificate, interval: float = WATCH_INTERVAL) -> None:
    """Looks at the files until cancelled, so that a broken new pair is told before a client needs it."""
    while True:
        await asyncio.sleep(interval)
        await asyncio.to_thread(certificate.current)


def _signature(files: TlsFiles) -> tuple[tuple[int, ...] | None, ...]:
    """Tells contents apart without reading them. Symbolic links are followed: that is how mounted secrets change."""
    found: list[tuple[int, ...] | None] = []
    for path in (files.certificate, files.key, files.client_authority):
        try:
            stat = None if path is None else path.stat()
        except OSError:
            stat = None
        found.append(None if stat is None else (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(found)


def _read(files: TlsFiles) -> Pair:
    """Raises UserError, or _Changing. Never says what stands in a file."""
    before = _signature(files)
    certificate = _content(files.certificate, "certificate (--tls-cert)")
    key = _content(files.key, "key (--tls-key)")
    authority = None if files.client_authority is None else _content(files.client_authority, _AUTHORITY)
    try:
        pair = Pair(key, certificate, authority, _context(files))
    finally:
        if _signature(files) != before:
            raise _Changing
    return pair


_AUTHORITY: Final = "clients' authority (--tls-client-ca)"


def _content(path: Path, what: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"the {what} in {path} cannot be read: {error.strerror}") from None
    if _PEM not in content:
        raise UserError(f"the {what} in {path} is not in PEM format: it has no line -----BEGIN …-----")
    return content


def _context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # A key that is encrypted fails on the password instead of asking for one on the terminal.
        context.load_cert_chain(files.certificate, files.key, password=lambda: "")
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise UserError(
            f"the certificate in {files.certificate} and the key in {files.key} are no pair that can be used"
            f" ({reason}): the key must be the certificate's, in PEM format and not encrypted"
        ) from None
    if files.client_authority is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        # Who goes on with a session shows no certificate: one that has ended meanwhile would not be seen.
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
        try:
            context.load_verify_locations(files.client_authority)
        except (ssl.SSLError, OSError) as error:
            reason = getattr(error, "reason", None) or type(error).__name__
            raise UserError(f"the {_AUTHORITY} in {files.client_authority} cannot be used ({reason})") from None
    return context
