"""Inputs on the wire: calls over gRPC, raw HTTP/1.1 and raw HTTP/2, whole and damaged."""

from __future__ import annotations

import gzip
import random
import socket
import struct
import time
from contextlib import suppress
from typing import Final, NamedTuple

from tests.delivery.fuzz.mutation import Input, cut, flip

_TYPES: Final = {"protobuf": "application/x-protobuf", "json": "application/json"}
_METHODS: Final = {
    "metrics": "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
    "traces": "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    "logs": "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
}
ANSWER_S: Final = 30.0
"""Longer than an answer may take on a machine that is busy."""
IMPATIENT_S: Final = 0.05
"""After what is damaged may be unfinished: nobody knows whether there is an answer to wait for."""


class Wire(NamedTuple):
    """Bytes for a socket."""

    data: bytes
    whole: bool
    """An answer has to come."""
    how: str


def method(signal: str) -> str:
    """gRPC's name of a signal's Export."""
    return _METHODS[signal]


def http(given: Input, seed: int) -> Wire:
    """The input as an HTTP/1.1 request, of which the body's wrapping or the head may be damaged as well."""
    rng = random.Random(f"{seed}/{given.number}/http")
    body, headers, whole, how = given.body, [f"Content-Type: {_TYPES[given.media]}"], True, "HTTP"
    if rng.random() < 0.3:
        body, how = gzip.compress(body, 1, mtime=0), "HTTP, gzip"
        headers.append("Content-Encoding: gzip")
        if rng.random() < 0.5:
            damage = rng.choice((flip, cut, _more))
            body, how = damage(rng, body), "HTTP, damaged gzip"
    if rng.random() < 0.3:
        headers.append("Transfer-Encoding: chunked")
        body, whole = _chunked(rng, body)
        how = how if whole else f"{how}, cut chunks"
    else:
        length = len(body)
        if rng.random() < 0.1:
            length, whole, how = rng.choice((0, length + 1, max(0, length - 1), 2**63, 10**30)), False, "HTTP, length"
        headers.append(f"Content-Length: {length}")
    head = "\r\n".join([f"POST /v1/{given.signal} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]).encode()
    if rng.random() < 0.15:
        head, whole, how = _damaged_head(rng, head), False, "HTTP, damaged head"
    return Wire(head + body, whole, how)


def _more(rng: random.Random, body: bytes) -> bytes:
    return body + rng.choice((b"\0", body, rng.randbytes(5), gzip.compress(b"", mtime=0)))


def _chunked(rng: random.Random, body: bytes) -> tuple[bytes, bool]:
    pieces = []
    while body:
        size = rng.randint(1, len(body))
        pieces.append(b"%x\r\n%s\r\n" % (size, body[:size]))
        body = body[size:]
    pieces.append(b"0\r\n\r\n")
    found = b"".join(pieces)
    if rng.random() < 0.5:
        return found, True
    return rng.choice((flip, cut))(rng, found), False


_STRANGE: Final = (
    *(
        b"GET",
        b"OPTIONS",
        b"CONNECT",
        b"PRI",
        b"\xff",
        b"POST /v1/metrics/../traces",
        b"%",
        b"//",
        b"HTTP/1.0",
        b"HTTP/2",
    ),
    *(b"Expect: 100-continue\r\n", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Transfer-Encoding: gzip\r\n"),
    *(b"Content-Encoding: br\r\n", b"Content-Encoding: \xff\r\n", b"Content-Type: application/json; charset=\xe4\r\n"),
    *(b"Content-Type: text/plain\r\n", b"Upgrade: h2c\r\n", b"Upgrade: websocket\r\n", b"X: " + b"y" * 9000 + b"\r\n"),
    *(b"A: b\r\n" * 200, b"\0", b"\r", b"\n", b"\r\n\r\n", b": \r\n", b"Transfer-Encoding: chunked, chunked\r\n"),
)


def _damaged_head(rng: random.Random, head: bytes) -> bytes:
    if rng.random() < 0.4:
        return flip(rng, head) if rng.random() < 0.7 else cut(rng, head)
    lines = head.split(b"\r\n")
    strange = rng.choice(_STRANGE)
    if strange.endswith(b"\r\n"):
        lines.insert(rng.randint(1, len(lines) - 2), strange[:-2])
    else:
        words = lines[0].split(b" ")
        words[rng.randrange(3)] = strange
        lines[0] = b" ".join(words)
    return b"\r\n".join(lines)


def http2(given: Input, seed: int) -> Wire:
    """The input as a call in HTTP/2's frames, written by hand and then damaged."""
    rng = random.Random(f"{seed}/{given.number}/http2")
    headers = b"".join(
        _literal(name, value)
        for name, value in (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", method(given.signal).encode()),
            (b":authority", b"x"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            *([(b"grpc-timeout", rng.choice((b"1S", b"0n", b"99999999H", b"-1S", b"x")))] * (rng.random() < 0.3)),
            *([(b"grpc-encoding", rng.choice((b"gzip", b"deflate", b"br", b"")))] * (rng.random() < 0.3)),
            *([(b"x-bin", rng.choice((b"????", b"AAA", b"\xff")))] * (rng.random() < 0.3)),
        )
    )
    flags = rng.choice((0, 0, 0, 1))
    message = struct.pack(">BI", flags, len(given.body)) + given.body
    frames = [_frame(4, 0, 0, b""), _frame(1, 4, 1, headers), _frame(0, 1, 1, message)]
    match rng.randrange(6):
        case 0:
            frames.insert(
                rng.randint(0, 3),
                _frame(rng.randrange(12), rng.randrange(256), rng.choice((0, 1, 2, 3)), rng.randbytes(8)),
            )
        case 1:
            rng.shuffle(frames)
        case 2:
            frames *= 2
        case 3:
            frames = frames[: rng.randrange(3)]
    data = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"".join(frames)
    if rng.random() < 0.6:
        data = rng.choice((flip, cut))(rng, data)
    return Wire(data, False, "HTTP/2 frames")


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def exchange(port: int, wire: Wire) -> bytes:
    """What the server answers; b"" where it hangs up."""
    found = bytearray()
    with _connected(port) as connection, suppress(ConnectionError):
        connection.sendall(wire.data)
        connection.settimeout(ANSWER_S if wire.whole else IMPATIENT_S)
        while True:
            try:
                piece = connection.recv(65536)
            except TimeoutError:
                if wire.whole:
                    raise
                break
            if not piece:
                break
            found += piece
    return bytes(found)


def _connected(port: int) -> socket.socket:
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), ANSWER_S)
        except ConnectionRefusedError:
            # It may be listening again after frames that gRPC's own loop died of.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
