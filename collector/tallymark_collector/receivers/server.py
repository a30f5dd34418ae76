"""The gRPC server: OTLP and `grpc.health.v1` on one port, started, watched and drained."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tallymark_collector.access.requests import TenantOf, anybody
from tallymark_collector.access.tls import ServerCertificate
from tallymark_collector.errors import UserError
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.receivers import otlp_grpc
from tallymark_collector.settings import Settings

logger = logging.getLogger(__name__)


class Server:
    """A running server."""

    def __init__(self, server: grpc.aio.Server, port: int, names: list[str]) -> None:
        self.port = port
        """The port that is listened on; of interest where 0 was asked for."""
        self._server = server
        self._names = names
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)

    async def start(self) -> None:
        """Takes requests from now on."""
        await self._server.start()
        for name in self._names:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def drain(self, seconds: float) -> None:
        """Says NOT_SERVING, takes no new requests, finishes those under way, at most that long."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(seconds)


@asynccontextmanager
async def serving(
    pipeline: Pipeline,
    settings: Settings,
    *,
    tenant_of: TenantOf = anybody,
    certificate: ServerCertificate | None = None,
) -> AsyncIterator[Server]:
    """A server that runs while the context lasts and is drained at its end. Raises UserError where it cannot listen.

    `tenant_of` says whose usage a request is (`access.requests`); health may be asked by anybody who can connect. With
    a `certificate` nobody connects without TLS.
    """
    limits = settings.limits
    server = grpc.aio.server(
        options=[
            # gRPC's default would let a second collector take half of the connections without a word.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", limits.request_bytes),
        ]
    )
    admission = otlp_grpc.Admission(limits.in_flight_bytes, limits.retry_after)
    services = otlp_grpc.services(pipeline)
    server.add_generic_rpc_handlers(tuple(otlp_grpc.handler(service, tenant_of, admission) for service in services))
    address = f"{settings.host}:{settings.port}"
    try:
        if certificate is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, certificate.grpc_credentials())
    except RuntimeError as error:
        raise UserError(f"cannot listen on {address}: is another collector running there? ({error})") from None
    running = Server(server, port, ["", *(service.name for service in services)])
    await running.start()
    try:
        yield running
    finally:
        # Shielded: a second signal must not cut off requests whose clients would then have to guess.
        await asyncio.shield(running.drain(settings.drain_seconds))
