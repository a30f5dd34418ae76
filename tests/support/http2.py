"""A client of HTTP/2 that a gRPC client would never be: heads without bodies, bodies without ends.

It keeps to flow control, so it knows how much the server has let it send.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from typing import Final

WAIT: Final = 60
"""Seconds that nothing here takes, on any machine."""
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _WINDOW = 0, 1, 3, 4, 6, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame of HTTP/2 (RFC 9113)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(_SETTINGS, 0, 0)


def announced(size: int) -> bytes:
    """How a gRPC message of that many bytes begins."""
    return b"\0" + struct.pack(">I", size)


class Connection:
    """One connection; calls are told apart by their streams' odd numbers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.sent: dict[int, int] = {}
        """Bytes of each call's body."""
        self.closed = asyncio.Event()
        """Set once the server has closed the connection."""
        self._reader, self._writer = reader, writer
        self._room, self._initial = 65_535, 65_535
        self._rooms: dict[int, int] = {}
        self._ends: dict[int, bytes] = {}
        self._asked, self._answered = 1, 0  # the preface asks, too
        self._changed = asyncio.Condition()

    def call(self, path: str, *headers: tuple[str, str], end: bool = False) -> int:
        """Sends a call's head; returns its stream."""
        stream = 2 * len(self.sent) + 1
        said = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"), ("te", "trailers")]
        said += [("content-type", "application/grpc"), *headers]
        pairs = [(name.encode(), value.encode(errors="surrogateescape")) for name, value in said]
        block = b"".join(b"\0%c%s%c%s" % (len(name), name, len(value), value) for name, value in pairs)
        self.sent[stream], self._rooms[stream] = 0, self._initial
        self._writer.write(frame(_HEADERS, _END_HEADERS | end, stream, block))
        return stream

    def says(self, frame: bytes) -> None:
        """Sends a frame of one's own."""
        self._writer.write(frame)

    async def send(self, stream: int, body: bytes, *, end: bool = False) -> None:
        """Sends all of it, as fast as the server lets it."""
        while body:
            async with self._changed:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._may_send(stream) > 0), WAIT)
            piece = body[: self._may_send(stream)]
            body = body[len(piece) :]
            self._push(stream, piece, end=end and not body)

    async def push(self, stream: int, body: bytes) -> None:
        """Sends of it what the server lets through, which has had time to think about it."""
        for _ in range(20):
            while body and (fits := self._may_send(stream)) > 0:
                self._push(stream, body[:fits])
                body = body[fits:]
            await self.heard()

    async def heard(self) -> None:
        """Returns once the server has taken note of all that was sent before. Not by a ping: many are an offence."""
        self._asked += 1
        self._writer.write(frame(_SETTINGS, 0, 0))
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(lambda: self._answered >= self._asked), WAIT)

    async def status(self, stream: int) -> str:
        """The call's gRPC status once the server has ended it, "" where it was cut off. What a connection has
        told before, it may tell by a number (HPACK), which is not read here."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(lambda: stream in self._ends), WAIT)
        _, _, after = self._ends[stream].partition(b"\x0bgrpc-status")
        return after[1 : 1 + after[0]].decode() if after else ""

    def ended(self, stream: int) -> bool:
        """True once the server has ended the call."""
        return stream in self._ends

    def _may_send(self, stream: int) -> int:
        return min(self._room, self._rooms[stream], 16_384)

    def _push(self, stream: int, piece: bytes, *, end: bool = False) -> None:
        self._room -= len(piece)
        self._rooms[stream] -= len(piece)
        self.sent[stream] += len(piece)
        self._writer.write(frame(_DATA, _END_STREAM if end else 0, stream, piece))

    async def listen(self) -> None:
        """Takes what the server says until it closes the connection."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                self._hear(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
                async with self._changed:
                    self._changed.notify_all()
        self.closed.set()

    def _hear(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == 4:
                    for known in self._rooms:
                        self._rooms[known] += value - self._initial
                    self._initial = value
            self._writer.write(frame(_SETTINGS, _ACK, 0))
        elif kind == _SETTINGS:
            self._answered += 1
        elif kind == _PING:
            self._writer.write(frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW and stream:
            self._rooms[stream] += struct.unpack(">I", payload)[0]
        elif kind == _WINDOW:
            self._room += struct.unpack(">I", payload)[0]
        elif kind == _HEADERS and flags & _END_STREAM:
            self._ends.setdefault(stream, payload)
        elif kind == _RST:
            self._ends.setdefault(stream, b"")


@contextlib.asynccontextmanager
async def dialled(port: int) -> AsyncIterator[Connection]:
    """A connection to a server, which has said its settings."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found = Connection(reader, writer)
    listening = asyncio.create_task(found.listen())
    writer.write(PREFACE)
    try:
        await found.heard()
        yield found
    finally:
        writer.close()
        await listening
