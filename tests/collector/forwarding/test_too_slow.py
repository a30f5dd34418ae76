"""A next hop that does not answer in time: what is slow by itself holds up nothing for good, silence loses nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from aiohttp import web
from google.rpc.status_pb2 import Status

from tallymark_collector.forwarding import forwarder as forwarder_module
from tallymark_collector.forwarding.hops import SEND_TIMEOUT, Fate, Verdict, hop
from tests.collector.forwarding.test_forwarder import running, until
from tests.collector.forwarding.test_too_large import LIMIT, Narrow, numbered, over_grpc, points_of
from tests.support.receiving import ACME, NOW
from tests.support.usage import BASE, number, request, sum_metric

QUICK = 1000
SLOW = Verdict(Fate.SLOW, "DEADLINE_EXCEEDED: so")


@pytest.fixture(autouse=True)
def of_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder_module, "SURELY_QUICK", QUICK)


class Timed:
    """A next hop that takes what is larger than LIMIT in so many seconds, and anything else at once; nothing while it
    is silent."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.silent = False
        self.tries: list[tuple[int, float]] = []
        """Bytes and seconds of what was sent; of no bytes is a question whether anybody answers."""
        self.taken: list[bytes] = []

    async def send(self, _signal: str, body: bytes, timeout: float = SEND_TIMEOUT) -> Verdict:
        self.tries.append((len(body), timeout))
        if self.silent or timeout < (self.seconds if len(body) > LIMIT else 0.1):
            return SLOW
        if body:
            self.taken.append(body)
        return Verdict(Fate.TAKEN)


def points(bodies: list[bytes]) -> list[tuple[str, int]]:
    return [point for body in bodies for point in points_of(body)]


async def test_a_request_that_needs_longer_gets_it_and_others_of_its_size_from_then_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large, small, larger = numbered([400]), numbered([1]), numbered([500])
    timed = Timed(100)
    async with running(tmp_path, timed) as forwarder:
        for body in (large, small, larger):
            forwarder.accepted("metrics", body)
        await until(lambda: forwarder.totals.sent == 3)
        assert (forwarder.totals.timeouts, forwarder.totals.refused) == (2, 0)
    assert timed.taken == [large, small, larger]
    assert [one for one in timed.tries if one[0]] == [
        (len(large), 30),
        (len(large), 60),
        (len(large), 120),
        (len(small), 30),
        (len(larger), 120),
    ]
    assert "not to a request of" in caplog.text


async def test_what_takes_longer_than_the_longest_time_is_sent_in_parts_and_the_rest_goes_on(tmp_path: Path) -> None:
    bodies = [numbered([400]), numbered([2]), numbered([100, 100])]
    timed = Timed(float("inf"))
    async with running(tmp_path, timed) as forwarder:
        for body in bodies:
            forwarder.accepted("metrics", body)
        await until(lambda: forwarder.totals.sent == len(bodies))
        assert (forwarder.waiting, forwarder.totals.refused) == (0, 0)
    assert points(timed.taken) == points(bodies)
    assert max(timeout for _, timeout in timed.tries) == forwarder_module.MAX_SEND_TIMEOUT
    assert len(timed.tries) < 100


async def test_one_point_that_is_never_answered_is_left_out_told_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    huge = request(sum_metric([number(BASE, NOW, 7, {**ACME, "note": "x" * LIMIT})])).SerializeToString()
    small, timed = numbered([2]), Timed(float("inf"))
    async with running(tmp_path, timed) as forwarder:
        forwarder.accepted("metrics", huge)
        forwarder.accepted("metrics", small)
        await until(lambda: forwarder.totals.sent == 1)
        assert (forwarder.waiting, forwarder.totals.refused) == (0, 1)
    assert timed.taken == [small]
    longest = [one for one in timed.tries if one == (len(huge), forwarder_module.MAX_SEND_TIMEOUT)]
    assert len(longest) == forwarder_module.MAX_UNCLEAR
    [told] = [record.message for record in caplog.records if "for good" in record.message]
    assert SLOW.words in told


async def test_while_the_next_hop_is_silent_everything_waits_whole(tmp_path: Path) -> None:
    bodies, timed = [numbered([400]), numbered([2])], Timed(0)
    timed.silent = True
    async with running(tmp_path, timed) as forwarder:
        for body in bodies:
            forwarder.accepted("metrics", body)
        await until(lambda: forwarder.totals.timeouts > 2 * forwarder_module.MAX_UNCLEAR)
        assert forwarder.waiting == 2
        timed.silent = False
        await until(lambda: forwarder.totals.sent == 2)
        assert forwarder.totals.refused == 0
    assert timed.taken == bodies
    assert {timeout for _, timeout in timed.tries} == {SEND_TIMEOUT}


async def test_where_few_bytes_are_not_answered_they_wait_though_the_next_hop_answers_to_none(tmp_path: Path) -> None:
    """As one whose disk hangs: nothing is the matter with the request."""

    class Hung(Timed):
        async def send(self, signal: str, body: bytes, timeout: float = SEND_TIMEOUT) -> Verdict:
            self.silent = bool(body) and len(self.tries) < 12
            return await super().send(signal, body, timeout)

    bodies, hung = [numbered([2]), numbered([30])], Hung(0)
    assert len(bodies[0]) <= QUICK < len(bodies[1]) <= LIMIT
    async with running(tmp_path, hung) as forwarder:
        for body in bodies:
            forwarder.accepted("metrics", body)
        await until(lambda: forwarder.totals.sent == 2)
        assert forwarder.totals.refused == 0
    assert hung.taken == bodies


class Impatient(Narrow):
    """A proxy that gives up what is large, as one in front of a slow receiver."""

    def too_large(self) -> web.Response:
        return web.Response(status=504)


async def test_what_a_proxy_gives_up_arrives_in_parts(tmp_path: Path) -> None:
    body, end = numbered([400]), Impatient()
    async with end.over_http() as endpoint, hop(endpoint, ()) as next_hop, running(tmp_path, next_hop) as forwarder:
        forwarder.accepted("metrics", body)
        await until(lambda: forwarder.totals.sent == 1)
    assert end.taken == points_of(body)


@pytest.mark.parametrize(("status", "said"), [(408, ""), (504, ""), (503, "the body did not arrive within 30 s")])
async def test_how_http_says_that_a_request_took_too_long(status: int, said: str) -> None:
    async def answer(_request: web.BaseRequest) -> web.Response:
        return web.Response(status=status, body=Status(code=14, message=said).SerializeToString())

    end = Narrow()
    end.answer = answer  # type: ignore[method-assign]
    async with end.over_http() as endpoint, hop(endpoint, ()) as next_hop:
        assert (await next_hop.send("metrics", b"")).fate is Fate.SLOW


async def test_no_answer_within_the_time_is_slow() -> None:
    over = asyncio.Event()

    async def never(_request: web.BaseRequest) -> web.Response:
        await over.wait()
        return web.Response()

    async def export(body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        if body:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the message did not arrive within 30 s")
        await asyncio.Event().wait()
        raise AssertionError

    end = Narrow()
    end.answer = never  # type: ignore[method-assign]
    async with end.over_http() as endpoint, hop(endpoint, ()) as next_hop:
        assert (await next_hop.send("metrics", b"", 0.2)).fate is Fate.SLOW
        over.set()
    async with over_grpc(export) as port, hop(f"grpc://127.0.0.1:{port}", ()) as next_hop:
        assert (await next_hop.send("metrics", b"", 0.2)).fate is Fate.SLOW
        assert (await next_hop.send("metrics", b"x")).fate is Fate.SLOW, "as we say it ourselves"
