"""The message of a gRPC call, read once it is known whose it is.

A unary handler of gRPC's is called when the message is there, all of it, whoever sends it. On the wire a call with one
message and a stream of messages look the same; so what should be unary here is a stream to gRPC: its handler is called
with the call's metadata, before a byte of the message is read, and reads one message. Until then gRPC keeps what fits
into the call's flow-control window (`settings.Connections.window`), and takes no more.

gRPC says nothing of a message until it is whole, so it cannot be counted as it arrives. What is bounded is how many of
one tenant arrive at once, and for how long: `arriving` times the largest message that gRPC takes is what a tenant can
make this process keep uncounted, and only its own other calls wait for it.

That largest message is `LEEWAY` more than a request may have. What gRPC refuses it ends itself, in words of its own,
and here there is no message and no reason, as where the client hung up: nobody could tell what was refused. So what is
only somewhat too large is let in whole, and refused where it is unfolded (`receivers.decompression`). For the same
reason gRPC is told to leave messages compressed as they come.
"""

from __future__ import annotations

import asyncio
from typing import Final
from weakref import WeakValueDictionary

import grpc

from tallymark_collector.deadline import Deadline
from tallymark_collector.errors import MalformedRequest, SlowBody
from tallymark_collector.telemetry import requests

LEEWAY: Final = 0.25
"""Of the largest request: what a message may have beyond it and still be refused by us, with our reason."""
END_SECONDS: Final = 1.0
"""What gRPC has to tell that a call is over of which it gave no message; it does so at once."""

Context = grpc.aio.ServicerContext[bytes, bytes]


class Arriving:
    """Messages that arrive. One event loop owns it."""

    def __init__(self, at_once: int, seconds: float) -> None:
        """`at_once` messages of each tenant; `seconds` for each, its wait for a turn included."""
        self._at_once = at_once
        self._seconds = seconds
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def message(self, tenant: str, context: Context) -> bytes:
        """The call's message, compressed where it came so. Raises SlowBody, and MalformedRequest where the client ended
        its side before; where the call itself broke off the task is cancelled and the request counted as `BrokenOff`.
        """
        try:
            message = await self.read(tenant, context)
            if message is not None:
                return message
            await asyncio.sleep(END_SECONDS)
        except asyncio.CancelledError:
            requests.broke_off()
            raise
        raise MalformedRequest("the call ended before its message did")

    async def read(self, tenant: str, context: Context) -> bytes | None:
        """The call's next message, compressed where it came so; None where there is none any more. Raises SlowBody."""
        turns = self._turns.get(tenant)
        if turns is None:
            turns = self._turns[tenant] = asyncio.Semaphore(self._at_once)
        with Deadline(self._seconds, self._too_slow):
            async with turns:
                message = await context.read()
        return message if isinstance(message, bytes) else None

    def _too_slow(self) -> SlowBody:
        return SlowBody(f"the message did not arrive within {self._seconds:g} s")


def most_bytes(request_bytes: int) -> int:
    """Of a message, as gRPC is told."""
    return request_bytes + int(request_bytes * LEEWAY)
