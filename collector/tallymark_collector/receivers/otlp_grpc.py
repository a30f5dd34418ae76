"""OTLP over gRPC: the metrics, traces and logs services, on bytes.

The services take and give bytes instead of messages, so that malformed requests are ours to refuse (gRPC's own
deserialisation would end the call as INTERNAL) and metrics can be read through the pipeline's own view. A message is
read once it is known whose it is (`receivers.arriving`): who may not send is told so by what the call's head shows.
"""

from __future__ import annotations

from tallymark_collector.access import certificates
from tallymark_collector.access.requests import TenantOf
from tallymark_collector.receivers import grpc_calls
from tallymark_collector.receivers.admission import Admission, Share
from tallymark_collector.receivers.arriving import Arriving, Context
from tallymark_collector.receivers.decompression import unfolded
from tallymark_collector.receivers.grpc_server import Methods
from tallymark_collector.receivers.otlp import Service
from tallymark_collector.telemetry.requests import Call, Requests


def methods(
    service: Service, tenant_of: TenantOf, admission: Admission, arriving: Arriving, requests: Requests, limit: int
) -> Methods:
    """For a gRPC server: the service's Export; `limit` is of a request's bytes, after decompression."""

    async def take(context: Context, call: Call) -> bytes:
        shown = certificates.of_call(context.auth_context())
        call.tenant = tenant = await tenant_of(context.invocation_metadata() or (), shown)
        with Share(admission, tenant) as share:
            request = await unfolded(await arriving.message(tenant, context), limit, share.take)
            outcome = await service.stage(tenant, request)
        answer = service.respond(outcome).SerializeToString()
        call.committed(partial=bool(outcome.rejected))
        return answer

    return {"Export": grpc_calls.method(requests, service.signal, take)}
