"""The admin port: alive, ready or why not, metrics; and what it is while the collector starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import aiohttp
import pytest

from tallymark_collector.errors import UserError
from tallymark_collector.receivers import admin as admin_port
from tallymark_collector.receivers.admin import MAX_CONNECTIONS, MAX_PAGES, Admin, administering
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


async def test_connections_are_bounded_and_idle_strangers_keep_nobody_from_asking() -> None:
    async with administering("127.0.0.1", 0, Admin(lambda: TEXT)) as admin:
        opened = [await asyncio.open_connection("127.0.0.1", admin.port) for _ in range(MAX_CONNECTIONS)]
        for begun in range(0, MAX_CONNECTIONS, 2):
            opened[begun][1].write(b"GET /livez HTTP/1.1\r\nHost: x\r\nX: ")
        for _ in range(MAX_CONNECTIONS):
            assert await ask(admin, "/livez") == (200, "alive\n")
            opened.append(await asyncio.open_connection("127.0.0.1", admin.port))
        reader, writer = opened[0]
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 60) == b"", "the first that came is the first to go"
        for _, writer in opened:
            writer.close()
    async with administering("127.0.0.1", None, Admin(lambda: TEXT)) as admin:
        assert admin.port == 0


async def test_a_stranger_that_asks_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_port, "IDLE_SECONDS", 0.2)
    for said, told, head_seconds in (
        (b"", b"", 0.2),
        (b"GET /livez", b"", 0.2),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET", b"alive\n", 60.0),
    ):
        monkeypatch.setattr(admin_port, "HEAD_SECONDS", head_seconds)
        async with administering("127.0.0.1", 0, Admin(lambda: TEXT)) as admin:
            reader, writer = await asyncio.open_connection("127.0.0.1", admin.port)
            writer.write(said)
            answer = await asyncio.wait_for(reader.read(), 60)
            assert answer.endswith(told)
            assert bool(answer) is bool(told)
            writer.close()


async def test_many_who_ask_for_metrics_keep_nobody_from_asking_for_life() -> None:
    go = threading.Event()

    def slow() -> tuple[str, bytes]:
        assert go.wait(60)
        return TEXT

    async with administering("127.0.0.1", 0, Admin(slow)) as admin:
        asking = [asyncio.create_task(ask(admin, "/metrics")) for _ in range(MAX_PAGES + 5)]
        done: set[asyncio.Task[tuple[int, str]]] = set()
        while len(done) < 5:
            done, _ = await asyncio.wait(asking, timeout=60, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)
        assert {task.result()[0] for task in done} == {503}
        assert await ask(admin, "/livez") == (200, "alive\n")
        go.set()
        assert sorted(status for status, _ in await asyncio.gather(*asking)) == [200] * MAX_PAGES + [503] * 5


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
