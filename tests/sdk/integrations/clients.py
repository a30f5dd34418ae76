"""Clients that count for themselves, and servers that have ended when their block has."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from tallymark.testing import Captured

NAMES = ("http.request.method", "http.route", "http.response.status_code", "error.type")
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What the client has seen: `size` is the length of the body that it read, `sent` of the one that it sent."""

    status: int
    size: int
    sent: int = 0
    body: bytes = b""


def call(port: int, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.connect()
        with connection.sock.dup() as left_open:
            connection.request(method, path, body, {**headers, "Connection": "close"})
            response = connection.getresponse()
            content = response.read()
            # Werkzeug sends the body of an answer to a HEAD, too: a client that has gone by then has broken it off.
            while left_open.recv(65536):
                pass
        return Answer(response.status, len(content), len(body or b""), content)
    finally:
        connection.close()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> int:
    return call(port, path, method, **headers).status


def leave_midway(port: int, path: str, after: int, **headers: str) -> int:
    """Reads until `after` bytes of the answer have come, head included, then goes away; how many came."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        lines = [f"GET {path} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in headers.items())]
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        read = 0
        while read < after:
            read += len(connection.recv(65536))
        return read


def rows(usage: Captured, meter: str | None = None) -> dict[tuple[Any, ...], Any]:
    """(account, method, route, status, error type) -> quantity"""
    return {
        (u.account, *(u.attributes.get(name) for name in NAMES)): u.quantity for u in usage if meter in (None, u.meter)
    }


def by_header(scope: Any) -> dict[str, str] | None:
    account = dict(scope["headers"]).get(b"account")
    return None if account is None else {"account": account.decode()}


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


@contextmanager
def uvicorn_serving(app: Any, **kwargs: Any) -> Iterator[int]:
    """The port of an application under uvicorn; at the end every request has ended."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = {"log_level": "critical", "ws": "none", "lifespan": "off", **kwargs}
        server = uvicorn.Server(uvicorn.Config(app, **config))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            eventually(lambda: server.started)
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
