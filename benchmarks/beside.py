"""What a count costs beside other libraries', from one thread and from eight, and beside a traced request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from statistics import median
from typing import Any, Final

from fastapi import FastAPI
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry, Counter
from rich.table import Table

import tallymark
from benchmarks.metered import ATTRIBUTES, metered
from tallymark.integrations.asgi import UsageMiddleware

ACCOUNTS: Final = 1000
CALLS: Final = 4_000
ROUNDS: Final = 21
THREADS: Final = 8
REQUESTS: Final = 300

Subject = Callable[[str], None]


def tables() -> Iterator[Table]:
    """Two tables: single counts, and whole requests."""
    yield _counts()
    yield _requests()


def _counts() -> Table:
    names = [f"account-{i}" for i in range(ACCOUNTS)]
    provider = MeterProvider(metric_readers=[InMemoryMetricReader()], shutdown_on_exit=False)
    counter = provider.get_meter("benchmark").create_counter("requests")
    labels = ["method", "route", "status", "plan", "account"]
    prometheus = Counter("requests", "Requests", labels, registry=CollectorRegistry())

    def bare() -> None:
        return None

    decorated = tallymark.track_usage("beside.requests", attributes=ATTRIBUTES)(bare)

    def opentelemetry(name: str) -> None:
        counter.add(1, {**ATTRIBUTES, "tallymark.plan": "pro", "tallymark.account.id": name})

    def prometheus_client(name: str) -> None:
        prometheus.labels("GET", "/items/{id}", "200", "pro", name).inc()

    def nothing(name: str) -> None:
        with tallymark.identify(account=name, plan="pro"):
            bare()

    def tallymarked(name: str) -> None:
        with tallymark.identify(account=name, plan="pro"):
            decorated()

    subjects: dict[str, Subject] = {
        "OpenTelemetry Counter.add": opentelemetry,
        "prometheus_client labels().inc()": prometheus_client,
        "nothing": nothing,
        "tallymark": tallymarked,
    }
    one: dict[str, list[float]] = {subject: [] for subject in subjects}
    many: dict[str, list[float]] = {subject: [] for subject in subjects}
    with metered() as own:
        for _ in range(ROUNDS):
            for subject, function in subjects.items():
                one[subject].append(_one_thread(function, names))
                many[subject].append(_many_threads(function, names))
        recorded = sum(own.recorder.sums().values())
        calls = ROUNDS * 2 * (CALLS // THREADS * THREADS)
        assert recorded == calls, f"{recorded} of {calls} calls were recorded"
    provider.shutdown()
    table = Table(title=f"One count of {ACCOUNTS} accounts x 5 attributes, ns (median of {ROUNDS} rounds)")
    for column in ("what", "1 thread", "over Counter.add", f"{THREADS} threads", "over Counter.add"):
        table.add_column(column, justify="left" if column == "what" else "right")
    base = [median(taken["OpenTelemetry Counter.add"]) for taken in (one, many)]
    for subject in ("OpenTelemetry Counter.add", "prometheus_client labels().inc()", "tallymark"):
        row = [subject]
        for taken, over in zip((one, many), base, strict=True):
            free = median(taken["nothing"]) if subject == "tallymark" else 0.0
            cost = median(taken[subject]) - free
            row += [f"{cost:,.0f}", f"{cost / over:.2f}"]
        table.add_row(*row)
    table.caption = "tallymark: what the decorator adds to the bare call; every one of its counts was found again"
    return table


def _one_thread(function: Subject, names: list[str]) -> float:
    start = time.perf_counter_ns()
    for i in range(CALLS // THREADS * THREADS):
        function(names[i % ACCOUNTS])
    return (time.perf_counter_ns() - start) / (CALLS // THREADS * THREADS)


def _many_threads(function: Subject, names: list[str]) -> float:
    """Nanoseconds of the whole per count: with one interpreter lock, no less than in one thread."""
    ready = threading.Barrier(THREADS + 1)

    def work() -> None:
        ready.wait()
        for i in range(CALLS // THREADS):
            function(names[i % ACCOUNTS])

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    ready.wait()
    start = time.perf_counter_ns()
    for thread in threads:
        thread.join()
    return (time.perf_counter_ns() - start) / (CALLS // THREADS * THREADS)


def _requests() -> Table:
    apps: dict[str, Any] = {
        "bare FastAPI": _app(lambda handler: handler),
        "with OpenTelemetry's instrumentation (traces and metrics)": _traced(),
        "with Tallymark (middleware, identity, a counted handler)": _counted(),
    }
    taken: dict[str, list[float]] = {name: [] for name in apps}
    with metered() as own:
        for _ in range(ROUNDS):
            for name, app in apps.items():
                taken[name].append(asyncio.run(_drive(app)))
        assert sum(own.recorder.sums().values()) == ROUNDS * REQUESTS
    bare, traced, counted = (median(times) for times in taken.values())
    table = Table(title=f"One request through FastAPI, without a server, µs (median of {ROUNDS} rounds)")
    for column in ("what", "µs/request", "extra", "over OpenTelemetry's extra"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, cost in zip(apps, (bare, traced, counted), strict=True):
        extra = cost - bare
        ratio = f"{extra / (traced - bare):.2f}" if extra else ""
        table.add_row(name, f"{cost / 1000:,.1f}", f"{extra / 1000:,.1f}" if extra else "", ratio)
    return table


def _app(decorate: Callable[[Any], Any]) -> FastAPI:
    app = FastAPI()

    @app.get("/items/{number}")
    @decorate
    async def items(number: int) -> dict[str, int]:
        return {"number": number}

    return app


def _traced() -> FastAPI:
    app = _app(lambda handler: handler)
    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=TracerProvider(shutdown_on_exit=False),
        meter_provider=MeterProvider(metric_readers=[InMemoryMetricReader()], shutdown_on_exit=False),
    )
    return app


def _counted() -> FastAPI:
    app = _app(tallymark.track_usage("beside.http"))
    app.add_middleware(UsageMiddleware, identify=_account)
    return app


def _account(scope: MutableMapping[str, Any]) -> dict[str, str | None]:
    return {"account": dict(scope["headers"])[b"x-account"].decode()}


async def _drive(app: Any) -> float:
    """Nanoseconds per request."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        assert message.get("status", 200) == 200

    start = time.perf_counter_ns()
    for i in range(REQUESTS):
        path = f"/items/{i}"
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"x-account", f"account-{i % 100}".encode())],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        await app(scope, receive, send)
    return (time.perf_counter_ns() - start) / REQUESTS
