"""An HTTP server between clients and the collector: what passes goes into the ledger. Bodies are handed on as they
came, chunked or not, compressed or not."""

from __future__ import annotations

import gzip
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.interop.fates import Fate, Seeded
from tests.interop.ledger import Ledger

PATIENCE_S = 30.0


class HttpRelay:
    """Runs from its making to `close`."""

    def __init__(self, target: int, fates: Seeded) -> None:
        self.ledger = Ledger()
        self.fates = fates
        self.target = target
        self.under_way = 0
        self.problems: list[str] = []
        self.changed = threading.Condition()

        relay = self

        class Handler(_Handler):
            owner = relay

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Also what nobody waits for any more is handed on before: a client may have given up on a late request."""
        self._server.shutdown()
        with self.changed:
            assert self.changed.wait_for(lambda: not self.under_way, PATIENCE_S)
        assert not self.problems
        self._thread.join(20)
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # clients keep connections open

    def handle_error(self, request: object, client_address: object) -> None:
        """What went wrong is among the relay's problems."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: HttpRelay

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Says nothing."""

    def do_POST(self) -> None:
        self._count(1)
        try:
            self._relay()
        except ConnectionError:
            pass  # a client that hangs up is no news
        except Exception as error:
            self.owner.problems.append(repr(error))
            raise
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self.owner.changed:
            self.owner.under_way += change
            self.owner.changed.notify_all()

    def _relay(self) -> None:
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        body = b"".join(self._chunks()) if chunked else self.rfile.read(int(self.headers["Content-Length"]))
        compressed = self.headers.get("Content-Encoding") == "gzip"
        plain = gzip.decompress(body) if compressed else body
        signal = self.path.rsplit("/", 1)[-1]
        fate = self.owner.fates.of(signal, plain)
        if fate is Fate.LATE:
            time.sleep(self.owner.fates.delay())
        status, headers, answer = 503, [], b""
        if fate not in (Fate.REFUSED, Fate.CUT):
            status, headers, answer = self._forward(body, chunked)
            if status == 200:
                ledger = self.owner.ledger
                ledger.take(signal, plain, self.headers.get("Content-Type", "").startswith("application/json"))
                ledger.seen["chunked"] += chunked
                ledger.seen["compressed"] += compressed
        if fate in (Fate.CUT, Fate.CUT_AFTER):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fate in (Fate.REFUSED, Fate.LOST):
            status, answer = 503, b""
            headers = [("Retry-After", "0")] if self.owner.fates.says_when() else []
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline() not in (b"\r\n", b"\n", b""):
            pass

    def _forward(self, body: bytes, chunked: bool) -> tuple[int, list[tuple[str, str]], bytes]:
        kept = ("content-type", "content-encoding", "user-agent", "authorization")
        headers = {name: value for name, value in self.headers.items() if name.lower() in kept}
        connection = http.client.HTTPConnection("127.0.0.1", self.owner.target, timeout=PATIENCE_S)
        try:
            if chunked:
                headers["Transfer-Encoding"] = "chunked"
                parts = (body[at : at + 1000] for at in range(0, len(body), 1000))
                connection.request("POST", self.path, parts, headers, encode_chunked=True)
            else:
                connection.request("POST", self.path, body, headers)
            response = connection.getresponse()
            answer = response.read()
            back = ("content-type", "content-encoding", "retry-after")
            return response.status, [(n, v) for n, v in response.getheaders() if n.lower() in back], answer
        finally:
            connection.close()
