"""OTLP over HTTP/1.1: POST /v1/metrics, /v1/traces and /v1/logs, in protobuf or JSON.

A request in JSON becomes the same request in protobuf and takes the same way. The answer is in the request's content
type, errors are `google.rpc.Status` in it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from aiohttp import web
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status

from tallymark_collector.access import certificates
from tallymark_collector.access.requests import TenantOf, anybody
from tallymark_collector.errors import SlowBody, UnsupportedMedia
from tallymark_collector.receivers import http_body, status
from tallymark_collector.receivers.admission import Admission, Share
from tallymark_collector.receivers.otlp import Service
from tallymark_collector.settings import Limits
from tallymark_collector.telemetry.requests import TRACEPARENT, Call, Requests
from tallymark_collector.wire import otlp_json

PROTOBUF: Final = "application/x-protobuf"
JSON: Final = "application/json"
VALUE_WEIGHT: Final = 10
"""Bytes that a JSON value counts for while it is converted: it takes about 100, and what is decoded from protobuf ten
times its bytes."""
_NOT_FOUND: Final = 5  # google.rpc.Code
_UNIMPLEMENTED: Final = 12


class Media(NamedTuple):
    """The content type of a request and its answer."""

    type: str
    charset: str | None = None

    def encode(self, message: Message) -> bytes:
        """A message in this type."""
        return message.SerializeToString() if self.type == PROTOBUF else otlp_json.from_protobuf(message)


class Receiver:
    """Takes OTLP's requests from an HTTP server."""

    def __init__(
        self,
        services: Sequence[Service],
        limits: Limits,
        admission: Admission,
        tenant_of: TenantOf = anybody,
        requests: Requests | None = None,
    ) -> None:
        self._services = {f"/v1/{service.signal}": service for service in services}
        self._limits = limits
        self._admission = admission
        self._tenant_of = tenant_of
        self._requests = requests or Requests()

    async def handle(self, request: web.BaseRequest) -> web.Response:
        """The answer to one request, whatever it is."""
        service = self._services.get(request.path)
        if service is None:
            known = ", ".join(self._services)
            return _reply(
                404, Status(code=_NOT_FOUND, message=f"nothing is here: post to {known}"), _answering(request)
            )
        if request.method != "POST":
            said = Status(code=_UNIMPLEMENTED, message=f"{request.path} takes POST alone")
            return _reply(405, said, _answering(request), {"Allow": "POST"})
        with self._requests.call("http", service.signal, request.headers.get(TRACEPARENT, "")) as call:
            return await self._take(request, service, call)

    async def _take(self, request: web.BaseRequest, service: Service, call: Call) -> web.Response:
        try:
            tls = request.get_extra_info("ssl_object")
            shown = () if tls is None else certificates.of_connection(tls)
            # First: whatever else is refused is counted as this tenant's.
            call.tenant = tenant = await self._tenant_of(request.headers, shown)
            media = media_of(request.headers.get("Content-Type", ""))
            encoding = http_body.check_encoding(request.headers.get("Content-Encoding", ""))
            with Share(self._admission, tenant) as share:
                outcome = await service.stage(tenant, await self._body(request, encoding, media, service, share))
            reply = _reply(200, service.respond(outcome), media)
        except asyncio.CancelledError:
            # The server stops. Whatever was committed, the retry will be a duplicate.
            raise
        except Exception as error:
            return _refused(error, _answering(request), call)
        call.committed(partial=bool(outcome.rejected))
        return reply

    async def _body(
        self, request: web.BaseRequest, encoding: str, media: Media, service: Service, share: Share
    ) -> bytes:
        """The request as protobuf. Raises MalformedRequest, TooLarge, Overloaded, SlowBody."""
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # the answer has not begun
        reading = http_body.read_body(request, encoding, self._limits.request_bytes, share)
        try:
            body = await asyncio.wait_for(reading, self._limits.body_seconds)
        except asyncio.TimeoutError:
            raise SlowBody(f"the body did not arrive within {self._limits.body_seconds:g} s") from None
        if media.type == PROTOBUF:
            return body
        share.take(min(otlp_json.values_at_most(body), self._limits.json_values) * VALUE_WEIGHT)
        # In a thread: others are served while a large request is converted.
        converting = asyncio.ensure_future(
            asyncio.to_thread(otlp_json.to_protobuf, body, service.message, self._limits.json_values)
        )
        try:
            return await asyncio.shield(converting)
        except asyncio.CancelledError:
            await asyncio.wait([converting])  # a thread is not cancelled: it counts until it has gone
            if not converting.cancelled():
                converting.exception()
            raise


def media_of(content_type: str) -> Media:
    """The type of a request's body, parameters allowed. Raises UnsupportedMedia."""
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    charset = next((p.partition("=")[2].strip('" ') for p in parameters if p.startswith("charset=")), None)
    if kind == PROTOBUF:
        return Media(PROTOBUF)
    if kind != JSON:
        raise UnsupportedMedia(f"Content-Type {content_type[:80]!r} is not read here: send {PROTOBUF} or {JSON}")
    if charset not in (None, "utf-8", "utf8"):
        raise UnsupportedMedia(f"JSON in {charset[:40]!r} is not read here: send UTF-8")
    return Media(JSON, charset and "utf-8")


def _answering(request: web.BaseRequest) -> Media:
    """The type to answer in; JSON, which a person can read, where the request's is none that is known."""
    try:
        return media_of(request.headers.get("Content-Type", ""))
    except UnsupportedMedia:
        return Media(JSON)


def _refused(error: Exception, media: Media, call: Call) -> web.Response:
    refused = status.refusal(error)
    call.refused(refused.code.name, error)
    headers = {}
    if refused.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(refused.retry_after)))
    if isinstance(error, UnsupportedMedia):
        headers["Accept-Encoding"] = ", ".join(http_body.ENCODINGS)
    reply = _reply(refused.http_status, refused.status(), media, headers)
    if isinstance(error, SlowBody):
        reply.force_close()
    return reply


def _reply(number: int, message: Message, media: Media, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(
        status=number,
        body=media.encode(message),
        content_type=media.type,
        charset=media.charset,
        # Not the name and version of what serves it.
        headers={"Server": "tallymark", **(headers or {})},
    )
