"""A gRPC call of one message and one answer, whatever it is about: counted, and ended with a status where it fails.

To gRPC it is a stream of messages, so that what it is about can say whose it is before its message is read
(`receivers.arriving`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc

from tallymark_collector.receivers import status
from tallymark_collector.receivers.arriving import Context
from tallymark_collector.telemetry.requests import Call, Requests, traceparent_of

T = TypeVar("T")
Take: TypeAlias = "Callable[[Context, Call], Awaitable[T]]"
"""Reads the message and gives the answer, or writes it itself; tells the call how it went. Raises what
`receivers.status` knows."""


def method(requests: Requests, signal: str, take: Take[bytes]) -> grpc.RpcMethodHandler[Any, Any]:
    """A method of a service; its calls are counted as `signal`.

    For small answers: gRPC keeps one until the client reads it, whenever that is, and tells nobody.
    """

    async def call(_messages: AsyncIterator[bytes], context: Context) -> bytes:
        with requests.call("grpc", signal, traceparent_of(context.invocation_metadata())) as known:
            answer = await _answer(take, context, known)
            if not isinstance(answer, bytes):
                # From here, where nothing of the request is left: gRPC keeps the error that ends a call in a cycle with
                # the frames that it passed through, and what it came from.
                await context.abort(*answer)
            return answer

    return grpc.stream_unary_rpc_method_handler(call)


def delivering(requests: Requests, signal: str, take: Take[None]) -> grpc.RpcMethodHandler[Any, Any]:
    """The same of a method that writes its one answer itself (`context.write`).

    That waits until the client has room for it. gRPC keeps what was written even where the call is ended meanwhile, so
    whoever is to bound it has to wait as long.
    """

    async def call(_messages: AsyncIterator[bytes], context: Context) -> None:
        with requests.call("grpc", signal, traceparent_of(context.invocation_metadata())) as known:
            refused: status.Answer | None = await _answer(take, context, known)
            if refused is not None:
                await context.abort(*refused)

    return grpc.stream_stream_rpc_method_handler(call)


async def _answer(take: Take[T], context: Context, call: Call) -> T | status.Answer:
    try:
        return await take(context, call)
    except asyncio.CancelledError:
        # The client hung up, or the server stops. Whatever was committed, the retry will be a duplicate.
        raise
    except Exception as error:
        refused = status.answer(error)
        call.refused(refused.code.name, error)
        return refused
