"""From a gRPC call to a method of ours and back: who asks, one message, one answer.

As with OTLP (`receivers.otlp_grpc`) the message is read once it is known whose it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import grpc
import psycopg
from google.protobuf.message import DecodeError, Message

from tallymark_collector.access import Authenticator, Principal, certificates
from tallymark_collector.access.requests import authorization_of
from tallymark_collector.api.reading import Readers, kind_of
from tallymark_collector.errors import MalformedRequest, NotPossible, Unauthenticated, UserError
from tallymark_collector.receivers import grpc_calls
from tallymark_collector.receivers.admission import Admission, Share
from tallymark_collector.receivers.arriving import Arriving, Context
from tallymark_collector.receivers.decompression import unfolded
from tallymark_collector.receivers.grpc_server import Methods
from tallymark_collector.telemetry.requests import Call, Requests, arrived

MAX_REQUEST: Final = 256 * 1024
"""Bytes of a request: room for where a page goes on, which holds up to four attributes."""

Asked = TypeVar("Asked", bound=Message)


@dataclass(frozen=True, slots=True)
class Method(Generic[Asked]):
    """A method of a service."""

    name: str
    request: type[Asked]
    answer: Callable[[Principal, Asked], Awaitable[Message]]
    """Has to ask whether the principal may. Raises what `receivers.status` knows."""
    administers: bool = False
    """True if only administrators may."""


@dataclass(frozen=True, slots=True)
class Calls:
    """What every call passes."""

    authenticator: Authenticator
    readers: Readers
    admission: Admission
    arriving: Arriving
    """By tenant and kind of call."""
    requests: Requests

    def methods(self, signal: str, methods: Sequence[Method[Any]]) -> Methods:
        """A service's, for a gRPC server; their calls are counted as `signal`."""
        return {method.name: self._handler(signal, method) for method in methods}

    def _handler(self, signal: str, method: Method[Any]) -> grpc.RpcMethodHandler[Any, Any]:
        async def take(context: Context, call: Call) -> None:
            principal = await self._principal(context)
            call.tenant = principal.tenant
            kind = kind_of(principal, administers=method.administers)
            with (
                self.readers.place(principal, administers=method.administers),
                Share(self.admission, principal.tenant) as share,
            ):
                async with self.readers.alone(principal):
                    message = await self.arriving.message(f"{principal.tenant} {kind.value}", context)
                request = await unfolded(message, MAX_REQUEST, share.take)
                arrived(len(request))
                try:
                    answer = await method.answer(principal, _read(method.request, request))
                except psycopg.errors.InsufficientPrivilege as error:
                    raise NotPossible(_NO_RIGHT.format(error.diag.message_primary)) from None
                written = answer.SerializeToString()
                share.take(len(written))
                # As long as the client takes to read it: until then its bytes are here, and have to be counted.
                await context.write(written)
            call.committed(partial=False)

        return grpc_calls.delivering(self.requests, signal, take)

    async def _principal(self, context: Context) -> Principal:
        """Who asks. Raises Unauthenticated for nobody in particular: what is stored is not for strangers, wherever the
        collector listens."""
        shown = certificates.of_call(context.auth_context())
        authorization = authorization_of(context.invocation_metadata() or ())
        principal = await self.authenticator.authenticate(authorization, shown)
        if not principal.credential:
            raise Unauthenticated(
                "this takes a credential: send the header `authorization: Bearer <token>`; `tallymark tokens create"
                " --scope read` makes a token"
            )
        return principal


_NO_RIGHT: Final = (
    "the database user that this collector works as may not do this ({}): give it the right (docs/api.md), or use the"
    " command line as the schema's owner"
)


def _read(kind: type[Message], request: bytes) -> Message:
    try:
        message = kind.FromString(request)
    except DecodeError as error:
        raise MalformedRequest(f"the request is no {kind.DESCRIPTOR.full_name}: {error}") from None
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING and "\0" in "".join(value):  # one, or several
            raise UserError(f"{field.name} holds a NUL character, which is in no text that is stored")
    return message
