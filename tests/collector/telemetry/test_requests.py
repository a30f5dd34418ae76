"""Requests as they are counted: by tenant, protocol, signal and answer, over real channels; and what a trace is."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub

from tallymark_collector.access import Principal, Scope
from tallymark_collector.access.requests import tenant_of
from tallymark_collector.errors import StoreUnavailable, Unauthenticated
from tallymark_collector.receivers import arriving
from tallymark_collector.receivers.admission import Admission, Share
from tallymark_collector.telemetry import requests
from tallymark_collector.telemetry.requests import Answered, Requests, Trace, traceparent_of
from tallymark_collector.telemetry.tenants import Tenants
from tests.support.receiving import GOOD, NOW, Counting, Failing, Stuck, receiving
from tests.support.usage import BASE, number, request, sum_metric

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
NOBODYS = request(sum_metric([number(BASE, NOW, 5, {})]))
"""A point without an account."""


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        (f"00-{TRACE_ID}-{SPAN_ID}-01", Trace(TRACE_ID, SPAN_ID)),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-what-comes", Trace(TRACE_ID, SPAN_ID)),
        (f"ff-{TRACE_ID}-{SPAN_ID}-01", None),
        (f"00-{'0' * 32}-{SPAN_ID}-01", None),
        (f"00-{TRACE_ID}-{'0' * 16}-01", None),
        (f"00-{TRACE_ID.upper()}-{SPAN_ID}-01", None),
        (f"00-{TRACE_ID}-{SPAN_ID}", None),
        (f"00-{TRACE_ID}-{SPAN_ID}-01\nlevel: forged", None),
        ("", None),
    ],
)
def test_a_trace_is_what_the_standard_says_or_none(header: str, trace: Trace | None) -> None:
    assert Requests().call("grpc", "metrics", header).trace == trace


def test_metadata_may_be_anything() -> None:
    assert traceparent_of(None) == ""
    assert traceparent_of([("other", "x"), ("traceparent", "y"), ("traceparent", "z")]) == "y"
    assert traceparent_of([("traceparent", b"\xff")]) == ""


def test_tenants_past_the_limit_are_one() -> None:
    tenants = Tenants(limit=2)
    labels = [tenants.label(name) for name in ("a", "b", "c", "d", "a", "", "c")]
    assert labels == ["a", "b", "other", "other", "a", "", "other"]


def test_a_call_is_current_inside_itself_alone() -> None:
    counted = Requests()
    with counted.call("grpc", "metrics") as outer:
        with counted.call("http", "traces") as inner:
            assert requests.current() is inner
        assert requests.current() is outer
        requests.of_tenant("acme-corp")
        requests.arrived(10)
        outer.committed(partial=True)
    assert requests.current() is None
    assert counted.answered == {
        Answered("", "http", "traces", "CANCELLED", ""): 1,
        Answered("acme-corp", "grpc", "metrics", "PARTIAL_SUCCESS", ""): 1,
    }
    assert counted.received == {("acme-corp", "grpc"): 10}


async def over_grpc(port: int, message: object, timeout: float = 60) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await MetricsServiceStub(channel).Export(message, timeout=timeout)  # type: ignore[no-untyped-call]


async def over_http(port: int | None, body: Any, kind: str = "application/x-protobuf", **headers: str) -> int:
    given = {"Content-Type": kind, **headers}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://127.0.0.1:{port}/v1/metrics", data=body, headers=given) as answer,
    ):
        return answer.status


async def raw_over_grpc(port: int, body: bytes, token: str, compression: grpc.Compression | None = None) -> str:
    """The status of a call whose message may be anything."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/opentelemetry.proto.collector.metrics.v1.MetricsService/Export")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(body, metadata=[("authorization", f"Bearer {token}")], timeout=60, compression=compression)
        return str(caught.value.code().name)


class Door:
    """An authenticator to which a token is its tenant's name; those of readers may not write."""

    async def authenticate(self, authorization: str | None, _certificate: object = ()) -> Principal:
        if authorization is None:
            raise Unauthenticated("no token")
        name = authorization.removeprefix("Bearer ")
        return Principal(name, frozenset({Scope.READ if name == "reader" else Scope.WRITE}))


def by_token() -> dict[str, Any]:
    return {"tenant_of": tenant_of(Door())}  # type: ignore[arg-type]


async def test_requests_of_both_protocols_are_counted_as_they_were_answered() -> None:
    counted = Requests()
    async with receiving(Counting(), serve={"requests": counted}) as server:
        await over_grpc(server.port, GOOD)
        await over_grpc(server.port, GOOD)
        await over_grpc(server.port, NOBODYS)
        assert await over_http(server.http_port, GOOD.SerializeToString()) == 200
        assert await over_http(server.http_port, b"\xff") == 400
        assert await over_http(server.http_port, b"", "text/plain") == 415
        assert await over_http(server.http_port, b"{", "application/json") == 400
    size = len(GOOD.SerializeToString())
    malformed = ("http", "metrics", "INVALID_ARGUMENT", "MalformedRequest")
    assert counted.answered == {
        Answered("default", "grpc", "metrics", "OK", ""): 2,
        Answered("default", "grpc", "metrics", "PARTIAL_SUCCESS", ""): 1,
        Answered("default", "http", "metrics", "OK", ""): 1,
        Answered("default", *malformed): 2,
        Answered("default", "http", "metrics", "INVALID_ARGUMENT", "UnsupportedMedia"): 1,
    }
    assert counted.received["default", "grpc"] == 2 * size + len(NOBODYS.SerializeToString())
    assert counted.received["default", "http"] == size + 1


async def test_refusals_are_counted_by_their_kind() -> None:
    counted = Requests()

    async def nobody(*_: object) -> str:
        raise Unauthenticated("no token")

    failing = Failing(StoreUnavailable("away"))
    async with receiving(failing, serve={"requests": counted}) as server:
        with pytest.raises(grpc.aio.AioRpcError):
            await over_grpc(server.port, GOOD)
        assert await over_http(server.http_port, GOOD.SerializeToString()) == 503
    async with receiving(failing, serve={"requests": counted, "tenant_of": nobody}) as server:
        with pytest.raises(grpc.aio.AioRpcError):
            await over_grpc(server.port, GOOD)
        assert await over_http(server.http_port, GOOD.SerializeToString()) == 401
    assert counted.answered == {
        Answered("default", "grpc", "metrics", "UNAVAILABLE", "StoreUnavailable"): 1,
        Answered("default", "http", "metrics", "UNAVAILABLE", "StoreUnavailable"): 1,
        Answered("", "grpc", "metrics", "UNAUTHENTICATED", "Unauthenticated"): 1,
        Answered("", "http", "metrics", "UNAUTHENTICATED", "Unauthenticated"): 1,
    }


async def test_what_a_tenant_is_refused_is_counted_as_its_own_over_http() -> None:
    counted, token = Requests(), {"Authorization": "Bearer acme-corp"}
    admission = Admission(1000, 1.0)

    async def endless() -> AsyncIterator[bytes]:
        yield b"begun"
        await asyncio.Event().wait()

    async with receiving(
        Counting(),
        serve={"requests": counted, "admission": admission, **by_token()},
        request_bytes=1000,
        json_values=10,
    ) as server:
        port = server.http_port
        assert await over_http(port, b"x" * 1001, **token) == 413
        assert await over_http(port, gzip.compress(b"x" * 1001), **token, **{"Content-Encoding": "gzip"}) == 413
        assert await over_http(port, b"[" + b"1," * 20 + b"1]", "application/json", **token) == 413
        with Share(admission, "acme-corp", lambda: None) as other:
            other.take(1000)
            assert await over_http(port, b"x", **token) == 429
        assert await over_http(port, b"no gzip", **token, **{"Content-Encoding": "gzip"}) == 400
        assert await over_http(port, b"\xff", **token) == 400
        assert await over_http(port, b"{", "application/json", **token) == 400
        assert await over_http(port, b"", "text/plain", **token) == 415
        assert await over_http(port, b"", **token, **{"Content-Encoding": "br"}) == 415
        assert await over_http(port, GOOD.SerializeToString(), Authorization="Bearer reader") == 403
        assert await over_http(port, b"", "text/plain") == 401
    async with receiving(Counting(), serve={"requests": counted, **by_token()}, body_seconds=0.2) as server:
        assert await over_http(server.http_port, endless(), **token) == 503
    found = {(key.tenant, key.answer, key.error): count for key, count in counted.answered.items()}
    assert found == {
        ("acme-corp", "RESOURCE_EXHAUSTED", "TooLarge"): 3,
        ("acme-corp", "UNAVAILABLE", "Overloaded"): 1,
        ("acme-corp", "UNAVAILABLE", "SlowBody"): 1,
        ("acme-corp", "INVALID_ARGUMENT", "MalformedRequest"): 3,
        ("acme-corp", "INVALID_ARGUMENT", "UnsupportedMedia"): 2,
        ("reader", "PERMISSION_DENIED", "Forbidden"): 1,
        ("", "UNAUTHENTICATED", "Unauthenticated"): 1,
    }


async def test_what_a_tenant_is_refused_is_counted_as_its_own_over_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arriving, "END_SECONDS", 60.0)  # gRPC ends the call before, on any machine
    counted, admission = Requests(), Admission(1000, 1.0)
    serve = {"requests": counted, "admission": admission, **by_token()}
    async with receiving(Counting(), serve=serve, request_bytes=1000) as server:
        assert await raw_over_grpc(server.port, b"x" * 1001, "too-large") == "RESOURCE_EXHAUSTED"
        bomb = b"x" * 100_000
        assert await raw_over_grpc(server.port, bomb, "unfolds", grpc.Compression.Gzip) == "RESOURCE_EXHAUSTED"
        assert await raw_over_grpc(server.port, bomb, "far-too-large") == "RESOURCE_EXHAUSTED", "says gRPC"
        with Share(admission, "too-much", lambda: None) as other:
            other.take(1000)
            assert await raw_over_grpc(server.port, b"x", "too-much") == "UNAVAILABLE"
        assert await raw_over_grpc(server.port, b"\xff", "malformed") == "INVALID_ARGUMENT"
        assert await raw_over_grpc(server.port, b"", "reader") == "PERMISSION_DENIED"
        while sum(counted.answered.values()) < 6:  # noqa: ASYNC110 - gRPC refuses before the call has ended here
            await asyncio.sleep(0.01)
    found = {key.tenant: (key.answer, key.error) for key in counted.answered}
    assert found == {
        "too-large": ("RESOURCE_EXHAUSTED", "TooLarge"),
        "unfolds": ("RESOURCE_EXHAUSTED", "TooLarge"),
        # gRPC tells its client why, and this side no more than that there is no message.
        "far-too-large": ("CANCELLED", "BrokenOff"),
        "too-much": ("UNAVAILABLE", "Overloaded"),
        "malformed": ("INVALID_ARGUMENT", "MalformedRequest"),
        "reader": ("PERMISSION_DENIED", "Forbidden"),
    }


async def test_who_hangs_up_is_counted_as_well() -> None:
    counted, stuck = Requests(), Stuck()
    async with receiving(stuck, serve={"requests": counted}) as server:
        sending = asyncio.create_task(over_grpc(server.port, GOOD))
        await stuck.entered.wait()
        sending.cancel()
        while not counted.answered:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
        await asyncio.wait({sending})
    assert counted.answered == {Answered("default", "grpc", "metrics", "CANCELLED", ""): 1}
