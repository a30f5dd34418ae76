"""Bytes between arrival and answer: bounded, and shared out so that no tenant's are another's loss."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

import aiohttp
import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub

from tallymark_collector.errors import Overloaded
from tallymark_collector.receivers.admission import Admission, Share
from tallymark_collector.receivers.otlp_http import VALUE_WEIGHT
from tallymark_collector.receivers.server import Server
from tallymark_collector.wire import otlp_json
from tests.support.receiving import GOOD, Counting, Stuck, receiving

LIMIT = 100
TENANTS = "abcd"


async def by_header(headers: Mapping[str, str] | Iterable[tuple[str, str]], _certificate: object = ()) -> str:
    return dict(headers)["x-tenant"]


class Model:
    """Requests under way as a list, to compare with."""

    def __init__(self) -> None:
        self.admission = Admission(LIMIT, 1.0)
        self.live: list[Share] = []
        self.gone: list[Share] = []

    def add(self, tenant: str) -> Share:
        share = Share(self.admission, tenant, lambda: self.gone.append(share))
        self.live.append(share)
        return share

    def held(self, tenant: str) -> int:
        return sum(share.size for share in self.live if share.tenant == tenant)

    def end(self, share: Share) -> None:
        with pytest.raises(RuntimeError), share:
            raise RuntimeError  # its context ends, however
        self.live.remove(share)

    def take(self, share: Share, size: int) -> bool:
        """True where the share has grown. Holds what is promised against what is known of everybody."""
        held = {tenant: self.held(tenant) for tenant in TENANTS}
        wanted = held[share.tenant] + size
        under_way = {tenant for tenant in TENANTS if held[tenant]} | {share.tenant}
        gone_before = len(self.gone)
        try:
            share.take(size)
        except Overloaded:
            assert len(self.gone) == gone_before, "a refusal costs nobody's place"
            assert wanted * len(under_way) > LIMIT, "within its part nobody is refused"
            assert sum(held.values()) + size > LIMIT, "nor where there is room"
            return False
        for left in self.gone[gone_before:]:
            assert held[left.tenant] > wanted, "nobody gives way to who would hold as much"
            assert held[left.tenant] * len(under_way) > LIMIT, "nor from within its part"
            assert left in self.live
            held[left.tenant] -= left.size
            self.live.remove(left)
        return True


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("begin"), st.sampled_from(TENANTS), st.integers(1, 60)),
            st.tuples(st.just("grow"), st.integers(0, 50), st.integers(1, 60)),
            st.tuples(st.just("end"), st.integers(0, 50), st.just(0)),
        ),
        max_size=60,
    )
)
def test_whatever_happens(steps: list[tuple[str, str | int, int]]) -> None:
    model = Model()
    for what, which, size in steps:
        if what == "begin":
            share = model.add(str(which))
            if not model.take(share, size):
                model.end(share)
        elif model.live:
            share = model.live[int(which) % len(model.live)]
            if what == "end" or not model.take(share, size):
                model.end(share)
        counted = sum(share.size for share in model.live)
        assert model.admission.under_way - model.admission.leaving == counted
        assert counted <= LIMIT or len(model.live) == 1
        assert all(model.admission.held(tenant) == model.held(tenant) for tenant in TENANTS)
        assert model.admission.leaving == sum(share.size for share in model.gone)
        assert len(set(map(id, model.gone))) == len(model.gone) == model.admission.displaced
    for share in [*model.live, *model.gone]:
        share.__exit__(None, None, None)
    assert model.admission.under_way == model.admission.leaving == 0


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 25), st.integers(0, 8)), max_size=40),
    st.lists(st.integers(1, 90), min_size=1, max_size=10),
)
def test_a_flood_takes_nothing_from_tenants_within_their_parts(
    arrivals: list[tuple[str, int, int]], flood: list[int]
) -> None:
    """Three tenants that never have more than a quarter under way, beside one that tries all the time."""
    model = Model()
    for turn, (tenant, size, ends) in enumerate(arrivals):
        for tried in flood:
            share = model.add("d")
            if not model.take(share, tried):
                model.end(share)
        quiet = [one for one in model.live if one.tenant != "d"]
        for one in quiet[:ends]:
            model.end(one)
        if (model.held(tenant) + size) * 4 <= LIMIT:
            assert model.take(model.add(tenant), size), f"refused in turn {turn}"
        assert all(one.tenant == "d" for one in model.gone)


def test_one_tenant_may_have_it_all_and_gives_way_newest_first() -> None:
    model = Model()
    flood = [model.add("a") for _ in range(10)]
    assert all(model.take(share, 10) for share in flood)
    assert not model.take(model.add("a"), 1)
    for _ in range(4):
        assert model.take(model.add("b"), 10)
    assert model.gone == flood[:5:-1]
    assert model.take(model.add("b"), 10), "the half of it"
    assert not model.take(model.add("b"), 1)


def test_a_request_larger_than_all_is_let_in_alone() -> None:
    model = Model()
    giant = model.add("a")
    assert model.take(giant, 60)
    assert model.take(giant, 60)
    assert not model.take(model.add("a"), 1)
    assert model.take(model.add("b"), 1), "which holds less"
    assert model.gone == [giant]
    assert not model.take(model.add("a"), 120)


async def test_who_gives_way_is_told_to_come_again_and_its_task_goes_on() -> None:
    admission = Admission(LIMIT, 2.5)

    async def hold(tenant: str, size: int) -> str:
        try:
            with Share(admission, tenant) as share:
                share.take(size)
                await asyncio.Event().wait()
        except Overloaded as error:
            await asyncio.sleep(0)  # not cancelled any more
            return f"{error.retry_after} {error}"
        return ""

    flood = asyncio.create_task(hold("a", 100))
    await asyncio.sleep(0)
    quiet = asyncio.create_task(hold("b", 10))
    assert "2.5 another tenant" in await flood
    assert (admission.under_way, admission.leaving) == (10, 0)
    quiet.cancel()
    with pytest.raises(asyncio.CancelledError):
        await quiet
    assert admission.under_way == 0


async def test_a_request_that_did_not_hear_that_it_had_to_go_takes_no_more() -> None:
    admission = Admission(LIMIT, 1.0)
    with Share(admission, "a", lambda: None) as deaf, Share(admission, "b", lambda: None) as other:
        deaf.take(100)
        other.take(1)
        assert (admission.under_way, admission.leaving) == (101, 100)
        with pytest.raises(Overloaded, match="another tenant"):
            deaf.take(0)
        assert admission.under_way == 101
    assert admission.under_way == 0


async def test_json_counts_until_the_thread_that_reads_it_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread is not cancelled: what it holds is there until it ends."""
    reading, gone = threading.Event(), threading.Event()

    def to_protobuf(body: bytes, *_: object) -> bytes:
        reading.set()
        gone.wait(60)
        return body

    monkeypatch.setattr(otlp_json, "to_protobuf", to_protobuf)
    stuck = Stuck()
    body = b"[" + b" " * 10_000 + b"]"
    held = len(body) + otlp_json.values_at_most(body) * VALUE_WEIGHT
    async with (
        receiving(stuck, serve={"tenant_of": by_header}, in_flight_bytes=held + 10) as server,
        aiohttp.ClientSession() as session,
    ):
        try:
            flood = asyncio.create_task(post(session, server, "flood", body, "application/json"))
            await asyncio.to_thread(reading.wait, 60)
            quiet = asyncio.create_task(post(session, server, "quiet", GOOD.SerializeToString()))
            await asyncio.wait_for(stuck.reached(1), 60)
            await asyncio.wait([flood], timeout=0.3)
            assert not flood.done(), "it was answered while its thread was at work"
        finally:
            gone.set()
        assert await flood == 429
        quiet.cancel()


@asynccontextmanager
async def flooded(stuck: Stuck, body: bytes) -> AsyncIterator[tuple[Server, list[asyncio.Task[int]]]]:
    """A server that the tenant "flood" has filled, over both protocols; what becomes of its requests."""
    async with (
        receiving(stuck, serve={"tenant_of": by_header}, in_flight_bytes=2 * len(body)) as server,
        aiohttp.ClientSession() as session,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):

        async def over_grpc() -> int:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await MetricsServiceStub(channel).Export(GOOD, metadata=(("x-tenant", "flood"),))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "google.rpc.retryinfo-bin" in dict(caught.value.trailing_metadata())
            return 503

        tasks = [asyncio.create_task(post(session, server, "flood", body))]
        await stuck.reached(1)
        tasks.append(asyncio.create_task(over_grpc()))
        await stuck.reached(2)
        yield server, tasks


async def post(
    session: aiohttp.ClientSession, server: Server, tenant: str, body: bytes, media: str = "application/x-protobuf"
) -> int:
    headers = {"x-tenant": tenant, "Content-Type": media}
    url = f"http://127.0.0.1:{server.http_port}/v1/metrics"
    async with session.post(url, data=body, headers=headers) as answer:
        return answer.status


async def test_a_tenants_flood_does_not_refuse_another_tenants_request() -> None:
    stuck, body = Stuck(), GOOD.SerializeToString()
    async with flooded(stuck, body) as (server, flood), aiohttp.ClientSession() as session:
        assert await post(session, server, "flood", body) == 429
        quiet = asyncio.create_task(post(session, server, "quiet", body))
        await stuck.reached(3)
        assert await flood[1] == 503, "the newest of the flood has given way, over gRPC"
        assert not flood[0].done()
        stuck.go.set()
        assert [await quiet, await flood[0]] == [200, 200]


async def test_a_body_that_never_ends_gives_way_too() -> None:
    """A slow client has nearly all of the room for half a minute; another tenant's request does not wait for it."""
    body = GOOD.SerializeToString()
    admission, counting = Admission(len(body) + 10, 1.0), Counting()
    async with (
        receiving(counting, serve={"tenant_of": by_header, "admission": admission}) as server,
        aiohttp.ClientSession() as session,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
        head = "POST /v1/metrics HTTP/1.1\r\nHost: x\r\nx-tenant: slow\r\nContent-Type: application/x-protobuf\r\n"
        writer.write(f"{head}Content-Length: 1000\r\n\r\n".encode() + bytes(len(body) + 10))
        while admission.held("slow") < len(body) + 10:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert await post(session, server, "quick", body) == 200
        assert (await asyncio.wait_for(reader.readline(), 60)).startswith(b"HTTP/1.1 429")
        writer.close()
    assert (counting.points, admission.displaced, admission.under_way) == (1, 1, 0)
