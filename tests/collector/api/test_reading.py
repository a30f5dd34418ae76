"""Questions take turns, end in time, and keep neither other tenants nor those who write waiting."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import grpc
import psycopg
import pytest

from tallymark_collector.api.reading import AT_ONCE, OF_TENANT, WAITING, Readers
from tallymark_collector.errors import Overloaded, StoreUnavailable, TakesTooLong
from tallymark_collector.model import Batch
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.store import Store
from tests.collector.api.conftest import Asking, asked, made
from tests.support.usage import BASE, SECOND, number, point, request, stream, sum_metric


async def settled() -> None:
    """Lets everybody go on who can."""
    for _ in range(20):
        await asyncio.sleep(0)


class Caller:
    """Holds a turn until it is told to go."""

    def __init__(self, readers: Readers, tenant: str) -> None:
        self.has_turn, self.go = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._hold(readers, tenant))

    async def _hold(self, readers: Readers, tenant: str) -> None:
        async with readers.turn(tenant):
            self.has_turn.set()
            await self.go.wait()

    async def leave(self) -> None:
        self.go.set()
        await self.task


async def test_a_tenant_has_some_turns_and_leaves_others_theirs(store: Store) -> None:
    readers = Readers(store)
    ours = [Caller(readers, "ours") for _ in range(WAITING)]
    await settled()
    assert sum(caller.has_turn.is_set() for caller in ours) == OF_TENANT
    with pytest.raises(Overloaded, match=f"{WAITING} questions of this tenant"):
        async with readers.turn("ours"):
            pass
    theirs = [Caller(readers, "theirs") for _ in range(3)]
    await settled()
    assert sum(caller.has_turn.is_set() for caller in theirs) == OF_TENANT
    assert 2 * OF_TENANT == AT_ONCE  # so now all turns are taken
    late = Caller(readers, "late")
    await settled()
    assert not late.has_turn.is_set()
    await ours[0].leave()
    await settled()
    assert late.has_turn.is_set()  # it came before our next one could ask for that turn
    for caller in (*ours, *theirs, late):
        await caller.leave()
    assert not readers._here


async def test_who_hangs_up_while_waiting_takes_no_turn(store: Store) -> None:
    readers = Readers(store)
    callers = [Caller(readers, "ours") for _ in range(OF_TENANT + 2)]
    await settled()
    callers[OF_TENANT].task.cancel()
    await settled()
    await callers[0].leave()
    await settled()
    assert callers[-1].has_turn.is_set()
    for caller in (callers[1], callers[-1]):
        await caller.leave()
    assert not readers._here


async def test_a_statement_that_takes_too_long_is_given_up(store: Store) -> None:
    readers = Readers(store, seconds=0.2)
    with pytest.raises(TakesTooLong, match=r"more than 0\.2 s: ask for a shorter range"):
        async with readers.reading("ours") as connection:
            await connection.execute("SELECT pg_sleep(60)")
    # The connection is as good as before, without the limit.
    async with store.reading() as connection:
        assert await (await connection.execute("SHOW statement_timeout")).fetchone() == ("0",)


async def test_a_reader_writes_nothing(store: Store) -> None:
    with pytest.raises(StoreUnavailable) as refused:
        async with Readers(store).reading("ours") as connection:
            await connection.execute("DELETE FROM usage_point")
    assert isinstance(refused.value.__cause__, psycopg.errors.ReadOnlySqlTransaction)


async def test_over_grpc_it_is_a_deadline_and_others_are_told_to_come_again(
    store: Store, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody keeps the tables from readers, which nobody does for long but who moves them."""
    monkeypatch.setattr(Readers.__init__, "__defaults__", (1.0,))
    token = await made(store, "ours")
    async with asked(store) as asking, AsyncExitStack() as stack:
        holder = await stack.enter_async_context(await psycopg.AsyncConnection.connect(dsn))
        await holder.execute("LOCK TABLE tallymark.usage_series IN ACCESS EXCLUSIVE MODE")
        calls = [asyncio.create_task(_code(asking, token)) for _ in range(WAITING + 3)]
        codes = [await call for call in calls]
        await holder.rollback()
        assert codes.count("UNAVAILABLE") >= 3
        assert set(codes) <= {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
        assert "DEADLINE_EXCEEDED" in codes
        assert await _code(asking, token) == "OK"


async def _code(asking: Asking, token: str) -> str:
    try:
        await asking.usage(token)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


async def test_usage_is_taken_while_all_readers_wait(dsn: str, store: Store) -> None:
    """By connections of their own, so that readers can wait for ever without a writer who waits for them."""
    token = await made(store, "default")
    readers_store = Store(dsn, connections=AT_ONCE)
    await readers_store.open()
    try:
        async with asked(readers_store) as asking, AsyncExitStack() as stack:
            holder = await stack.enter_async_context(await psycopg.AsyncConnection.connect(dsn))
            await holder.execute("LOCK TABLE tallymark.plan_version IN ACCESS EXCLUSIVE MODE")
            calls = [asyncio.create_task(_code(asking, token)) for _ in range(WAITING)]
            await asyncio.wait(calls, timeout=0.5)
            assert not any(call.done() for call in calls)
            message = request(sum_metric([number(BASE, BASE + SECOND, 3, {"tallymark.account.id": "acme"})]))
            await Pipeline(store, now_ns=lambda: BASE + SECOND).metrics("default", message.SerializeToString())
            await holder.rollback()
            assert [await call for call in calls] == ["OK"] * WAITING
    finally:
        await readers_store.close()


async def test_a_client_that_hangs_up_ends_its_statement(store: Store, dsn: str) -> None:
    await store.write(Batch(points=[point(stream(), 0, 1, 1)]))
    token = await made(store, "default")
    async with asked(store) as asking, AsyncExitStack() as stack:
        holder = await stack.enter_async_context(await psycopg.AsyncConnection.connect(dsn, autocommit=False))
        await holder.execute("LOCK TABLE tallymark.usage_series IN ACCESS EXCLUSIVE MODE")
        call = asyncio.create_task(_code(asking, token))
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as watcher:

            async def until(number: int) -> None:
                for _ in range(600):
                    if await (await watcher.execute(waiting)).fetchone() == (number,):
                        return
                    await asyncio.sleep(0.1)
                raise AssertionError(f"not {number} sessions that wait for a lock, after a minute")

            await until(1)
            call.cancel()
            await until(0)
        await holder.rollback()
        assert await _code(asking, token) == "OK"
