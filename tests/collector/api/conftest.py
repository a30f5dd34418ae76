"""The services over real gRPC and a real database, asked with tokens that are there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from tallymark.v1 import access_pb2, quarantine_pb2, usage_pb2
from tallymark_collector import api
from tallymark_collector.access import Authenticator, Scope, records
from tallymark_collector.access.records import InDatabase
from tallymark_collector.access.requests import tenant_of
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.receivers.admission import Admission
from tallymark_collector.receivers.server import serving
from tallymark_collector.settings import Limits, Settings
from tallymark_collector.store import Store
from tallymark_collector.telemetry.requests import Requests

Answer = TypeVar("Answer", bound=Message)

SERVICES = {
    service.full_name: service
    for file in (access_pb2, quarantine_pb2, usage_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
}
METHODS = [(name, method.name) for name, service in SERVICES.items() for method in service.methods]
"""Every method that the files in proto/ say there is."""

SETTINGS = Settings("unused", port=0, drain_seconds=3)


@dataclass
class Asking:
    """A client."""

    channel: grpc.aio.Channel
    requests: Requests
    port: int

    async def call(self, service: str, method: str, message: Message | None = None, token: str = "") -> Any:
        """The answer. Raises grpc.aio.AioRpcError."""
        described = SERVICES[service].methods_by_name[method]
        sent = GetMessageClass(described.input_type)() if message is None else message
        invoke = self.channel.unary_unary(
            f"/{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(described.output_type).FromString,
        )
        return await invoke(sent, metadata=[("authorization", f"Bearer {token}")] if token else [], timeout=600)

    async def usage(self, token: str, **asked: Any) -> usage_pb2.QueryUsageResponse:
        """Usage."""
        found = await self.call("tallymark.v1.UsageService", "QueryUsage", usage_pb2.QueryUsageRequest(**asked), token)
        assert isinstance(found, usage_pb2.QueryUsageResponse)
        return found

    async def code(self, service: str, method: str, message: Message | None = None, token: str = "") -> str:
        """How a call ends: OK, or the name of an error."""
        try:
            await self.call(service, method, message, token)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return "OK"


@asynccontextmanager
async def asked(store: Store, settings: Settings = SETTINGS, *, allow_anonymous: bool = False) -> AsyncIterator[Asking]:
    """A client of a collector on this store."""
    authenticator = Authenticator(InDatabase(store), allow_anonymous=allow_anonymous)
    requests = Requests()
    admission = Admission(Limits().in_flight_bytes, 1.0)
    others = api.handlers(store, authenticator, settings, admission, requests)
    async with (
        serving(
            Pipeline(store),
            settings,
            tenant_of=tenant_of(authenticator),
            requests=requests,
            admission=admission,
            others=others,
        ) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield Asking(channel, requests, server.port)


@pytest.fixture
async def asking(store: Store) -> AsyncIterator[Asking]:
    async with asked(store) as client:
        yield client


async def made(store: Store, tenant: str, scopes: Sequence[Scope] = (Scope.READ,), account: str | None = None) -> str:
    """A new token."""
    async with store.transaction() as connection:
        _, token, _ = await records.add(connection, tenant, scopes, account=account)
    assert token is not None
    return token.text
