"""Servers in this process for tests of the protocols, and stores that fail or wait on purpose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tallymark_collector.model import Batch, WriteResult
from tallymark_collector.pipeline import Pipeline, Writing
from tallymark_collector.receivers.server import Server, serving
from tallymark_collector.settings import Connections, Limits, Settings
from tests.support.usage import BASE, SECOND, number, request, sum_metric

ACME = {"tallymark.account.id": "acme"}
NOW = BASE + 60 * SECOND
GOOD = request(sum_metric([number(BASE, NOW, 5, ACME)]))


class Failing:
    """A store that raises, a number of times or always."""

    def __init__(self, error: Exception, behind: Writing | None = None, times: int = 1_000_000) -> None:
        self.error, self.behind, self.times = error, behind, times

    async def write(self, batch: Batch) -> WriteResult:
        self.times -= 1
        if self.times < 0 and self.behind is not None:
            return await self.behind.write(batch)
        raise self.error


class Stuck:
    """A store whose writes wait to be let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.entered = asyncio.Event()
        self.changed = asyncio.Condition()
        self.writes = 0

    async def reached(self, writes: int) -> None:
        """Returns once so many writes have come."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.writes >= writes)

    async def write(self, batch: Batch) -> WriteResult:
        self.writes += 1
        self.entered.set()
        async with self.changed:
            self.changed.notify_all()
        await self.go.wait()
        return WriteResult(inserted=len(batch.points))


class Counting:
    """A store that takes everything and keeps nothing."""

    def __init__(self) -> None:
        self.points = 0

    async def write(self, batch: Batch) -> WriteResult:
        self.points += len(batch.points)
        return WriteResult(inserted=len(batch.points))


@asynccontextmanager
async def receiving(
    store: Writing,
    *,
    drain_seconds: float = 3,
    connections: Connections | None = None,
    reflection: bool = False,
    shares_ports: bool = False,
    port: int = 0,
    serve: dict[str, Any] | None = None,
    **limits: float,
) -> AsyncIterator[Server]:
    """Both servers on free ports, over a store; `serve` goes to `serving`."""
    pipeline = Pipeline(store, Limits(**limits), now_ns=lambda: NOW)  # type: ignore[arg-type]
    settings = Settings(
        "unused",
        port=port,
        http_port=0,
        limits=pipeline.limits,
        drain_seconds=drain_seconds,
        connections=connections or Connections(),
        reflection=reflection,
        shares_ports=shares_ports,
    )
    async with serving(pipeline, settings, **(serve or {})) as server:
        yield server
