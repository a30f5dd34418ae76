"""Decorated generators: their consumers notice nothing, and each counts once, when it ends, with how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import sys
import threading
import types
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallymark import identify, track_usage
from tallymark.assembly import Runtime
from tallymark.integrations.serving import serving
from tallymark.testing import capture_usage
from tests.sdk.handlers import HTTP, Get, errors, only


@pytest.fixture(autouse=True)
def _own_meters(fresh: Runtime) -> None:
    identify(account="acme")


class ThrownError(Exception):
    pass


THROWN = [ThrownError("a"), KeyError("b"), StopIteration("c"), StopAsyncIteration("d"), GeneratorExit("e")]
ERROR = ValueError("of the body")

reactions = st.sampled_from(["propagate", "swallow", "return", "other"])
plans = st.lists(reactions, max_size=4)
endings = st.sampled_from(["return", "raise"])
step = st.one_of(
    st.just(("next", None)),
    st.tuples(st.just("send"), st.integers()),
    st.tuples(st.just("throw"), st.integers(0, len(THROWN) - 1)),
    st.just(("close", None)),
)
scripts = st.lists(step, max_size=8)


def name_of(error: BaseException) -> object:
    """The same for the same object, else what it says."""
    known = [id(e) for e in (*THROWN, ERROR)]
    return known.index(id(error)) if id(error) in known else (type(error).__name__, str(error))


def body(log: list[object], plan: list[str], ending: str) -> Iterator[Any]:
    try:
        for n, reaction in enumerate(plan):
            try:
                log.append(("got", (yield ("item", n))))
            except BaseException as error:
                log.append(("caught", name_of(error)))
                if "dropped" in log:  # whatever it did then, nobody would see
                    raise
                if reaction == "swallow":
                    continue
                if reaction == "return":
                    return ("early", n)
                if reaction == "other":
                    raise LookupError(n) from None
                raise
        if ending == "raise":
            raise ERROR
        return "done"
    finally:
        log.append(("ended with", getattr(sys.exc_info()[0], "__name__", None)))


async def async_body(log: list[object], plan: list[str], ending: str) -> AsyncIterator[Any]:
    try:
        for n, reaction in enumerate(plan):
            try:
                log.append(("got", (yield ("item", n))))  # type: ignore[func-returns-value]
                await asyncio.sleep(0)
            except BaseException as error:
                log.append(("caught", name_of(error)))
                await asyncio.sleep(0)
                if reaction == "swallow" and not isinstance(error, GeneratorExit):  # it could never be closed again
                    continue
                if reaction == "return":
                    return
                if reaction == "other":
                    raise LookupError(n) from None
                raise
        if ending == "raise":
            raise ERROR
    finally:
        await asyncio.sleep(0)
        log.append(("ended with", getattr(sys.exc_info()[0], "__name__", None)))


def observe(make: Callable[..., Any], plan: list[str], ending: str, script: list[Any]) -> list[object]:
    log: list[object] = []
    generator = make(log, plan, ending)
    for action, value in script:
        try:
            if action == "next":
                log.append(("value", next(generator)))
            elif action == "send":
                log.append(("value", generator.send(value)))
            elif action == "throw":
                log.append(("value", generator.throw(THROWN[value])))
            else:
                log.append(("closed", generator.close()))
        except BaseException as error:
            log.append(("raised", name_of(error)))
    log.append("dropped")
    del generator  # the interpreter closes it at once
    return log


async def async_observe(make: Callable[..., Any], plan: list[str], ending: str, script: list[Any]) -> list[object]:
    log: list[object] = []
    generator = make(log, plan, ending)
    for action, value in script:
        try:
            if action == "next":
                log.append(("value", await generator.__anext__()))
            elif action == "send":
                log.append(("value", await generator.asend(value)))
            elif action == "throw":
                log.append(("value", await generator.athrow(THROWN[value])))
            else:
                log.append(("closed", await generator.aclose()))
        except BaseException as error:
            log.append(("raised", name_of(error)))
    with contextlib.suppress(BaseException):
        await generator.aclose()
    return log


def ended_with(log: list[object], *made_runtime_errors: str) -> dict[object, object]:
    """`error.type` of how the body ended; PEP 479 turns some errors into a RuntimeError."""
    (name,) = (entry[1] for entry in log if isinstance(entry, tuple) and entry[0] == "ended with")
    return {"RuntimeError" if name in made_runtime_errors else name: 1}


@given(plans, endings, scripts)
def test_a_consumer_sees_what_it_sees_of_the_bare_generator(plan: list[str], ending: str, script: list[Any]) -> None:
    bare = observe(body, plan, ending, script)
    with capture_usage() as usage:
        decorated = observe(track_usage("m")(body), plan, ending, script)
        counted = errors(usage)
    assert decorated == bare
    if "ended with" in str(bare):
        assert counted == ended_with(bare, "StopIteration")


def test_a_consumer_sees_what_it_sees_of_the_bare_async_generator(
    event_loop_runner: asyncio.AbstractEventLoop,
) -> None:
    run = event_loop_runner.run_until_complete

    @given(plans, endings, scripts)
    def test(plan: list[str], ending: str, script: list[Any]) -> None:
        bare = run(async_observe(async_body, plan, ending, script))
        with capture_usage() as usage:
            decorated = run(async_observe(track_usage("m")(async_body), plan, ending, script))
            counted = errors(usage)
        assert decorated == bare
        if "ended with" in str(bare):
            assert counted == ended_with(bare, "StopIteration", "StopAsyncIteration")

    test()


def test_one_that_was_never_started_counts_nothing() -> None:
    @track_usage("m")
    def generator() -> Iterator[int]:
        yield 1

    with capture_usage() as usage:
        generator().close()  # type: ignore[attr-defined]
        with pytest.raises(ThrownError):
            generator().throw(ThrownError())  # type: ignore[attr-defined]
        del generator
        gc.collect()
    assert list(usage) == []


def test_the_last_item_lives_no_longer_than_its_consumer_lets_it() -> None:
    class Item:
        pass

    @track_usage("m")
    def generator() -> Iterator[Item]:
        yield Item()

    @track_usage("m")
    async def asynchronous() -> AsyncIterator[Item]:
        yield Item()

    async def first() -> tuple[Any, Item]:
        items = asynchronous()
        return items, await items.__anext__()

    items = generator()
    item = next(items)
    seen = weakref.ref(item)
    del item
    assert seen() is None
    loop = asyncio.new_event_loop()
    more, item = loop.run_until_complete(first())
    seen = weakref.ref(item)
    del item
    assert seen() is None
    loop.run_until_complete(more.aclose())
    loop.close()


class Held:
    """Something in a handler's variables."""


def test_an_exception_keeps_nothing_alive_longer_than_without_a_decorator() -> None:
    alive: list[weakref.ref[Held]] = []

    def fails(*args: object) -> None:
        held = Held()
        alive.append(weakref.ref(held))
        raise ThrownError

    def generator() -> Iterator[int]:
        held = Held()
        alive.append(weakref.ref(held))
        try:
            yield 1
        except ThrownError:
            yield 2
        fails()

    async def asynchronous() -> None:
        fails()

    async def async_generator() -> AsyncIterator[int]:
        for item in generator():
            yield item

    async def consume() -> None:
        async for _ in track_usage("m")(async_generator)():
            pass

    def throw() -> None:  # into a generator that goes on
        items = track_usage("m")(generator)()
        next(items)
        items.throw(ThrownError())  # type: ignore[attr-defined]
        next(items)

    subjects: list[Callable[[], object]] = [
        track_usage("m")(fails),
        track_usage("results", lambda result: 1)(fails),
        track_usage("other")(fails),
        lambda: list(track_usage("m")(generator)()),
        throw,
        lambda: track_usage("m")(asynchronous)().send(None),  # type: ignore[attr-defined]
        lambda: consume().send(None),
    ]
    gc.collect()
    gc.disable()
    try:
        for n, subject in enumerate(subjects):
            for call in (None, Get()):
                with contextlib.suppress(ThrownError), capture_usage():
                    if call is None:
                        subject()
                    else:
                        with serving(call):
                            subject()
                assert not [ref for ref in alive if ref() is not None], (n, call)
    finally:
        gc.enable()


def test_an_abandoned_generator_belongs_to_whoever_consumed_it() -> None:
    @track_usage("m")
    def generator() -> Iterator[int]:
        yield 1
        yield 2

    def consume() -> None:
        with serving(Get()):
            identify(account="acme")
            items = generator()
            next(items)
            circle = [items]
            circle.append(circle)  # type: ignore[arg-type]

    gc.collect()
    with capture_usage() as usage:
        gc.disable()
        contextvars.Context().run(consume)
        assert list(usage) == []
        gc.enable()
        with serving(Get()):
            identify(account="globex")
            gc.collect()
    assert usage.total("m", account="acme") == 1
    assert only(usage) == {**HTTP, "error.type": "GeneratorExit"}


def test_a_generator_closed_in_its_own_request_belongs_to_who_is_identified_then() -> None:
    @track_usage("m")
    def generator() -> Iterator[int]:
        yield 1

    with capture_usage() as usage, serving(Get()):
        items = generator()
        next(items)
        identify(account="late")
        items.close()  # type: ignore[attr-defined]
    assert usage.total("m", account="late") == 1


def test_an_abandoned_async_generator_is_closed_by_the_loop_and_belongs_to_its_consumer() -> None:
    ended: list[None] = []

    @track_usage("m")
    async def generator() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            ended.append(None)

    async def consume(account: str) -> None:
        with serving(Get()):
            identify(account=account)
            async for _ in generator():
                break

    async def main() -> None:
        await asyncio.gather(consume("acme"), consume("globex"))
        identify(account="other")
        for _ in range(100):
            if len(ended) == 2:
                break
            gc.collect()
            await asyncio.sleep(0)
        assert len(ended) == 2, "what is left is closed with the loop"

    with capture_usage() as usage:
        asyncio.run(main())
    assert {u.account: u.quantity for u in usage} == {"acme": 1, "globex": 1}
    assert errors(usage) == {"GeneratorExit": 2}


def test_an_async_generator_without_a_loop_is_counted_when_it_is_destroyed() -> None:
    @track_usage("m")
    async def generator() -> AsyncIterator[int]:
        yield 1

    def consume() -> None:
        identify(account="acme")
        items = generator()
        with pytest.raises(StopIteration):
            items.__anext__().send(None)  # type: ignore[attr-defined]

    with capture_usage() as usage:
        contextvars.Context().run(consume)
        gc.collect()
    assert usage.total("m", account="acme") == 1


async def test_cancelling_the_consumer_of_an_async_generator() -> None:
    waiting = asyncio.Event()
    cleaned: list[str] = []

    @track_usage("m")
    async def generator() -> AsyncIterator[int]:
        try:
            yield 1
            waiting.set()
            await asyncio.Event().wait()
        finally:
            cleaned.append("up")

    async def consume() -> None:
        async for _ in generator():
            pass

    with capture_usage() as usage:
        task = asyncio.create_task(consume())
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert cleaned == ["up"]
    assert errors(usage) == {"CancelledError": 1}


async def test_a_coroutine_that_is_collected_halfway_belongs_to_whoever_began_it() -> None:
    @track_usage("m")
    async def handler() -> None:
        await asyncio.Event().wait()

    def begin() -> None:
        identify(account="acme")
        handler().send(None)

    loop_future = asyncio.get_running_loop().create_future()
    loop_future.cancel()
    with capture_usage() as usage:
        contextvars.Context().run(begin)
        gc.collect()
    assert usage.total("m", account="acme") == 1
    assert errors(usage) == {"GeneratorExit": 1}


def test_context_managers_over_decorated_generators() -> None:
    @contextlib.contextmanager
    @track_usage("m")
    def session(fails: bool) -> Iterator[str]:
        try:
            yield "session"
        except ThrownError:
            if fails:
                raise

    @contextlib.asynccontextmanager
    @track_usage("m")
    async def async_session() -> AsyncIterator[str]:
        yield "session"

    async def main() -> None:
        async with async_session() as s:
            assert s == "session"
        error = ThrownError()
        with pytest.raises(ThrownError) as caught:
            async with async_session():
                raise error
        assert caught.value is error

    with capture_usage() as usage:
        with session(False) as s:
            assert s == "session"
            raise ThrownError
        error = ThrownError()
        with pytest.raises(ThrownError) as caught, session(True):
            raise error
        assert caught.value is error
        asyncio.run(main())
    assert errors(usage) == {None: 2, "ThrownError": 2}


def test_results_that_are_coroutines_and_generators_are_followed() -> None:
    def sync_over_async(fails: bool = False) -> Any:
        async def inner() -> str:
            await asyncio.sleep(0)
            if fails:
                raise ThrownError
            return "result"

        return inner()

    def generator() -> Any:
        return (n for n in range(3))

    async def async_generator() -> Any:
        async def inner() -> AsyncIterator[int]:
            yield 1
            yield 2

        return inner()

    for more in ({}, {"attributes": {"a": 1}}, {"billable": lambda call: True}):
        follow: Any = track_usage("m", **more)  # type: ignore[arg-type]
        with capture_usage() as usage:
            coroutine = follow(sync_over_async)()
            assert inspect.iscoroutine(coroutine)
            assert coroutine.__name__ == "inner"
            assert list(usage) == []
            assert asyncio.run(coroutine) == "result"
            assert usage.total("m") == 1
            with pytest.raises(ThrownError):
                asyncio.run(follow(sync_over_async)(True))
            assert errors(usage) == {None: 1, "ThrownError": 1}
            items = follow(generator)()
            assert inspect.isgenerator(items)
            assert next(items) == 0
            assert usage.total("m") == 2
            assert list(items) == [1, 2]
            assert usage.total("m") == 3

            async def main() -> list[int]:
                return [item async for item in await follow(async_generator)()]  # noqa: B023

            assert asyncio.run(main()) == [1, 2]
        assert usage.total("m") == 4


def test_a_followed_coroutine_that_is_closed_before_it_began_complains_no_more_than_the_bare_one() -> None:
    async def inner() -> None: ...

    @track_usage("m")
    def handler() -> Any:
        return inner()

    with capture_usage() as usage:
        handler().close()
        gc.collect()
    assert list(usage) == []
    with pytest.warns(RuntimeWarning, match="never awaited") as warned:
        handler()  # dropped at once
    assert len(warned) == 1


async def test_generator_based_coroutines_stay_awaitable() -> None:
    @types.coroutine
    def sleeps() -> Iterator[None]:
        yield
        return "slept"  # type: ignore[return-value]

    def returns() -> Any:
        return sleeps()

    with capture_usage() as usage:
        for function in (sleeps, returns):
            assert await track_usage("m")(function)() == "slept"
    assert usage.total("m") == 2


async def test_iterators_that_are_no_generators_count_when_they_are_returned() -> None:
    class Items:
        def __aiter__(self) -> Items:
            return self

        async def __anext__(self) -> int:
            raise StopAsyncIteration

    items = Items()

    @track_usage("m")
    async def handler() -> Items:
        return items

    @track_usage("m")
    def future() -> asyncio.Future[None]:
        return pending

    pending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    with capture_usage() as usage:
        assert await handler() is items
        assert future() is pending
    assert usage.total("m") == 2


def test_a_generator_consumed_in_several_threads_counts_once() -> None:
    @track_usage("m")
    def numbers() -> Iterator[int]:
        yield from range(20)

    with capture_usage() as usage:
        items = numbers()
        seen: list[int] = []
        for _ in range(20):
            run = contextvars.copy_context().run
            thread = threading.Thread(target=lambda: seen.append(run(next, items)))  # noqa: B023 - joined below
            thread.start()
            thread.join()
        assert seen == list(range(20))
        assert list(items) == []
    assert usage.total("m") == 1


@pytest.mark.parametrize("kept", ["generator", "async_generator"])
def test_a_generator_that_is_open_when_the_process_ends_is_delivered(
    kept: str, collector: Any, run_script: Any
) -> None:
    script = f"""
        import tallymark
        tallymark.configure(interval=60)
        tallymark.identify(account="acme")

        @tallymark.track_usage("generator")
        def generator():
            yield 1

        @tallymark.track_usage("async_generator")
        async def async_generator():
            yield 1

        items = {kept}()
        if "{kept}" == "generator":
            next(items)
        else:
            try: items.__anext__().send(None)
            except StopIteration: pass
        """
    done = run_script(script, TALLYMARK_ENDPOINT=collector.endpoint)
    assert done.returncode == 0
    again = run_script(
        "import tallymark; tallymark.configure(); assert tallymark.flush(60)", TALLYMARK_ENDPOINT=collector.endpoint
    )
    assert (again.returncode, again.stderr) == (0, "")
    assert collector.totals() == {kept: 1}
    assert "Exception ignored" not in done.stderr
