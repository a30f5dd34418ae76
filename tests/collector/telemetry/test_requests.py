"""Requests as they are counted: by tenant, protocol, signal and answer, over real channels; and what a trace is."""

from __future__ import annotations

import asyncio

import aiohttp
import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub

from tallymark_collector.errors import StoreUnavailable, Unauthenticated
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
        requests.arrived("acme-corp", 10)
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


async def over_http(port: int | None, body: bytes, kind: str = "application/x-protobuf") -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://127.0.0.1:{port}/v1/metrics", data=body, headers={"Content-Type": kind}) as answer,
    ):
        return answer.status


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
        Answered("default", *malformed): 1,
        Answered("", *malformed): 1,  # JSON that cannot be read is nobody's
        Answered("", "http", "metrics", "INVALID_ARGUMENT", "UnsupportedMedia"): 1,
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
