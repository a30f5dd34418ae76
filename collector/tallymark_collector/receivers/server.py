"""The servers: OTLP and `grpc.health.v1` over gRPC, OTLP over HTTP, started, watched and drained together."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Final

import grpc
from grpc_health.v1 import health

from tallymark_collector.access.requests import TenantOf, anybody
from tallymark_collector.access.tls import ServerCertificate
from tallymark_collector.errors import UserError
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.receivers import otlp_grpc
from tallymark_collector.receivers.admission import Admission
from tallymark_collector.receivers.arriving import Arriving, most_bytes
from tallymark_collector.receivers.grpc_health import Health
from tallymark_collector.receivers.grpc_reflection import NAME as REFLECTION
from tallymark_collector.receivers.grpc_reflection import Reflection
from tallymark_collector.receivers.grpc_server import Methods, grpc_server
from tallymark_collector.receivers.http_server import HttpServer
from tallymark_collector.receivers.listening import Ears, Port, check_free, listen
from tallymark_collector.receivers.otlp import Accepted, nothing, services
from tallymark_collector.receivers.otlp_http import Receiver
from tallymark_collector.receivers.readiness import ASK_TIMEOUT, Ask, Readiness, keep_asking
from tallymark_collector.settings import Connections, Limits, Settings
from tallymark_collector.telemetry.requests import Requests

logger = logging.getLogger(__name__)

LOOK: Final = 0.25
"""Seconds between looks at whether gRPC still listens."""

Listen = Callable[[int, Mapping[str, Methods]], tuple[grpc.aio.Server, int]]
"""From a port, 0 for a free one, and services beside the others, to a gRPC server that has bound the port and was not
started, and the port. Raises UserError where it is taken."""


class Server:
    """Running servers."""

    def __init__(self, listen: Listen, port: int, names: list[str], reflection: Reflection | None = None) -> None:
        """Raises UserError where the port is taken."""
        self._listen = listen
        self._health = Health()
        self._own = {health.SERVICE_NAME: self._health.methods()}
        if reflection is not None:
            self._own[REFLECTION] = reflection.methods()
        self._server, self.port = listen(port, self._own)
        """The port that is listened on; of interest where 0 was asked for."""
        self.http_port: int | None = None
        """The same of HTTP; None without it."""
        self.admin_port: int | None = None
        """The same of health and metrics, which are no part of this."""
        self.readiness = Readiness()
        """Whether usage is taken, as health checks are told."""
        self._before: list[grpc.aio.Server] = []
        """Those that nobody reaches any more; calls may be under way in them."""
        self.restarts = 0
        """How often gRPC was started again because nobody listened any more."""
        self._names = names
        self._http: HttpServer | None = None
        self._drained = asyncio.ensure_future(self.readiness.drained.wait())

    async def start(self) -> None:
        """Takes requests from now on."""
        await self.tell()
        await self._server.start()

    async def keep_listening(self, deaf: Callable[[], bool]) -> None:
        """Until the collector drains: where gRPC has given its server up, listens again on the same port. `deaf` tells
        whether nobody listens; it is called in a thread.

        Any error in gRPC's own loop ends its server; `receivers.grpc_server` keeps away the one that is known. gRPC
        may tell so only when the connection that it came from has ended, which is up to the client; so it is the port
        that is looked at.
        """
        while not self.readiness.draining:
            await asyncio.wait({self._drained}, timeout=LOOK)
            try:
                nobody_listens = await asyncio.to_thread(deaf)
            except OSError as error:  # short of open files, say: the next look may find some
                logger.warning("whether anybody listens on port %s cannot be told now: %s", self.port, error)
                continue
            if nobody_listens and not self.readiness.draining:
                logger.error("nobody listens on port %s: the gRPC server is started again", self.port)
                await self._start_again()

    async def _start_again(self) -> None:
        self.readiness.hears(everybody=False)
        try:
            self._before.append(self._server)
            self._server, _ = self._listen(self.port, self._own)
            await self._server.start()
            self.readiness.hears(everybody=True)
            self.restarts += 1
        except Exception:
            logger.exception("the gRPC server could not be started again; the next try is in %s s", LOOK)
        await self.tell()
        if self.readiness.draining:  # the other one was stopped meanwhile
            await self._server.stop(None)

    async def start_http(self, http: HttpServer, sockets: list[socket.socket], tls: ssl.SSLContext | None) -> None:
        """Takes requests over HTTP, too."""
        self._http = http
        self.http_port = sockets[0].getsockname()[1]
        await http.start(sockets, tls)

    async def tell(self) -> None:
        """Lets health checks know the state."""
        for name in self._names:
            self._health.set(name, serving=self.readiness.serving)

    async def drain(self, seconds: float) -> None:
        """Says NOT_SERVING, takes no new requests, finishes those under way, at most that long."""
        self.readiness.drain()
        self._health.end()
        servers = (self._server, *self._before)
        await asyncio.gather(*(one.stop(seconds) for one in servers), *([self._http.drain()] if self._http else []))


@asynccontextmanager
async def serving(
    pipeline: Pipeline,
    settings: Settings,
    *,
    ask: Ask | None = None,
    accepted: Accepted = nothing,
    tenant_of: TenantOf = anybody,
    certificate: ServerCertificate | None = None,
    requests: Requests | None = None,
    admission: Admission | None = None,
    others: Mapping[str, Methods] = MappingProxyType({}),
) -> AsyncIterator[Server]:
    """Servers that run while the context lasts and are drained at its end. Raises UserError where they cannot listen.

    `ask` is asked about the database for health checks, `accepted` is told of each request that was committed.
    `tenant_of` says whose usage a request is (`access.requests`); health may be asked by anybody who can connect. With
    a `certificate` nobody connects without TLS. `requests` counts how requests end, `admission` bounds those under way;
    both are made where they are left out. `others` are the methods of gRPC services beside OTLP's, by name.
    """
    limits = settings.limits
    admission = admission or Admission(limits.in_flight_bytes, limits.retry_after)
    arriving = Arriving(settings.connections.arriving, limits.body_seconds)
    requests = requests or Requests()
    offered = services(pipeline, accepted)
    # First: a gRPC server that was never started would keep its port.
    shared = settings.shares_ports
    sockets = [] if settings.http_port is None else listen(settings.host, settings.http_port, shared=shared)

    of_otlp = {
        service.name: otlp_grpc.methods(service, tenant_of, admission, arriving, requests, limits.request_bytes)
        for service in offered
    }

    def listen_grpc(port: int, own: Mapping[str, Methods]) -> tuple[grpc.aio.Server, int]:
        options = grpc_options(settings.connections, limits, shares_port=shared)
        server = grpc_server(options, {**of_otlp, **others, **own})
        address = f"{settings.host}:{port}"
        if not shared:
            check_free(settings.host, port)
        try:
            if certificate is None:
                return server, server.add_insecure_port(address)
            return server, server.add_secure_port(address, certificate.grpc_credentials())
        except RuntimeError as error:
            raise UserError(f"cannot listen on {address}: is another collector running there? ({error})") from None

    names = ["", *(service.name for service in offered), *others]
    reflection = Reflection([*names[1:], health.SERVICE_NAME], tenant_of) if settings.reflection else None
    try:
        running = Server(listen_grpc, settings.port, names, reflection)
    except UserError:
        for one in sockets:
            one.close()
        raise
    asking: asyncio.Task[None] | None = None
    listening: asyncio.Task[None] | None = None
    try:
        await running.start()
        ears = Ears(running.port) if shared else Port(settings.host, running.port)
        listening = asyncio.create_task(running.keep_listening(ears.deaf))
        if sockets:
            receiver = Receiver(offered, limits, admission, tenant_of, requests)
            http = HttpServer(receiver, limits, settings.drain_seconds, settings.connections.max_age)
            tls = None if certificate is None else certificate.ssl_context("http/1.1")
            await running.start_http(http, sockets, tls)
        if ask is not None:
            asking = asyncio.create_task(keep_asking(running.readiness, ask, running.tell))
        yield running
    finally:
        # Shielded: a second signal must not cut off requests whose clients would then have to guess.
        await asyncio.shield(running.drain(settings.drain_seconds))
        if listening is not None:
            await listening
        if asking is not None:
            # It ends by itself; a query that is cut off in the middle would leave a warning.
            await asyncio.wait({asking}, timeout=ASK_TIMEOUT)
            asking.cancel()


def grpc_options(connections: Connections, limits: Limits, *, shares_port: bool = False) -> list[tuple[str, int]]:
    """What gRPC is told of a server."""
    return [
        # gRPC's default would let a second collector take half of the connections without a word.
        ("grpc.so_reuseport", int(shares_port)),
        # Both are ours to do: where gRPC does them nobody here learns why there is no message.
        ("grpc.max_receive_message_length", most_bytes(limits.request_bytes)),
        ("grpc.per_message_decompression", 0),
        ("grpc.max_concurrent_streams", connections.max_streams),
        *([] if connections.most is None else [("grpc.max_allowed_incoming_connections", connections.most)]),
        # With its estimate of bandwidth gRPC would widen the window of calls that nobody reads to 16 MiB each; the one
        # of a message that is being read is as wide as the message.
        ("grpc.http2.lookahead_bytes", connections.window),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.server_handshake_timeout_ms", round(connections.handshake * 1000)),
        ("grpc.max_connection_age_ms", round(connections.max_age * 1000)),
        ("grpc.max_connection_age_grace_ms", round(connections.max_age_grace * 1000)),
        ("grpc.keepalive_time_ms", round(connections.keepalive * 1000)),
        ("grpc.keepalive_timeout_ms", round(connections.keepalive_timeout * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", round(connections.least_ping_interval * 1000)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", round(connections.least_ping_interval * 1000)),
    ]
