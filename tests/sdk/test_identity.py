"""Whom usage belongs to: never somebody else, whatever threads and tasks do."""

from __future__ import annotations

import asyncio
import contextvars
import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from types import FrameType

import anyio.to_thread
import pytest

from tallymark import identify, identity, record
from tallymark.calls import Call
from tallymark.identity import MAX_IDENTITY_LENGTH, Identity, current_identity
from tallymark.integrations.serving import serving
from tallymark.testing import capture_usage


@pytest.fixture(autouse=True)
def nobody() -> None:
    identify(account=None, user=None, plan=None)


def test_fields_not_given_stay() -> None:
    identify(account="acme", plan="pro")
    identify(user="u-1")
    assert current_identity() == Identity("acme", "u-1", "pro")


def test_a_plan_does_not_follow_to_another_account() -> None:
    identify(plan="free")
    identify(account="acme")
    assert current_identity().plan == "free"
    identify(account="acme")
    assert current_identity().plan == "free"
    identify(account="globex")
    assert current_identity() == Identity("globex", None, None)


def test_a_block_restores_what_was_before() -> None:
    identify(account="acme")
    with identify(account="globex", user="u") as inside:
        assert inside == current_identity() == Identity("globex", "u", None)
        with identify(user="v"):
            assert current_identity() == Identity("globex", "v", None)
        identify(account="initech")
    assert current_identity() == Identity("acme", None, None)
    with pytest.raises(ZeroDivisionError), identify(account="globex"):
        _ = 1 / 0
    assert current_identity().account == "acme"


BAD = ["", "x" * (MAX_IDENTITY_LENGTH + 1), 7, b"acme", "a\0b", "\ud800", object(), ["acme"], 1.5, True]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_account_is_nobodys_and_never_the_one_before(bad: object, caplog: pytest.LogCaptureFixture) -> None:
    with capture_usage() as usage:
        identify(account="acme", plan="pro")
        identify(account=bad)  # type: ignore[arg-type]
        record("calls", 3)
    assert usage.total("calls", account=None) == usage.total("calls") == 3
    assert [u.plan for u in usage] == [None]
    assert "account must be a str" in caplog.text


def test_none_says_nobody() -> None:
    identify(account="acme")
    identify(account=None)
    assert current_identity().account is None


def test_bad_users_and_plans_cost_no_account() -> None:
    identify(account="acme", user=5, plan="")  # type: ignore[arg-type]
    assert current_identity() == Identity("acme")


def test_texts_of_other_classes_become_plain() -> None:
    class Account(str):
        def __hash__(self) -> int:
            raise RuntimeError

    identify(account=Account("acme"))
    assert type(current_identity().account) is str


def test_the_longest_account_is_taken() -> None:
    identify(account="é" * MAX_IDENTITY_LENGTH)
    assert current_identity().account == "é" * MAX_IDENTITY_LENGTH


async def test_threads_and_tasks_keep_to_themselves() -> None:
    accounts = [f"account-{n}" for n in range(40)]
    each = 25

    async def task(account: str) -> None:
        identify(account=account)
        for _ in range(each):
            await asyncio.sleep(0)
            record("calls")
            if random.random() < 0.3:
                await asyncio.to_thread(record, "calls", 1)
            else:
                await anyio.to_thread.run_sync(record, "calls")

    def thread(half: list[str]) -> None:
        async def main() -> None:
            await asyncio.gather(*(task(account) for account in half))

        asyncio.run(main())

    with capture_usage() as usage:
        threads = [threading.Thread(target=thread, args=(accounts[n::4],)) for n in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            await asyncio.to_thread(one.join)
    assert {a: usage.total("calls", account=a) for a in accounts} == dict.fromkeys(accounts, 2 * each)
    assert usage.total("calls") == 2 * each * len(accounts)


def test_executors_leave_the_account_behind_unless_the_context_is_handed_over() -> None:
    async def main() -> None:
        identify(account="acme")
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(record, "to_thread")
        await loop.run_in_executor(None, record, "bare")
        await loop.run_in_executor(None, contextvars.copy_context().run, record, "handed_over")
        with ThreadPoolExecutor(1) as pool:
            await asyncio.wrap_future(pool.submit(record, "submitted"))

    with capture_usage() as usage:
        asyncio.run(main())
    assert {u.meter: u.account for u in usage} == {
        "to_thread": "acme",
        "bare": None,
        "handed_over": "acme",
        "submitted": None,
    }


async def test_in_a_request_tasks_see_the_account_they_were_started_under() -> None:
    seen: list[str | None] = []

    async def child() -> None:
        await asyncio.sleep(0.01)
        seen.append(current_identity().account)

    with serving(Call()):
        tasks = []
        for account in ("a", "b", "c"):
            identify(account=account)
            tasks.append(asyncio.create_task(child()))
        await asyncio.gather(*tasks)
    assert sorted(filter(None, seen)) == ["a", "b", "c"]


async def test_in_a_request_a_worker_thread_identifies_for_the_request() -> None:
    with serving(Call()):
        await anyio.to_thread.run_sync(lambda: identify(account="acme"))
        assert current_identity().account == "acme"
        await anyio.to_thread.run_sync(lambda: identify(user="u-1"))
        assert current_identity() == Identity("acme", "u-1")
        identify(plan="pro")
        assert current_identity() == Identity("acme", "u-1", "pro")
        await anyio.to_thread.run_sync(lambda: identify(account="globex"))
        assert current_identity().account == "globex"
    assert current_identity() == Identity()


async def test_a_bad_account_in_a_worker_thread_ends_the_one_before() -> None:
    with serving(Call()):
        identify(account="acme")
        await anyio.to_thread.run_sync(lambda: identify(account=""))
        assert current_identity().account is None


async def test_outside_a_request_a_worker_thread_is_on_its_own() -> None:
    await anyio.to_thread.run_sync(lambda: identify(account="acme"))
    assert current_identity().account is None


async def test_in_a_request_parallel_workers_keep_their_own() -> None:
    at_once = threading.Barrier(4)
    wrong: list[str] = []

    def work(account: str) -> None:
        with identify(account=account):
            at_once.wait()
            for _ in range(50):
                if current_identity().account != account:
                    wrong.append(account)
            at_once.wait()

    with serving(Call()):
        identify(account="request")
        await asyncio.gather(*(anyio.to_thread.run_sync(work, a) for a in "abcd"))
        assert wrong == []
        assert current_identity().account == "request"
        await asyncio.gather(*(asyncio.to_thread(identify, account=a) for a in "abcd"))
        assert current_identity().account == "request"


async def test_a_block_in_a_worker_thread_holds_until_its_end() -> None:
    """As the two halves of a synchronous dependency with `yield` run, each in a copied context."""
    with serving(Call()):
        block = await anyio.to_thread.run_sync(lambda: identify(account="acme"))
        await anyio.to_thread.run_sync(block.__enter__)
        assert current_identity().account == "acme"
        await anyio.to_thread.run_sync(lambda: block.__exit__(None, None, None))
        assert current_identity().account is None


async def test_what_a_block_in_a_worker_thread_covers_is_in_force_again_at_its_end() -> None:
    def block() -> None:
        with identify(account="globex"):
            for _ in range(5):
                identify(user="u")

    with serving(Call()):
        for _ in range(5):
            await anyio.to_thread.run_sync(lambda: identify(account="acme"))
        await anyio.to_thread.run_sync(block)
        assert current_identity() == Identity("acme")
        kept = await anyio.to_thread.run_sync(lambda: identify(account="initech"))
        await anyio.to_thread.run_sync(lambda: identify(user="u"))
        await anyio.to_thread.run_sync(kept.__enter__)
        await anyio.to_thread.run_sync(lambda: kept.__exit__(None, None, None))
        assert current_identity() == Identity("initech", "u")


def _with_block(account: str) -> None:
    with identify(account=account):
        assert current_identity().account == account


def _without_block(account: str) -> None:
    identify(account=account)


@pytest.mark.parametrize("work", [_with_block, _without_block])
@pytest.mark.parametrize("renewed", [None, "block", "plain"])
@pytest.mark.parametrize("overlapping", [False, True])
async def test_a_long_call_does_not_keep_everybody_that_its_worker_threads_named(
    work: Callable[[str], None], renewed: str | None, overlapping: bool
) -> None:
    """As a websocket does that handles each message in a worker thread, or in several at once."""
    longest = 0
    call = Call()
    with serving(call), ExitStack() as blocks:
        for n in range(1_000):
            if renewed == "plain":
                identify(account=f"loop-{n}")
            with identify(account=f"loop-{n}") if renewed == "block" else nullcontext():
                if overlapping:  # the one before is still open when this one begins
                    before = blocks.pop_all()
                    blocks.enter_context(await anyio.to_thread.run_sync(lambda: identify(account="slow")))
                    before.close()
                await anyio.to_thread.run_sync(work, f"a{n % 7}")
                longest = max(longest, len(call.published))
        assert longest <= 2 * identity.FEW


@pytest.mark.parametrize("entered", [True, False])
async def test_identify_costs_the_same_however_many_identities_of_a_call_are_open(entered: bool) -> None:
    """Counted in lines that are executed, of all calls together: with the square of their number, or more, one call of
    `identify()` among 800 took 25 ms."""

    async def lines(count: int) -> int:
        found = 0

        def trace(frame: FrameType, event: str, _: object) -> Callable[..., object]:
            nonlocal found
            found += event == "line" and frame.f_code.co_filename == identity.__file__
            return trace

        def identified(n: int) -> None:
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                one = identify(account=f"a{n}")
            finally:
                sys.settrace(before)
            if entered:
                blocks.enter_context(one)
            else:
                blocks.callback(lambda: one)

        with serving(Call()), ExitStack() as blocks:
            for n in range(count):
                await anyio.to_thread.run_sync(identified, n)
        return found

    assert await lines(800) < 2.5 * await lines(400)


def test_a_request_starts_with_nobody_and_leaves_nobody_behind() -> None:
    identify(account="the request before")
    with serving(Call()):
        assert current_identity() == Identity()
        identify(account="acme")
    assert current_identity().account == "the request before"


def test_executors_keep_plain_context_semantics() -> None:
    identify(account="acme")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: current_identity().account).result() is None
        context = contextvars.copy_context()
        assert pool.submit(context.run, lambda: current_identity().account).result() == "acme"


async def test_a_call_knows_who_was_identified_last_and_still_is() -> None:
    """In tasks of its own, as a middleware in between runs the handler."""

    async def handler() -> None:
        identify(account="acme")
        with identify(account="globex"):
            identify(user="u-1")

    call = Call()
    with serving(call):
        await asyncio.create_task(handler())
        assert call.identified is not None
        assert call.identified.identity == Identity("acme")
        with identify(account="initech"):
            pass
        assert call.identified.identity == Identity()
