"""The admin port: alive, ready or why not, metrics; and what it is while the collector starts and ends."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp
import pytest

from tallymark_collector.errors import UserError
from tallymark_collector.receivers.admin import MAX_CONNECTIONS, Admin, administering
from tests.collector.telemetry.test_requests import over_grpc
from tests.support.receiving import GOOD, Stuck, receiving

TEXT = ("text/plain; version=0.0.4; charset=utf-8", b"up 1\n")


async def ask(admin: Admin, path: str, method: str = "GET") -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"http://127.0.0.1:{admin.port}{path}") as answer,
    ):
        return answer.status, await answer.text()


async def test_what_is_answered() -> None:
    async with administering("127.0.0.1", 0, Admin(lambda: TEXT)) as admin:
        assert await ask(admin, "/livez") == (200, "alive\n")
        assert await ask(admin, "/readyz") == (503, "the collector is starting\n")
        admin.state = lambda: ""
        assert await ask(admin, "/readyz") == (200, "ready\n")
        assert await ask(admin, "/metrics") == (200, "up 1\n")
        assert (await ask(admin, "/metrics", "HEAD"))[0] == 200
        assert (await ask(admin, "/metrics", "POST"))[0] == 405
        assert (await ask(admin, "/"))[0] == 404
        admin.state = lambda: "the database is not available"
        assert await ask(admin, "/readyz") == (503, "the database is not available\n")
        assert await ask(admin, "/livez") == (200, "alive\n"), "to restart it would not bring the database back"


async def test_a_page_that_fails_does_not_end_it() -> None:
    def broken() -> tuple[str, bytes]:
        raise ValueError("so")

    async with administering("127.0.0.1", 0, Admin(broken)) as admin:
        assert (await ask(admin, "/metrics"))[0] == 500
        assert (await ask(admin, "/livez"))[0] == 200


async def test_a_port_that_is_taken_is_a_sentence() -> None:
    async with administering("127.0.0.1", 0, Admin(lambda: TEXT)) as admin:
        with pytest.raises(UserError, match="is another collector running there"):
            async with administering("127.0.0.1", admin.port, Admin(lambda: TEXT)):
                pass


async def test_connections_are_bounded() -> None:
    async with administering("127.0.0.1", 0, Admin(lambda: TEXT)) as admin:
        opened = [await asyncio.open_connection("127.0.0.1", admin.port) for _ in range(MAX_CONNECTIONS)]
        reader, writer = await asyncio.open_connection("127.0.0.1", admin.port)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 60) == b""
        for _, one in [*opened, (reader, writer)]:
            one.close()
    async with administering("127.0.0.1", None, Admin(lambda: TEXT)) as admin:
        assert admin.port == 0


async def test_not_ready_at_once_when_the_collector_ends_while_a_request_is_finished() -> None:
    stuck = Stuck()
    async with (
        administering("127.0.0.1", 0, Admin(lambda: TEXT)) as admin,
        receiving(stuck, drain_seconds=60) as server,
    ):
        admin.state = lambda: server.readiness.reason
        sending = asyncio.create_task(over_grpc(server.port, GOOD, timeout=60))
        await stuck.entered.wait()
        assert (await ask(admin, "/readyz"))[0] == 200
        ending = asyncio.create_task(server.drain(60))
        await asyncio.sleep(0)
        assert await ask(admin, "/readyz") == (503, "the collector is stopping\n")
        assert not sending.done()
        stuck.go.set()
        await sending
        await ending
