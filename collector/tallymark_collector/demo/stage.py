"""The two processes of the demo and of the end-to-end tests: a collector on a database, and a service beside it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Final, TypeVar

from tallymark_collector.application import opened
from tallymark_collector.demo.processes import Child, clean_environment
from tallymark_collector.store import Store

R = TypeVar("R")

EXPORT_INTERVAL: Final = "1"
"""Seconds between the service's exports: short, to show points arriving all the time."""

_SERVICE_READY: Final = r"Uvicorn running on (http://\S+)"
_COLLECTOR_READY: Final = r'^\{"host".*\}$'


def start_collector(folder: Path, database: str) -> Child:
    """`tallymark serve` on a free port."""
    arguments = ["-m", "tallymark_collector", "serve", "--database", database, "--port", "0", "--json"]
    return Child("collector", [sys.executable, *arguments], clean_environment(), folder / "collector.log")


def endpoint_of(collector: Child) -> str:
    """Where it takes OTLP, once it does. Raises ChildError."""
    ready = json.loads(collector.wait_for(_COLLECTOR_READY)[0])
    return f"http://{ready['host']}:{ready['port']}"


def start_service(folder: Path, endpoint: str, application: str, name: str = "service", **environ: str) -> Child:
    """The application by uvicorn, on a free port, sending its usage to the endpoint."""
    arguments = ["-m", "uvicorn", application, "--host", "127.0.0.1", "--port", "0"]
    # No line for each request, and connections are kept through any pause of the driver's.
    arguments += ["--http", "httptools", "--no-access-log", "--no-use-colors", "--timeout-keep-alive", "60"]
    environment = clean_environment(
        TALLYMARK_ENDPOINT=endpoint,
        TALLYMARK_EXPORT_INTERVAL=EXPORT_INTERVAL,
        TALLYMARK_STATE_DIR=str(folder / "state"),
        **environ,
    )
    return Child(name, [sys.executable, *arguments], environment, folder / f"{name}.log")


def url_of(service: Child) -> str:
    """Where it takes requests, once it does. Raises ChildError."""
    return service.wait_for(_SERVICE_READY)[1]


def with_store(dsn: str, work: Callable[[Store], Coroutine[None, None, R]]) -> R:
    """Runs a coroutine function with a store of the database."""

    async def run() -> R:
        async with opened(dsn) as store:
            return await work(store)

    return asyncio.run(run())
