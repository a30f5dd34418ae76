"""What an export of 100,000 streams does to a handler that runs meanwhile, and whether memory stays flat under load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from statistics import quantiles
from typing import Final

import psutil
from rich.table import Table

import tallymark
from benchmarks.metered import metered
from benchmarks.sink import sink

STREAMS: Final = 100_000
PAUSE_S: Final = 0.0005
"""Between two calls of the handler that is watched: it is a service that waits for requests."""


def tables() -> Iterator[Table]:
    """One table: latencies of a decorated handler at rest, beside an export, and beside a thread that only computes."""

    @tallymark.track_usage("export.calls")
    def handler() -> int:
        return sum(range(100))

    @tallymark.track_usage("export.streams")
    def many() -> None: ...

    with sink() as endpoint, metered(endpoint) as own:
        for number in range(STREAMS):
            with tallymark.identify(account=f"account-{number}"):
                many()
        tallymark.identify(account="watched")
        for _ in range(100):
            handler()
        rest = _watch(handler, lambda: time.sleep(5))
        took: list[float] = []

        def export() -> None:
            start = time.monotonic()
            assert own.flush(120)
            took.append(time.monotonic() - start)

        beside = _watch(handler, export)

        def compute() -> None:
            end = time.monotonic() + took[0]
            while time.monotonic() < end:
                sum(range(1000))

        computing = _watch(handler, compute)
    table = Table(title=f"A decorated handler, called every {PAUSE_S * 1000:g} ms, µs")
    for column in ("while", "calls", "p50", "p99", "p99.9", "most"):
        table.add_column(column, justify="left" if column == "while" else "right")
    whiles = {
        "nothing else happens": rest,
        f"{STREAMS:,} streams are exported ({took[0]:.1f} s)": beside,
        "another thread computes as long": computing,
    }
    for name, times in whiles.items():
        cuts = quantiles(times, n=1000)
        table.add_row(name, f"{len(times):,}", *(f"{t:,.0f}" for t in (cuts[499], cuts[989], cuts[998], max(times))))
    table.caption = f"resident memory of the process after it: {psutil.Process().memory_info().rss / 2**20:,.0f} MiB"
    yield table


def _watch(handler: Callable[[], object], during: Callable[[], None]) -> list[float]:
    """Microseconds of each call, and of the wait before it beyond the pause: what a request would have waited."""
    ended = threading.Event()

    def run() -> None:
        during()
        ended.set()

    times: list[float] = []
    thread = threading.Thread(target=run)
    thread.start()
    due = time.perf_counter()
    while not ended.is_set():
        due += PAUSE_S
        left = due - time.perf_counter()
        if left > 0:
            time.sleep(left)
        handler()
        now = time.perf_counter()
        times.append((now - due) * 1e6)
        due = max(due, now - 0.1)
    thread.join()
    return times
