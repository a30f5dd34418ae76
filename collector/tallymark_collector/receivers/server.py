"""The servers: OTLP and `grpc.health.v1` over gRPC, OTLP over HTTP, started, watched and drained together."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tallymark_collector.access.requests import TenantOf, anybody
from tallymark_collector.access.tls import ServerCertificate
from tallymark_collector.errors import UserError
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.receivers import otlp_grpc
from tallymark_collector.receivers.admission import Admission
from tallymark_collector.receivers.http_server import HttpServer
from tallymark_collector.receivers.listening import check_free, listen
from tallymark_collector.receivers.otlp import Accepted, nothing, services
from tallymark_collector.receivers.otlp_http import Receiver
from tallymark_collector.receivers.readiness import ASK_TIMEOUT, Ask, Readiness, keep_asking
from tallymark_collector.settings import Connections, Limits, Settings
from tallymark_collector.telemetry.requests import Requests

logger = logging.getLogger(__name__)


class Server:
    """Running servers."""

    def __init__(self, server: grpc.aio.Server, port: int, names: list[str], *, reflects: bool = False) -> None:
        self.port = port
        """The port that is listened on; of interest where 0 was asked for."""
        self.http_port: int | None = None
        """The same of HTTP; None without it."""
        self.admin_port: int | None = None
        """The same of health and metrics, which are no part of this."""
        self.readiness = Readiness()
        """Whether usage is taken, as health checks are told."""
        self._server = server
        self._names = names
        self._http: HttpServer | None = None
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if reflects:
            known = [name for name in names if name] + [health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(known, server)

    async def start(self) -> None:
        """Takes requests from now on."""
        await self._server.start()
        await self.tell()

    async def start_http(self, http: HttpServer, sockets: list[socket.socket], tls: ssl.SSLContext | None) -> None:
        """Takes requests over HTTP, too."""
        self._http = http
        self.http_port = sockets[0].getsockname()[1]
        await http.start(sockets, tls)

    async def tell(self) -> None:
        """Lets health checks know the state."""
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if self.readiness.serving else states.NOT_SERVING
        for name in self._names:
            await self._health.set(name, state)

    async def drain(self, seconds: float) -> None:
        """Says NOT_SERVING, takes no new requests, finishes those under way, at most that long."""
        self.readiness.drain()
        await self._health.enter_graceful_shutdown()
        await asyncio.gather(self._server.stop(seconds), *([self._http.drain()] if self._http else []))


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
) -> AsyncIterator[Server]:
    """Servers that run while the context lasts and are drained at its end. Raises UserError where they cannot listen.

    `ask` is asked about the database for health checks, `accepted` is told of each request that was committed.
    `tenant_of` says whose usage a request is (`access.requests`); health may be asked by anybody who can connect. With
    a `certificate` nobody connects without TLS. `requests` counts how requests end, `admission` bounds those under way;
    both are made where they are left out.
    """
    limits = settings.limits
    admission = admission or Admission(limits.in_flight_bytes, limits.retry_after)
    requests = requests or Requests()
    offered = services(pipeline, accepted)
    # First: a gRPC server that was never started would keep its port.
    shared = settings.shares_ports
    sockets = [] if settings.http_port is None else listen(settings.host, settings.http_port, shared=shared)
    server = grpc.aio.server(options=grpc_options(settings.connections, limits, shares_port=shared))
    server.add_generic_rpc_handlers(
        tuple(otlp_grpc.handler(service, tenant_of, admission, requests) for service in offered)
    )
    address = f"{settings.host}:{settings.port}"
    try:
        if not shared:
            check_free(settings.host, settings.port)
        if certificate is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, certificate.grpc_credentials())
    except (RuntimeError, UserError) as error:
        for one in sockets:
            one.close()
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot listen on {address}: is another collector running there? ({error})") from None
    names = ["", *(service.name for service in offered)]
    running = Server(server, port, names, reflects=settings.reflection)
    asking: asyncio.Task[None] | None = None
    try:
        await running.start()
        if sockets:
            receiver = Receiver(offered, limits, admission, tenant_of, requests)
            http = HttpServer(receiver, limits, settings.drain_seconds)
            tls = None if certificate is None else certificate.ssl_context("http/1.1")
            await running.start_http(http, sockets, tls)
        if ask is not None:
            asking = asyncio.create_task(keep_asking(running.readiness, ask, running.tell))
        yield running
    finally:
        # Shielded: a second signal must not cut off requests whose clients would then have to guess.
        await asyncio.shield(running.drain(settings.drain_seconds))
        if asking is not None:
            # It ends by itself; a query that is cut off in the middle would leave a warning.
            await asyncio.wait({asking}, timeout=ASK_TIMEOUT)
            asking.cancel()


def grpc_options(connections: Connections, limits: Limits, *, shares_port: bool = False) -> list[tuple[str, int]]:
    """What gRPC is told of a server."""
    return [
        # gRPC's default would let a second collector take half of the connections without a word.
        ("grpc.so_reuseport", int(shares_port)),
        ("grpc.max_receive_message_length", limits.request_bytes),
        ("grpc.max_concurrent_streams", connections.max_streams),
        ("grpc.max_connection_age_ms", round(connections.max_age * 1000)),
        ("grpc.max_connection_age_grace_ms", round(connections.max_age_grace * 1000)),
        ("grpc.keepalive_time_ms", round(connections.keepalive * 1000)),
        ("grpc.keepalive_timeout_ms", round(connections.keepalive_timeout * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", round(connections.least_ping_interval * 1000)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", round(connections.least_ping_interval * 1000)),
    ]
