"""`grpc.health.v1`, which anybody may ask: what strangers send is read with care.

The question is a service's name. A few of them are read at a time, and briefly, so that strangers who send endless ones
hold little; who comes while they do is not kept waiting and is told of the collector as a whole, which is the same for
each of its services. To watch takes a question that could be read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from tallymark_collector.errors import CollectorError
from tallymark_collector.receivers.arriving import Arriving, Context
from tallymark_collector.receivers.decompression import unfolded
from tallymark_collector.receivers.grpc_server import Methods

AT_ONCE: Final = 4
"""Questions that are read at the same time, each of which may have as many bytes as a request."""
SECONDS: Final = 1.0
"""How long one may take to arrive."""
MAX_BYTES: Final = 1024
"""Of one that is looked at."""


class Health:
    """The collector's state, as health checks are told."""

    def __init__(self) -> None:
        self._known = health.aio.HealthServicer()
        self._arriving = Arriving(AT_ONCE, SECONDS)
        self._reading = 0

    async def set(self, name: str, *, serving: bool) -> None:
        """Tells those who ask and those who watch."""
        states = HealthCheckResponse
        await self._known.set(name, states.SERVING if serving else states.NOT_SERVING)

    async def end(self) -> None:
        """NOT_SERVING for good."""
        await self._known.enter_graceful_shutdown()

    def methods(self) -> Methods:
        """For a gRPC server."""
        answer = HealthCheckResponse.SerializeToString
        return {
            "Check": grpc.stream_unary_rpc_method_handler(self._check, response_serializer=answer),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch, response_serializer=answer),
        }

    async def _check(self, _messages: AsyncIterator[bytes], context: Context) -> HealthCheckResponse:
        asked = await self._question(context)
        return await self._known.Check(HealthCheckRequest() if asked is None else asked, context)

    async def _watch(self, _messages: AsyncIterator[bytes], context: Context) -> None:
        asked = await self._question(context)
        if asked is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "too many ask at once: ask again")
        await self._known.Watch(asked, context)

    async def _question(self, context: Context) -> HealthCheckRequest | None:
        """What is asked; None where others are being read."""
        if self._reading >= AT_ONCE:
            return None
        self._reading += 1
        try:
            message = await self._arriving.message("", context)
            return HealthCheckRequest.FromString(await unfolded(message, MAX_BYTES))
        except (CollectorError, DecodeError) as error:
            why = str(error)
        finally:
            self._reading -= 1
        return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, why)
