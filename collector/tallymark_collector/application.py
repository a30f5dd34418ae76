"""The collector as one process: store, pipeline, server and the loops beside them, started and ended in order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from tallymark_collector.aggregates.refresher import keep_refreshed
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.receivers.server import Server, serving
from tallymark_collector.settings import Settings
from tallymark_collector.store import Store
from tallymark_collector.store.engines import connect_string


@asynccontextmanager
async def opened(database: str) -> AsyncIterator[Store]:
    """The store of a database (see `store.engines`). Raises UserError."""
    with connect_string(database) as dsn:
        store = Store(dsn)
        await store.open()
        try:
            yield store
        finally:
            await store.close()


async def serve(settings: Settings, ready: Callable[[Server, Pipeline], Awaitable[None]] | None = None) -> None:
    """Migrates, serves until SIGTERM or SIGINT, then finishes what was accepted. Raises UserError.

    `ready` is called once requests are taken.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with opened(settings.database) as store:
        await store.migrate()
        pipeline = Pipeline(store, settings.limits)
        refresher = asyncio.create_task(keep_refreshed(store, settings.refresh_interval))
        try:
            async with serving(pipeline, settings) as server:
                if ready is not None:
                    await ready(server, pipeline)
                await _first(stop.wait(), refresher)
        finally:
            refresher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await refresher


async def _first(stopped: Awaitable[object], refresher: asyncio.Task[None]) -> None:
    """Returns when the collector is told to stop; a loop that died takes the collector with it, in plain sight."""
    waiting = asyncio.ensure_future(stopped)
    done, _ = await asyncio.wait({waiting, refresher}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if refresher in done:
        refresher.result()
