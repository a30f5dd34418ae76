"""A gRPC server that no call's path can end.

grpcio's server asks the core for calls one after the other, and decodes the path of each whose method it does not know
in that very loop: a path that is not UTF-8 ends the loop, and with it the server. Anybody who can connect could do it,
without a credential. So each method that is offered is registered with the core, which compares bytes and hands its
calls over apart from the others; and of the others, which nobody offers, no path is read: they are UNIMPLEMENTED.

There is no public way to stand between the core and that loop. Where a release of grpcio has what is needed here no
more, its own server is used and the log says so: that one can be ended, and is started again (`receivers.server`).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, TypeAlias, cast

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server

logger = logging.getLogger(__name__)

Methods: TypeAlias = "Mapping[str, grpc.RpcMethodHandler[Any, Any]]"
"""A service's, by name."""
Options: TypeAlias = Sequence[tuple[str, int]]

_NEEDED: Final = ("_request_call", "_request_registered_call", "add_registered_method_handlers")
_GIVEN: Final[Mapping[str, object]] = {
    "thread_pool": None,
    "generic_handlers": (),
    "interceptors": (),
    "options": (),
    "maximum_concurrent_rpcs": None,
    "compression": None,
    "xds": False,
}
"""What grpcio's constructor may ask for. In this order, but for the compression, the compiled server takes it, too."""


def grpc_server(options: Options, services: Mapping[str, Methods]) -> grpc.aio.Server:
    """A server of these services, by name, which has no port yet."""
    asked = [*inspect.signature(_server.Server.__init__).parameters][1:]
    missing = [name for name in _NEEDED if not hasattr(cygrpc.AioServer, name)] + [*({*asked} - {*_GIVEN})]
    if missing:
        logger.warning(
            "this release of grpcio (%s) is not known (%s): a call whose path is not UTF-8 ends its server, which is"
            " started again within a second. Install one that this collector was tested with",
            *(grpc.__version__, ", ".join(missing)),
        )
        plain = grpc.aio.server(options=options)
        plain.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(name, {**methods}) for name, methods in services.items()]
        )
        return plain
    given = {**_GIVEN, "options": tuple(options)}
    server = _Server([given[name] for name in asked if name != "compression"])
    for name, methods in services.items():
        server.add_registered_method_handlers(name, {**methods})
    return cast("grpc.aio.Server", server)  # stubs have another module's


class _Core(cygrpc.AioServer):  # type: ignore[misc] # compiled: there is no type
    """What stands between the core and the methods."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)
        self.answering: set[asyncio.Task[None]] = set()

    async def _request_call(self) -> None:
        """Takes calls of methods that are not registered, until the server ends: then the core's error comes out."""
        while True:
            state = await super()._request_call()
            # The loop keeps no task alive.
            task = asyncio.create_task(_refuse(state))
            self.answering.add(task)
            task.add_done_callback(self.answering.discard)


class _Server(_server.Server):
    """grpcio's, around another core."""

    def __init__(self, given: Sequence[object]) -> None:
        # Of grpcio's own constructor, which makes the compiled server itself.
        self._loop = cygrpc.get_working_loop()
        self._server = _Core(self._loop, *given)


async def _refuse(state: object) -> None:
    context = cygrpc._ServicerContext(state, None, None, asyncio.get_running_loop())
    # It was told; or has gone.
    with suppress(grpc.aio.AbortError, cygrpc.ExecuteBatchError):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
