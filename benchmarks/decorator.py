"""What a decorated call, with its journal, costs more than the bare call, over one `Counter.add` of the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from rich.table import Table

import tallymark
from tallymark import runtime
from tallymark.settings import Settings

ACCOUNTS: Final = 1000
CALLS: Final = 5_000
ROUNDS: Final = 41

ATTRIBUTES: Final = {
    "http.request.method": "GET",
    "http.route": "/items/{id}",
    "http.response.status_code": 200,
}


def tables() -> Iterator[Table]:
    """One table: nanoseconds per call and ratios, medians over interleaved rounds."""
    names = [f"account-{i}" for i in range(ACCOUNTS)]
    provider = MeterProvider(metric_readers=[InMemoryMetricReader()], shutdown_on_exit=False)
    counter = provider.get_meter("benchmark").create_counter("requests")

    def bare() -> None:
        return None

    @tallymark.track_usage("benchmark.requests", attributes=ATTRIBUTES)
    def decorated() -> None:
        return None

    def count(name: str) -> None:
        counter.add(1, {**ATTRIBUTES, "tallymark.plan": "pro", "tallymark.account.id": name})

    def call_bare(name: str) -> None:
        with tallymark.identify(account=name, plan="pro"):
            bare()

    def call_decorated(name: str) -> None:
        with tallymark.identify(account=name, plan="pro"):
            decorated()

    subjects: dict[str, Callable[[str], None]] = {
        "Counter.add, 5 attributes": count,
        "identified call, bare": call_bare,
        "identified call, decorated": call_decorated,
    }
    taken: dict[str, list[float]] = {subject: [] for subject in subjects}
    with _journal():
        for _ in range(ROUNDS):
            for subject, function in subjects.items():
                taken[subject].append(_per_call(function, names))
    provider.shutdown()
    add, plain, metered = (median(times) for times in taken.values())
    # Of each round by itself: what else the machine does then weighs on both sides of the ratio.
    ratio = median((with_it - without) / one for one, without, with_it in zip(*taken.values(), strict=True))
    table = Table(title=f"A decorated call ({ACCOUNTS} accounts x 5 attributes, median of {ROUNDS} rounds)")
    table.add_column("what")
    table.add_column("ns/call", justify="right")
    table.add_column("over Counter.add", justify="right")
    for subject, nanoseconds in zip(subjects, (add, plain, metered), strict=True):
        table.add_row(subject, f"{nanoseconds:,.0f}", f"{nanoseconds / add:.2f}")
    table.add_row("[bold]what the decorator adds", f"{metered - plain:,.0f}", f"[bold]{ratio:.2f}")
    yield table


@contextmanager
def _journal() -> Iterator[None]:
    """Usage goes to a journal on the disk, as in a service."""
    own = runtime.Runtime(meters=runtime.current().meters)
    with TemporaryDirectory() as folder, runtime.using(own):
        own.configure(Settings(endpoint="http://127.0.0.1:9", interval_s=3600.0, state_dir=folder))
        yield
        own.shutdown(0)


def _per_call(function: Callable[[str], None], names: list[str]) -> float:
    start = time.perf_counter_ns()
    for i in range(CALLS):
        function(names[i % ACCOUNTS])
    return (time.perf_counter_ns() - start) / CALLS
