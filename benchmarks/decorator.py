"""What decorated calls, with their journal, cost more than the bare ones, over one `Counter.add` of the same."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from statistics import median
from typing import Any, Final, NamedTuple

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from rich.table import Table

import tallymark
from benchmarks.metered import ATTRIBUTES, metered
from tallymark import measure
from tallymark.calls import HttpCall
from tallymark.integrations.serving import serving

ACCOUNTS: Final = 1000
CALLS: Final = 5_000
ROUNDS: Final = 41

Call = Callable[[str], None]


class Subject(NamedTuple):
    """A kind of handler: how to call the bare one and the decorated one, each for an account."""

    name: str
    bare: Call
    decorated: Call


class Get(HttpCall):
    """A request, of which a framework knows everything."""

    def method(self) -> str:
        return "GET"

    def route(self) -> str:
        return "/items/{id}"


def handler() -> list[int]:
    return RESULT


async def async_handler() -> list[int]:
    return RESULT


def generator() -> Iterator[int]:
    yield from RESULT


async def async_generator() -> AsyncIterator[int]:
    for item in RESULT:
        yield item


def images(n: int) -> list[int]:
    return RESULT


RESULT: Final = [1, 2, 3]


def subjects() -> list[Subject]:
    """The one that the budget is for first."""
    track = tallymark.track_usage
    shared = track("benchmark.shared", attributes=ATTRIBUTES)
    shared(async_handler)
    result = track("benchmark.results", len, attributes=ATTRIBUTES)
    argument = track("benchmark.images", measure.argument("n"), attributes=ATTRIBUTES)

    def one(name: str, tracked: Any, bare: Any, run: Callable[[Any], object] = lambda function: function()) -> Subject:
        decorated = tracked(bare)
        return Subject(name, _identified(lambda: run(bare)), _identified(lambda: run(decorated)))

    return [
        one("a function", track("benchmark.requests", attributes=ATTRIBUTES), handler),
        one("an async function", track("benchmark.async", attributes=ATTRIBUTES), async_handler, _drive),
        one("a meter that two functions share", shared, handler),
        one("its result's quantity", result, handler),
        one("an argument's quantity", argument, images, lambda function: function(3)),
        one("its duration", track("benchmark.duration", measure.duration(), attributes=ATTRIBUTES), handler),
        one("in a request, with method, route, status", track("benchmark.http"), handler, _served),
        one("a generator of 3 items", track("benchmark.generator", attributes=ATTRIBUTES), generator, _consume),
        one("an async generator of 3 items", track("benchmark.agen", attributes=ATTRIBUTES), async_generator, _drain),
    ]


def tables() -> Iterator[Table]:
    """One table: nanoseconds per call and ratios, medians over interleaved rounds."""
    names = [f"account-{i}" for i in range(ACCOUNTS)]
    provider = MeterProvider(metric_readers=[InMemoryMetricReader()], shutdown_on_exit=False)
    counter = provider.get_meter("benchmark").create_counter("requests")

    def count(name: str) -> None:
        counter.add(1, {**ATTRIBUTES, "tallymark.plan": "pro", "tallymark.account.id": name})

    adds: list[float] = []
    found = subjects()
    taken: dict[str, list[tuple[float, float, float]]] = {subject.name: [] for subject in found}
    with metered():
        for _ in range(ROUNDS):
            adds.append(_per_call(count, names))
            for subject in found:
                # The bare one on both sides of the decorated one: a machine that slows down slows all three.
                before = _per_call(subject.bare, names)
                with_it = _per_call(subject.decorated, names)
                taken[subject.name].append((adds[-1], (before + _per_call(subject.bare, names)) / 2, with_it))
    provider.shutdown()
    table = Table(title=f"What the decorator adds to a call ({ACCOUNTS} accounts x 5 attributes, {ROUNDS} rounds)")
    table.add_column("what")
    table.add_column("ns/call", justify="right")
    table.add_column("over Counter.add", justify="right")
    table.add_row("Counter.add, 5 attributes", f"{median(adds):,.0f}", "1.00")
    for name, rounds in reversed(taken.items()):
        # Of each round by itself: what else the machine does then weighs on both sides of the ratio.
        more = median(with_it - without for _, without, with_it in rounds)
        ratio = median((with_it - without) / add for add, without, with_it in rounds)
        table.add_row(name, f"{more:,.0f}", f"{ratio:.2f}")
    yield table


def _per_call(function: Call, names: list[str]) -> float:
    start = time.perf_counter_ns()
    for i in range(CALLS):
        function(names[i % ACCOUNTS])
    return (time.perf_counter_ns() - start) / CALLS


def _identified(function: Callable[[], object]) -> Call:
    def call(name: str) -> None:
        with tallymark.identify(account=name, plan="pro"):
            function()

    return call


def _served(function: Callable[[], object]) -> None:
    # Serving begins with nobody identified: the same on both sides of the comparison.
    with serving(_CALL):
        tallymark.identify(account="acme", plan="pro")
        function()


_CALL: Final = Get()


def _drive(function: Callable[[], Any]) -> None:
    try:
        function().send(None)
    except StopIteration:
        return


def _consume(function: Callable[[], Iterator[int]]) -> None:
    for _ in function():
        pass


def _drain(function: Callable[[], AsyncIterator[int]]) -> None:
    async def drain() -> None:
        async for _ in function():
            pass

    _drive(drain)
