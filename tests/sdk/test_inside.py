"""`usage.add()`: what a handler says of its own call is counted once, or refused aloud; it is never lost in silence."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallymark import identify, track_usage, usage
from tallymark.assembly import Runtime
from tallymark.measure import inside
from tallymark.nesting import MAX_AMOUNTS, Added
from tallymark.testing import capture_usage


@pytest.fixture(autouse=True)
def _own_meters(fresh: Runtime) -> None:
    identify(account="acme")


def test_amounts_with_and_without_attributes_whatever_the_end() -> None:
    @track_usage("credits", inside, unit="{credit}")
    def handler(fails: bool) -> None:
        usage.add(3)
        usage.add(0.1, attributes={"kind": "a"})
        usage.add(Decimal("0.2"), attributes={"kind": "a"})
        if fails:
            raise KeyError

    with capture_usage() as captured:
        handler(False)
        with pytest.raises(KeyError):
            handler(True)
    assert {(u.attributes.get("kind"), u.attributes.get("error.type")): u.quantity for u in captured} == {
        (None, None): 3,
        ("a", None): Decimal("0.3"),
        (None, "KeyError"): 3,
        ("a", "KeyError"): Decimal("0.3"),
    }
    assert {u.unit for u in captured} == {"{credit}"}


def test_a_meter_is_chosen_by_its_name_else_the_innermost() -> None:
    @track_usage("inner", inside)
    def inner() -> None:
        usage.add(1)
        usage.add(10, meter="outer")
        usage.add(100, "inner")

    @track_usage("other")
    @track_usage("outer", inside)
    @track_usage("stacked", inside)
    def outer() -> None:
        inner()
        usage.add(5)
        usage.add(7, meter="outer")

    with capture_usage() as captured:
        outer()
    assert {u.meter: u.quantity for u in captured} == {"inner": 101, "outer": 17, "stacked": 5, "other": 1}


def test_parts_of_a_call_add_to_the_call() -> None:
    @track_usage("m", inside)
    def inner() -> None:
        usage.add(1)

    @track_usage("m", inside)
    def outer() -> None:
        inner()
        inner()

    with capture_usage() as captured:
        outer()
        assert captured.total("m") == 2
        inner()
    assert captured.total("m") == 3


@pytest.mark.parametrize("bad", [-1, float("nan"), "3", None, True])
def test_what_cannot_be_counted_is_refused_alone(bad: Any, caplog: pytest.LogCaptureFixture) -> None:
    @track_usage("m", inside)
    def handler() -> None:
        usage.add(bad)
        usage.add(2)

    with capture_usage() as captured:
        handler()
    assert (captured.total("m"), captured.refused()) == (2, {"m": 1})
    assert "refused" in caplog.text


def test_outside_of_such_a_call_it_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    @track_usage("m")
    def handler() -> None:
        usage.add(1)
        usage.add(1, meter="m")

    @track_usage("n", inside)
    def another() -> None:
        usage.add(1, meter="m")

    with capture_usage() as captured:
        usage.add(1)
        handler()
        another()
    assert captured.total("n") == 0
    assert captured.refused() == {"usage.add": 4}
    assert "not counted" in caplog.text


def test_after_the_end_it_is_refused() -> None:
    contexts: list[contextvars.Context] = []

    @track_usage("m", inside)
    def handler() -> None:
        contexts.append(contextvars.copy_context())
        usage.add(1)

    with capture_usage() as captured:
        handler()
        contexts[0].run(usage.add, 5)
    assert (captured.total("m"), captured.refused()) == (1, {"usage.add": 1})


async def test_tasks_and_generators_of_a_call() -> None:
    @track_usage("m", inside)
    async def handler() -> None:
        async def part(n: int) -> None:
            await asyncio.sleep(0)
            usage.add(n)

        await asyncio.gather(*(part(n) for n in range(10)))

    @track_usage("m", inside)
    def items() -> Iterator[int]:
        for n in range(3):
            usage.add(1)
            yield n

    with capture_usage() as captured:
        await handler()
        assert captured.total("m") == 45
        for _ in items():
            usage.add(100)  # not inside of it
        stopped = items()
        next(stopped)
        stopped.close()  # type: ignore[attr-defined]
    assert captured.total("m") == 49
    assert captured.refused() == {"usage.add": 3}


def test_threads_that_add_at_once_lose_nothing() -> None:
    threads, each = 8, 2_000

    @track_usage("m", inside)
    def handler() -> None:
        def part(n: int) -> None:
            for _ in range(each):
                usage.add(1)
                usage.add(1, attributes={"n": n % 2})

        with ThreadPoolExecutor(threads) as pool:
            for n in range(threads):
                pool.submit(contextvars.copy_context().run, part, n)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with capture_usage() as captured:
            handler()
    finally:
        sys.setswitchinterval(interval)
    assert {u.attributes.get("n"): u.quantity for u in captured} == {
        None: threads * each,
        0: threads * each // 2,
        1: threads * each // 2,
    }


def test_what_is_added_while_the_call_ends_is_counted_or_refused() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    added = 0
    try:
        with capture_usage() as captured:
            for _ in range(50):
                begun, told = threading.Barrier(2), threading.Event()

                def part(begun: threading.Barrier = begun, told: threading.Event = told) -> None:
                    nonlocal added
                    begun.wait(30)
                    while not told.is_set():
                        usage.add(1)
                        added += 1
                    usage.add(1)
                    added += 1

                @track_usage("m", inside)
                def handler(begun: threading.Barrier = begun, part: Any = part) -> threading.Thread:
                    thread = threading.Thread(target=contextvars.copy_context().run, args=(part,))
                    thread.start()
                    begun.wait(30)
                    return thread

                thread = handler()
                told.set()
                thread.join(30)
    finally:
        sys.setswitchinterval(interval)
    assert captured.total("m") + captured.refused().get("usage.add", 0) == added


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10**6)), max_size=50))
def test_sums(amounts: list[tuple[int, int]]) -> None:
    added = Added()
    for n, amount in amounts:
        assert added.add((("n", "int", n),), amount)
    want: dict[int, int] = {}
    for n, amount in amounts:
        want[n] = want.get(n, 0) + amount
    assert {key[0][2]: total for key, total in added.take().items()} == want
    assert not added.add((), 1)


def test_a_finalizer_that_adds_in_the_midst_of_adding() -> None:
    class Adds:
        def __del__(self) -> None:
            usage.add(1)

    @track_usage("m", inside)
    def handler() -> int:
        finalized = 0
        for n in range(300):
            circle: list[object] = [Adds()]
            circle.append(circle)
            finalized += 1
            del circle
            usage.add(1, attributes={"n": n % 3})
        gc.collect()
        return finalized

    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        with capture_usage() as captured:
            finalized = handler()
    finally:
        gc.set_threshold(*threshold)
    assert captured.total("m") == 300 + finalized


def test_sets_of_attributes_in_one_call_are_bounded() -> None:
    @track_usage("m", inside)
    def handler() -> None:
        for n in range(MAX_AMOUNTS + 500):
            usage.add(1, attributes={"n": n})

    with capture_usage() as captured:
        handler()
    assert captured.total("m") == MAX_AMOUNTS + 500
    assert len(list(captured)) == MAX_AMOUNTS + 1


def test_an_endless_choice_of_meters_does_not_grow_what_is_refused() -> None:
    with capture_usage() as captured:
        for n in range(100):
            usage.add(1, meter=f"made.of.data.{n}")
    assert captured.refused() == {"usage.add": 100}
