"""`grpc.health.v1`, which anybody may ask: what strangers send is read with care.

The question is a service's name. A few of them are read at a time, and briefly, so that strangers who send endless ones
hold little; who comes while they do is not kept waiting and is told of the collector as a whole, which is the same for
each of its services. To watch takes a question that could be read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
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

_States = HealthCheckResponse


class Health:
    """The collector's state, as health checks are told. One event loop owns it."""

    def __init__(self) -> None:
        self._states: dict[str, int] = {}
        self._changed = asyncio.Event()
        """Of the next change."""
        self._ended = False
        self._arriving = Arriving(AT_ONCE, SECONDS)
        self._reading = 0

    def set(self, name: str, *, serving: bool) -> None:
        """Tells those who ask and those who watch, whom nobody waits for."""
        if not self._ended:
            self._become(name, _States.SERVING if serving else _States.NOT_SERVING)

    def end(self) -> None:
        """NOT_SERVING for good. Who watches is told so, and then that it is over: a call that goes on would hold up the
        end of the server."""
        self._ended = True
        for name in self._states:
            self._become(name, _States.NOT_SERVING)
        self._changed.set()

    def _become(self, name: str, state: int) -> None:
        if self._states.get(name) != state:
            self._states[name] = state
            self._changed.set()
            self._changed = asyncio.Event()

    def methods(self) -> Methods:
        """For a gRPC server."""
        answer = HealthCheckResponse.SerializeToString
        return {
            "Check": grpc.stream_unary_rpc_method_handler(self._check, response_serializer=answer),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch, response_serializer=answer),
        }

    async def _check(self, _messages: AsyncIterator[bytes], context: Context) -> HealthCheckResponse:
        asked = await self._question(context)
        state = self._states.get("" if asked is None else asked.service)
        if state is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service here")
        return HealthCheckResponse(status=state)

    async def _watch(self, _messages: AsyncIterator[bytes], context: Context) -> None:
        asked = await self._question(context)
        if asked is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "too many ask at once: ask again")
        await self._tell(asked.service, context)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the collector is stopping")

    async def _tell(self, name: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Each state until the last one; not each of those that followed one another while the client did not read."""
        told: int | None = None
        while True:
            changed, ended = self._changed, self._ended
            state = self._states.get(name, _States.SERVICE_UNKNOWN)
            if state != told:
                told = state
                await context.write(HealthCheckResponse(status=state))
            elif ended:
                return
            else:
                await changed.wait()

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
