"""Questions take turns, end in time, and keep neither other tenants nor those who write waiting."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager

import grpc
import psycopg
import pytest

from tallymark.v1 import access_pb2, quarantine_pb2, usage_pb2
from tallymark_collector.access import Principal, Scope
from tallymark_collector.api.reading import AT_ONCE, OF_CREDENTIAL, PLACES, TURNS, Kind, Readers
from tallymark_collector.errors import Overloaded, StoreUnavailable, TakesTooLong
from tallymark_collector.model import Batch
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.quarantine import items
from tallymark_collector.quarantine.items import Filter
from tallymark_collector.store import Store
from tallymark_collector.telemetry.requests import Answered
from tests.collector.api.conftest import Asking, asked, made
from tests.support import http2
from tests.support.usage import BASE, SECOND, number, point, request, stream, sum_metric


async def settled() -> None:
    """Lets everybody go on who can."""
    for _ in range(20):
        await asyncio.sleep(0)


def customer(number: int, tenant: str = "ours") -> Principal:
    return Principal(tenant, frozenset({Scope.READ_ACCOUNT}), f"a{number}", f"tmk_{tenant}_{number}")


def staff(number: int = 0, tenant: str = "ours") -> Principal:
    return Principal(tenant, frozenset({Scope.READ, Scope.ADMINISTER}), None, f"tmk_{tenant}_staff_{number}")


class Caller:
    """Holds a turn until it is told to go."""

    def __init__(self, readers: Readers, principal: Principal, *, administers: bool = False) -> None:
        self.has_turn, self.go = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._hold(readers, principal, administers))

    async def _hold(self, readers: Readers, principal: Principal, administers: bool) -> None:
        async with readers.turn(principal, administers=administers):
            self.has_turn.set()
            await self.go.wait()

    async def leave(self) -> None:
        self.go.set()
        await self.task


async def test_customers_leave_their_tenant_its_turns_and_that_leaves_its_administrator_his(store: Store) -> None:
    readers = Readers(store)
    customers = [Caller(readers, customer(number)) for number in range(20)]
    await settled()
    assert sum(caller.has_turn.is_set() for caller in customers) == TURNS[Kind.CUSTOMERS]
    tenant = [Caller(readers, staff(number)) for number in range(20)]
    await settled()
    assert sum(caller.has_turn.is_set() for caller in tenant) == TURNS[Kind.TENANT]
    administrator = Caller(readers, staff(), administers=True)
    await settled()
    assert administrator.has_turn.is_set()
    for caller in (*customers, *tenant, administrator):
        await caller.leave()


async def test_tenants_take_turns(store: Store) -> None:
    readers = Readers(store)
    ours, theirs = ([Caller(readers, staff(n, tenant)) for n in range(8)] for tenant in ("ours", "theirs"))
    ours, theirs = [*ours], [*theirs]
    await settled()
    assert sum(caller.has_turn.is_set() for caller in (*ours, *theirs)) == 2 * TURNS[Kind.TENANT] == AT_ONCE
    late = Caller(readers, staff(tenant="late"))
    await settled()
    assert not late.has_turn.is_set()
    await ours[0].leave()
    await settled()
    assert late.has_turn.is_set()  # it came before our next one could ask for that turn
    for caller in (*ours, *theirs, late):
        await caller.leave()


async def test_places_are_bounded_by_credential_and_kind(store: Store) -> None:
    readers = Readers(store)
    with ExitStack() as places:
        for _ in range(OF_CREDENTIAL):
            places.enter_context(readers.place(customer(0)))
        with pytest.raises(Overloaded, match=f"{OF_CREDENTIAL} questions of this credential"):
            places.enter_context(readers.place(customer(0)))
        for number in range(PLACES[Kind.CUSTOMERS] - OF_CREDENTIAL):
            places.enter_context(readers.place(customer(1 + number)))
        with pytest.raises(Overloaded, match=f"{PLACES[Kind.CUSTOMERS]} questions of this tenant"):
            places.enter_context(readers.place(customer(100)))
        # The tenant's own, its administrator's and others' places are their own.
        places.enter_context(readers.place(staff()))
        places.enter_context(readers.place(staff(), administers=True))
        places.enter_context(readers.place(customer(0, "theirs")))
    assert not readers._places


async def test_who_hangs_up_while_waiting_takes_no_turn(store: Store) -> None:
    readers = Readers(store)
    callers = [Caller(readers, staff()) for _ in range(TURNS[Kind.TENANT] + 2)]
    await settled()
    callers[TURNS[Kind.TENANT]].task.cancel()
    await settled()
    await callers[0].leave()
    await settled()
    assert callers[-1].has_turn.is_set()
    for caller in (callers[1], callers[-1]):
        await caller.leave()


async def test_a_statement_that_takes_too_long_is_given_up(store: Store) -> None:
    readers = Readers(store, seconds=0.2)
    with pytest.raises(TakesTooLong, match=r"more than 0\.2 s: ask for a shorter range"):
        async with readers.reading(staff()) as connection:
            await connection.execute("SELECT pg_sleep(60)")
    # The connection is as good as before, without the limit.
    async with store.reading() as connection:
        assert await (await connection.execute("SHOW statement_timeout")).fetchone() == ("0",)


async def test_a_reader_writes_nothing(store: Store) -> None:
    with pytest.raises(StoreUnavailable) as refused:
        async with Readers(store).reading(staff()) as connection:
            await connection.execute("DELETE FROM usage_point")
    assert isinstance(refused.value.__cause__, psycopg.errors.ReadOnlySqlTransaction)


@pytest.mark.parametrize("table", ["plan_version", "usage_series"])
async def test_over_grpc_it_is_a_deadline(store: Store, dsn: str, monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    """Whether a question waits, or already for what is behind the views."""
    monkeypatch.setattr(Readers.__init__, "__defaults__", (1.0,))
    token = await made(store, "ours")
    async with asked(store) as asking, holding(dsn, table):
        with pytest.raises(grpc.aio.AioRpcError, match="the answer takes more than 1 s") as error:
            await asking.usage(token)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asked(store) as asking:
        await asking.usage(token)


async def test_a_decision_waits_no_longer_than_a_question(
    store: Store, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Readers.__init__, "__defaults__", (1.0,))
    token = await made(store, "default", [Scope.ADMINISTER])
    message = request(sum_metric([number(BASE, BASE + SECOND, 3, {"n": 1})], name="m"), scope="tallymark")
    await Pipeline(store, now_ns=lambda: BASE + SECOND).metrics("default", message.SerializeToString())
    async with store.reading() as connection:
        [item] = await items.open_items(connection, Filter("default"), 10)
    discard = quarantine_pb2.DiscardItemRequest(id=item.id, because="a test")
    service = "tallymark.v1.QuarantineService"
    async with asked(store) as asking:
        async with holding(dsn, "quarantine_action"):
            assert await asking.code(service, "DiscardItem", discard, token) == "DEADLINE_EXCEEDED"
        assert (await asking.call(service, "DiscardItem", discard, token)).done_now


@asynccontextmanager
async def holding(dsn: str, table: str) -> AsyncIterator[None]:
    """Nobody else reads the table."""
    async with await psycopg.AsyncConnection.connect(dsn) as holder:
        await holder.execute(f"LOCK TABLE tallymark.{table} IN ACCESS EXCLUSIVE MODE")  # type: ignore[arg-type]
        yield
        await holder.rollback()


async def test_more_than_there_are_places_for_are_told_to_come_again(store: Store, dsn: str) -> None:
    token = await made(store, "ours")
    async with asked(store) as asking:
        async with holding(dsn, "plan_version"):
            calls = [asyncio.create_task(_code(asking, token)) for _ in range(OF_CREDENTIAL + 3)]
            refused, _ = await asyncio.wait(calls, timeout=60, return_when=asyncio.FIRST_COMPLETED)
            while len(refused) < 3:
                more, _ = await asyncio.wait(set(calls) - refused, timeout=60, return_when=asyncio.FIRST_COMPLETED)
                assert more
                refused |= more
        codes = Counter([await call for call in calls])
    assert codes == {"UNAVAILABLE": 3, "OK": OF_CREDENTIAL}


async def _code(asking: Asking, token: str) -> str:
    try:
        await asking.usage(token)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


async def test_answers_that_nobody_reads_are_no_more_than_a_credential_s_places(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC keeps what was written until it is read, even where the call is ended."""
    one, other = [await made(store, "default", [Scope.READ_ACCOUNT], account="acme") for _ in range(2)]
    long = [stream(**{"http.route": f"{n:04}{'r' * 4000}"}) for n in range(200)]
    await store.write(Batch(points=[point(each, 0, 1, 1) for each in long]))
    asked_for = usage_pb2.QueryUsageRequest(group_by=["route"])
    body = asked_for.SerializeToString()
    # A client that has no room for anything.
    monkeypatch.setattr(http2, "PREFACE", http2.PREFACE[:24] + http2.frame(4, 0, 0, struct.pack(">HI", 4, 0)))
    async with asked(store) as asking, http2.dialled(asking.port) as client:
        for _ in range(OF_CREDENTIAL * 3):
            path = "/tallymark.v1.UsageService/QueryUsage"
            call = client.call(path, ("authorization", f"Bearer {one}"))
            await client.send(call, http2.announced(len(body)) + body, end=True)
        for _ in range(600):
            if asking.requests.answered.total() == OF_CREDENTIAL * 2:
                break
            await asyncio.sleep(0.1)
        # The rest wait for the client; whoever else asks is answered.
        assert {each.answer: n for each, n in asking.requests.answered.items()} == {"UNAVAILABLE": OF_CREDENTIAL * 2}
        assert await asking.code("tallymark.v1.UsageService", "QueryUsage", asked_for, one) == "UNAVAILABLE"
        assert len((await asking.usage(other, group_by=["route"])).rows) == 200
    # It has hung up: its places are free.
    async with asked(store) as asking:
        assert len((await asking.usage(one, group_by=["route"])).rows) == 200


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


async def test_messages_that_never_end_keep_no_administrator_waiting(store: Store) -> None:
    one = await made(store, "ours", [Scope.READ_ACCOUNT], account="acme")
    admin = await made(store, "ours", [Scope.ADMINISTER])
    async with asked(store) as asking, http2.dialled(asking.port) as client:
        for _ in range(OF_CREDENTIAL):
            call = client.call("/tallymark.v1.UsageService/QueryUsage", ("authorization", f"Bearer {one}"))
            await client.push(call, http2.announced(1000) + b"x")
        service = "tallymark.v1.AccessService"
        revoke = access_pb2.RevokeCredentialRequest(name=one)
        assert (await asking.call(service, "RevokeCredential", revoke, admin)).state == "revoked"
        # Before the first of these messages was given up.
        assert not asking.requests.answered[Answered("ours", "grpc", "usage", "UNAVAILABLE", "SlowBody")]


async def test_messages_that_never_end_keep_no_other_customer_waiting(store: Store) -> None:
    one, other = [await made(store, "ours", [Scope.READ_ACCOUNT], account=name) for name in ("acme", "globex")]
    async with asked(store) as asking, http2.dialled(asking.port) as client:
        for _ in range(OF_CREDENTIAL):
            call = client.call("/tallymark.v1.UsageService/QueryUsage", ("authorization", f"Bearer {one}"))
            await client.push(call, http2.announced(1000) + b"x")
        for _ in range(5):
            await asking.usage(other)
        assert not asking.requests.answered[Answered("ours", "grpc", "usage", "UNAVAILABLE", "SlowBody")]
