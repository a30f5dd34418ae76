"""Calls of one meter inside each other are one; nothing else that is counted hides anything."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallymark import identify, track_usage, usage
from tallymark.assembly import Runtime
from tallymark.errors import DeclarationError
from tallymark.integrations.serving import Requests, serving
from tallymark.measure import inside
from tallymark.nesting import current_running
from tallymark.testing import capture_usage
from tests.sdk.handlers import Get, errors


@pytest.fixture(autouse=True)
def _own_meters(fresh: Runtime) -> Iterator[None]:
    identify(account="acme")
    yield
    assert current_running.get() is None


calls = st.recursive(
    st.tuples(st.sampled_from("abc"), st.just([])),
    lambda inner: st.tuples(st.sampled_from("abc"), st.lists(inner, max_size=3)),
    max_leaves=12,
)
"""(function, the calls inside of it); functions a and b count by m, c by n."""

METERS = {"a": "m", "b": "m", "c": "n"}


def expected(tree: Any, around: tuple[str, ...] = ()) -> dict[str, int]:
    """A call counts unless a counted call of another function of its meter is around it."""
    name, inner = tree
    counts = not any(METERS[other] == METERS[name] and other != name for other in around)
    totals = {"m": 0, "n": 0}
    totals[METERS[name]] = int(counts)
    for call in inner:
        for meter, n in expected(call, (*around, name) if counts else around).items():
            totals[meter] += n
    return totals


def each_kind() -> dict[str, Callable[[Any], Any]]:
    """Something that runs a tree of calls, for each kind of function."""
    plain: dict[str, Any] = {}
    for name, meter in METERS.items():

        def function(inner: Any) -> None:
            for other, more in inner:
                plain[other](more)

        plain[name] = track_usage(meter)(function)

    asynchronous: dict[str, Any] = {}
    for name, meter in METERS.items():

        async def coroutine(inner: Any) -> None:
            for other, more in inner:
                await asyncio.sleep(0)
                await asynchronous[other](more)

        asynchronous[name] = track_usage(meter)(coroutine)

    generators: dict[str, Any] = {}
    for name, meter in METERS.items():

        def generator(inner: Any) -> Iterator[int]:
            for other, more in inner:
                for _ in generators[other](more):
                    pass
            yield 1

        generators[name] = track_usage(meter)(generator)

    gathered: dict[str, Any] = {}
    for name, meter in METERS.items():

        async def gathering(inner: Any) -> None:
            await asyncio.gather(*(gathered[other](more) for other, more in inner))

        gathered[name] = track_usage(meter)(gathering)

    return {
        "functions": lambda tree: plain[tree[0]](tree[1]),
        "coroutines": lambda tree: asyncio.run(asynchronous[tree[0]](tree[1])),
        "generators": lambda tree: list(generators[tree[0]](tree[1])),
        "tasks": lambda tree: asyncio.run(gathered[tree[0]](tree[1])),
    }


@pytest.mark.parametrize("kind", ["functions", "coroutines", "generators", "tasks"])
def test_any_tree_of_calls(kind: str) -> None:
    run = each_kind()[kind]

    @given(calls)
    def test(tree: Any) -> None:
        with capture_usage() as usage:
            run(tree)
        assert {"m": usage.total("m"), "n": usage.total("n")} == expected(tree)

    test()


def test_stacked_on_one_function_a_meter_counts_once() -> None:
    @track_usage("m", quantity=5)
    @track_usage("n")
    @track_usage("m", quantity=3)
    def handler() -> None: ...

    with capture_usage() as usage:
        handler()
    assert (usage.total("m"), usage.total("n")) == (5, 1)


def test_what_runs_while_a_generator_is_suspended_is_not_inside_of_it() -> None:
    @track_usage("m")
    def one() -> Iterator[int]:
        yield 1
        yield 2

    @track_usage("m")
    def other() -> Iterator[int]:
        yield 1
        yield 2

    @track_usage("m")
    def function() -> None: ...

    with capture_usage() as usage:
        for _ in zip(one(), other(), strict=True):
            function()
    assert usage.total("m") == 4


def test_a_generator_is_inside_of_the_call_that_it_began_in() -> None:
    @track_usage("m")
    def numbers() -> Iterator[int]:
        yield 1
        yield 2

    @track_usage("m")
    def consume(items: Any) -> None:
        list(items)

    with capture_usage() as usage:
        consume(numbers())
        assert usage.total("m") == 1
        items = numbers()
        next(items)
        consume(items)
    assert usage.total("m") == 3


async def test_a_task_that_outlives_the_call_which_began_it_counts_for_itself() -> None:
    go_on = asyncio.Event()

    @track_usage("m")
    async def background() -> None:
        await go_on.wait()

    @track_usage("m")
    async def handler(wait: bool) -> asyncio.Task[None]:
        task = asyncio.create_task(background())
        await asyncio.sleep(0)  # it begins inside
        if wait:
            go_on.set()
            await task
        return task

    with capture_usage() as usage:
        await handler(True)
        assert usage.total("m") == 1
        go_on.clear()
        task = await handler(False)
        assert usage.total("m") == 2
        go_on.set()
        await task
        assert usage.total("m") == 3


def test_threads_with_a_copy_of_the_context_are_inside_as_long_as_the_call_runs() -> None:
    ended = threading.Event()

    @track_usage("m")
    def inner(wait: bool) -> None:
        if wait:
            assert ended.wait(30)

    threads: list[threading.Thread] = []

    @track_usage("m")
    def handler(wait: bool) -> None:
        run = contextvars.copy_context().run
        threads.append(threading.Thread(target=run, args=(inner, wait)))
        threads[-1].start()
        if not wait:
            threads[-1].join()

    with capture_usage() as usage:
        handler(False)
        assert usage.total("m") == 1
        handler(True)
        ended.set()
        threads[-1].join()
    assert usage.total("m") == 3


async def test_calls_side_by_side_count_each() -> None:
    @track_usage("m")
    async def one() -> None:
        await asyncio.sleep(0)

    @track_usage("m")
    async def other() -> None:
        await asyncio.sleep(0)

    with capture_usage() as usage:
        await asyncio.gather(one(), other(), one(), other())
    assert usage.total("m") == 4


def test_a_meter_that_is_declared_again_while_a_call_runs() -> None:
    """The running call cannot be known as one around: for that once both count. Afterwards they are one."""

    @track_usage("m")
    def handler() -> None:
        @track_usage("m")
        def imported_late() -> None: ...

        imported_late()

    with capture_usage() as usage:
        handler()
        assert usage.total("m") == 2
        handler()
    assert usage.total("m") == 3


def test_what_a_middleware_tracks_is_around_the_handler() -> None:
    requests = Requests[None]("test", None, [track_usage("m"), track_usage("n", inside)])

    @track_usage("m")
    def handler() -> None:
        usage.add(2, meter="n")

    with capture_usage() as captured:
        for _ in range(2):
            served = requests.begin(Get(), None)
            identify(account="acme")
            handler()
            served.end()
            served.end()
        handler()
    assert captured.total("m", account="acme") == 3
    assert captured.total("n") == 4


def test_requests_have_neither_arguments_nor_a_result() -> None:
    from tallymark import measure

    for quantity in (len, measure.items, measure.tokens(), measure.argument("x")):
        with pytest.raises(DeclarationError, match="neither arguments nor a result"):
            track_usage(f"meter{id(quantity)}", quantity).of_requests()


def test_generators_that_consume_each_other_end() -> None:
    """Each is resumed in a context that it was running in itself: the chain of what is around must stay one."""
    contexts: list[contextvars.Context] = []

    def body() -> Iterator[int]:
        while True:
            contexts.append(contextvars.copy_context())
            yield 1

    one, other = track_usage("m")(body)(), track_usage("m")(body)()

    @track_usage("m")
    def looks() -> None: ...

    with capture_usage() as captured:
        next(one)
        contexts[0].run(next, other)
        contexts[1].run(next, one)
        contexts[2].run(next, other)
        contexts[0].run(next, one)
        contexts[0].run(looks)
        for items in (one, other):
            items.close()  # type: ignore[attr-defined]
    assert captured.total("m") == 2


async def test_a_chain_of_tasks_stays_short() -> None:
    @track_usage("m")
    async def unused() -> None: ...

    done = asyncio.Event()
    lengths: list[int] = []

    @track_usage("m")
    async def periodic(left: int) -> None:
        length, running = 0, current_running.get()
        while running is not None:
            length, running = length + 1, running.outer
        lengths.append(length)
        if left:
            tasks.append(asyncio.create_task(periodic(left - 1)))
            await asyncio.sleep(0)
        else:
            done.set()

    tasks: list[asyncio.Task[None]] = []
    with capture_usage() as captured:
        await periodic(200)
        await done.wait()
        await asyncio.gather(*tasks)
    assert captured.total("m") == 201
    assert max(lengths) <= 3


async def test_a_tasks_context_keeps_no_arguments_results_or_errors() -> None:
    class Thing:
        pass

    stop = asyncio.Event()
    tasks: list[asyncio.Task[bool]] = []

    @track_usage("unused.m", quantity=1)
    def unused() -> None: ...

    @track_usage("unused.m", quantity=1)
    @track_usage("m", inside)
    async def handler(thing: Thing) -> Thing:
        tasks.append(asyncio.create_task(stop.wait()))
        usage.add(1)
        return Thing()

    with capture_usage():
        thing = Thing()
        kept = [weakref.ref(thing), weakref.ref(await handler(thing))]
        del thing
        gc.collect()
        assert [ref() for ref in kept] == [None, None]
    stop.set()
    await asyncio.gather(*tasks)


async def test_a_coroutine_that_is_driven_in_several_contexts_leaves_them_as_they_were() -> None:
    @track_usage("m")
    async def inner() -> None:
        await asyncio.sleep(0)

    @track_usage("m")
    async def handler() -> None:
        await inner()
        await inner()

    coroutine: Any = handler()
    contexts = [contextvars.Context() for _ in range(3)]
    with capture_usage() as captured:
        contexts[0].run(coroutine.send, None)
        contexts[1].run(coroutine.send, None)
        with pytest.raises(StopIteration):
            contexts[2].run(coroutine.send, None)
        assert captured.total("m") >= 1
        for context in contexts:
            task = asyncio.get_running_loop()
            assert task is not None
            before = captured.total("m")
            context.run(track_usage("m")(lambda: None))
            assert captured.total("m") == before + 1


def test_async_generators_interleaved_in_one_task() -> None:
    @track_usage("m")
    async def one() -> AsyncIterator[int]:
        yield 1
        yield 2

    @track_usage("m")
    async def other() -> AsyncIterator[int]:
        async for item in one():
            yield item

    async def main() -> None:
        apart, around = one(), other()
        assert await apart.__anext__() == 1
        assert [item async for item in around] == [1, 2]
        assert [item async for item in apart] == [2]

    with capture_usage() as captured:
        asyncio.run(main())
    assert captured.total("m") == 2
    assert errors(captured) == {None: 2}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_worker_that_was_forked_inside_a_call_counts(collector: Any, run_script: Any) -> None:
    """A pool starts its processes when it is first used, which may be inside of a request."""
    done = run_script(
        """
        import os, tallymark
        from tallymark import measure
        from tallymark.calls import HttpCall
        from tallymark.integrations.serving import serving
        tallymark.configure(interval=60)

        @tallymark.track_usage("m")
        def work(): ...

        @tallymark.track_usage("errors")
        def fails(): raise ValueError

        @tallymark.track_usage("m")
        def handler():
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    tallymark.identify(account="globex")
                    work()
                    try: fails()
                    except ValueError: pass
                    code = 0 if tallymark.flush(60) else 2
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

        with serving(HttpCall()):
            tallymark.identify(account="acme")
            handler()
        assert tallymark.flush(60)
        """,
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert collector.totals() == {"m": 2, "errors": 1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("in_request", [True, False])
def test_a_worker_keeps_the_account_of_the_program_but_not_of_the_request_it_was_forked_in(
    in_request: bool, run_script: Any
) -> None:
    done = run_script(
        f"""
        import contextlib, os, tallymark
        from tallymark.calls import HttpCall
        from tallymark.identity import current_identity
        from tallymark.integrations.serving import serving

        with serving(HttpCall()) if {in_request} else contextlib.nullcontext():
            tallymark.identify(account="acme")
            pid = os.fork()
            if pid == 0:
                os._exit(7 if current_identity().account == "acme" else 9)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """
    )
    assert (done.stdout, done.stderr) == ("9\n" if in_request else "7\n", "")


async def test_a_call_that_ends_while_a_thread_of_it_ends_loses_nothing() -> None:
    """What waits for a request's end is counted, whichever of the two comes first."""
    import sys

    @track_usage("m")
    def fails() -> None:
        raise ValueError

    def thread(call: Get, begun: threading.Barrier) -> None:
        from tallymark.calls import current_call

        current_call.set(call)
        begun.wait(30)
        with contextlib.suppress(ValueError):
            fails()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with capture_usage() as captured:
            for _ in range(300):
                call, begun = Get(), threading.Barrier(2)
                running = threading.Thread(target=contextvars.Context().run, args=(thread, call, begun))
                running.start()
                begun.wait(30)
                call.end()
                running.join(30)
    finally:
        sys.setswitchinterval(interval)
    assert captured.total("m") == 300


def test_ctrl_c_in_what_waits_does_not_cost_the_others_their_usage() -> None:
    counted: list[int] = []

    def interrupted() -> None:
        raise KeyboardInterrupt

    call = Get()
    for function in (interrupted, lambda: counted.append(1), lambda: counted.append(2)):
        assert call.at_end(function)
    with pytest.raises(KeyboardInterrupt):
        call.end()
    assert counted == [1, 2]
    assert not call.at_end(interrupted)


def test_the_broken_serving_of_a_request_leaves_the_context_as_it_was() -> None:
    with pytest.raises(ValueError, match="broken"), serving(Get()):
        raise ValueError("broken")
