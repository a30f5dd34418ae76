"""What health checks are told while the database is away, and when it is back."""

from __future__ import annotations

import asyncio
import logging

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tallymark_collector.receivers.readiness import Readiness, keep_asking
from tallymark_collector.store import Store
from tests.support.receiving import Counting, receiving

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_one_failure_is_none_two_are_and_one_answer_mends_it() -> None:
    state = Readiness()
    said = [(state.note(trouble), state.serving, state.reason) for trouble in ("a", None, "a", "b", "c", None, None)]
    assert said == [
        (False, True, ""),
        (False, True, ""),
        (False, True, ""),
        (True, False, "b"),
        (False, False, "c"),
        (True, True, ""),
        (False, True, ""),
    ]
    state.drain()
    assert (state.note(None), state.serving, state.reason) == (False, False, "the collector is stopping")


def test_who_does_not_listen_is_not_ready_whatever_the_database_says() -> None:
    state = Readiness()
    assert (state.hears(everybody=False), state.serving, state.reason[:14]) == (True, False, "nobody listens")
    assert (state.note(None), state.serving) == (False, False)
    assert [state.note(trouble) for trouble in ("a", "b")] == [False, False]
    assert (state.hears(everybody=True), state.serving, state.reason) == (False, False, "b")
    assert (state.note(None), state.serving, state.reason) == (True, True, "")
    state.drain()
    assert (state.hears(everybody=False), state.reason) == (False, "the collector is stopping")


async def test_health_follows_the_database(caplog: pytest.LogCaptureFixture) -> None:
    trouble: str | None = None

    async def ask() -> str | None:
        return trouble

    async with (
        receiving(Counting(), serve={"ask": ask}) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        states = [(await watch.read()).status]
        for trouble in ("the database is not available", None):  # noqa: B007 - ask() reads it
            states.append((await watch.read()).status)
        assert states == [SERVING, NOT_SERVING, SERVING]
        assert server.readiness.serving
    assert not server.readiness.serving
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]


@pytest.mark.parametrize("way", ["raises", "hangs"])
async def test_a_question_that_fails_or_hangs_is_trouble_and_the_asking_goes_on(way: str) -> None:
    state, asked, told = Readiness(), 0, asyncio.Event()

    async def ask() -> str | None:
        nonlocal asked
        asked += 1
        if asked > 3:
            return None
        if way == "raises":
            raise ZeroDivisionError
        await asyncio.Event().wait()
        return None

    async def changed() -> None:
        if state.serving:
            told.set()
        else:
            assert ("did not answer" if way == "hangs" else "ZeroDivisionError") in state.reason

    asking = asyncio.create_task(keep_asking(state, ask, changed, interval=0.01, timeout=0.05))
    await asyncio.wait_for(told.wait(), 60)
    asking.cancel()
    assert isinstance((await asyncio.gather(asking, return_exceptions=True))[0], asyncio.CancelledError)


async def test_presence_notices_a_cut_connection_a_read_only_database_and_its_return(store: Store, dsn: str) -> None:
    async with store.presence() as presence:
        assert await presence.ask() is None
        with psycopg.connect(dsn, autocommit=True) as another:
            another.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tallymark health'"
            )
            assert await presence.ask() == "the database is not available"
            assert await presence.ask() is None, "it connects anew"
            name = sql.Identifier(another.info.dbname)
            another.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(name))
            await presence.close()
            assert await presence.ask() == "the database is read-only"
            another.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(name))
            await presence.close()
            assert await presence.ask() is None
        with psycopg.connect(make_conninfo(dsn, dbname="postgres"), autocommit=True) as another:
            another.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
            await presence.close()
            assert await presence.ask() == "the database is not available"
            another.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
            assert await presence.ask() is None


async def test_presence_given_up_in_the_middle_asks_on_a_new_connection(store: Store) -> None:
    async with store.presence() as presence:
        for _ in range(5):
            asking = asyncio.ensure_future(presence.ask())
            await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        assert await presence.ask() is None
