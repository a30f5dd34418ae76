"""OTLP over gRPC: the metrics, traces and logs services, on bytes.

The services take and give bytes instead of messages, so that malformed requests are ours to refuse (gRPC's own
deserialisation would end the call as INTERNAL) and metrics can be read through the pipeline's own view.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from tallymark_collector.access import certificates
from tallymark_collector.access.requests import TenantOf
from tallymark_collector.receivers import status
from tallymark_collector.receivers.admission import Admission
from tallymark_collector.receivers.otlp import Service

Context = grpc.aio.ServicerContext[bytes, bytes]


def handler(service: Service, tenant_of: TenantOf, admission: Admission) -> grpc.GenericRpcHandler:
    """A gRPC handler for the service's Export method."""

    async def export(request: bytes, context: Context) -> bytes:
        try:
            admission.enter(len(request))
            try:
                shown = certificates.of_call(context.auth_context())
                tenant = await tenant_of(context.invocation_metadata() or (), shown)
                outcome = await service.stage(tenant, request)
            finally:
                admission.leave(len(request))
        except asyncio.CancelledError:
            # The client hung up, or the server stops. Whatever was committed, the retry will be a duplicate.
            raise
        except Exception as error:
            code, message, metadata = status.answer(error)
            await context.abort(code, message, metadata)
        return service.respond(outcome).SerializeToString()

    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {"Export": grpc.unary_unary_rpc_method_handler(export)}
    return grpc.method_handlers_generic_handler(service.name, methods)
