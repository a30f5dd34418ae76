"""gRPC's server reflection, by which `grpcurl` learns which services there are: for who may send usage.

gRPC reads a message whole before anybody may refuse it, and of any call as much as of one with usage. So nothing is
read of strangers, and of a tenant a few small questions at a time, apart from what it sends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Final

import grpc
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from tallymark_collector.access import certificates
from tallymark_collector.access.requests import TenantOf
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.receivers import status
from tallymark_collector.receivers.arriving import Arriving, Context
from tallymark_collector.receivers.decompression import unfolded
from tallymark_collector.receivers.grpc_server import Methods

NAME: Final = reflection.SERVICE_NAME

AT_ONCE: Final = 4
"""Questions of one tenant that are read at the same time; further ones wait."""
SECONDS: Final = 30.0
"""How long the next question of a call may take to arrive."""
MAX_BYTES: Final = 4096
"""Of a question: the names in it are shorter."""


class Reflection:
    """Answers questions about the services of these names, and itself."""

    def __init__(self, names: Sequence[str], tenant_of: TenantOf) -> None:
        self._known = reflection.aio.ReflectionServicer([*names, reflection.SERVICE_NAME])
        self._tenant_of = tenant_of
        self._arriving = Arriving(AT_ONCE, SECONDS)

    def methods(self) -> Methods:
        """For a gRPC server."""
        return {
            "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
                self._info, response_serializer=ServerReflectionResponse.SerializeToString
            )
        }

    async def _info(self, _messages: AsyncIterator[bytes], context: Context) -> None:
        refused = await self._answer(context)
        if refused is not None:
            await context.abort(*refused)

    async def _answer(self, context: Context) -> status.Answer | None:
        try:
            shown = certificates.of_call(context.auth_context())
            tenant = await self._tenant_of(context.invocation_metadata() or (), shown)
            async for answer in self._known.ServerReflectionInfo(self._questions(tenant, context), context):
                await context.write(answer)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            return status.answer(error)
        return None

    async def _questions(self, tenant: str, context: Context) -> AsyncIterator[ServerReflectionRequest]:
        """Until the client has no more. Raises SlowBody, MalformedRequest, TooLarge."""
        while (message := await self._arriving.read(tenant, context)) is not None:
            try:
                yield ServerReflectionRequest.FromString(await unfolded(message, MAX_BYTES))
            except DecodeError as error:
                raise MalformedRequest(f"not a ServerReflectionRequest: {error}") from None
