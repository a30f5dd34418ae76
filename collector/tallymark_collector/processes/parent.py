"""The parent of a collector of several processes: ports, what is stored, children, health and metrics."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from tallymark_collector.access import Authenticator
from tallymark_collector.application import authenticating, first, kept, opened, stopping, watched
from tallymark_collector.errors import UserError
from tallymark_collector.processes.ports import held
from tallymark_collector.processes.workers import Worker, Workers, working
from tallymark_collector.settings import Settings
from tallymark_collector.telemetry.instruments import STATE, Instruments, one

END_MARGIN: Final = 10.0
"""Seconds that a child gets beside those for its requests: to give back its connections, and to export once more."""

Ready = Callable[[Settings, Sequence[Worker], Authenticator], Awaitable[None]]


def check_possible(settings: Settings, count: int) -> None:
    """Raises UserError where several processes cannot do what these settings ask for."""
    if not sys.platform.startswith("linux"):
        raise UserError("--processes needs Linux, whose kernel shares out a port's connections: leave it out")
    if settings.forwarding is not None:
        raise UserError(
            "--processes and --forward-to do not go together, the folder of what is sent on is one process's: leave one"
            " out, or start single collectors at ports of their own"
        )
    own = settings.admin_port
    if own:
        for port in {settings.port, settings.http_port} & set(range(own + 1, own + 1 + count)):
            raise UserError(f"--admin-port {own} and the {count} after it are the processes' own, and OTLP has {port}")


def of_worker(settings: Settings, number: int) -> Settings:
    """What one child is told; children are numbered from 1."""
    return replace(
        settings,
        shares_ports=True,
        owner_database=None,
        admin_port=settings.admin_port + number if settings.admin_port else settings.admin_port,
    )


async def serve(
    settings: Settings, count: int, command: Sequence[str], work: Callable[[Settings], bytes], ready: Ready
) -> None:
    """Serves with so many children until SIGTERM or SIGINT, then has them finish what was accepted. Raises UserError.

    `command` is a child's program, `work` what it is told. `ready` is called, with the ports, once all take requests.
    """
    check_possible(settings, count)
    stop = stopping()
    children: list[Workers] = []
    with ExitStack() as ports:
        port = ports.enter_context(held(settings.host, settings.port))
        http_port = None if settings.http_port is None else ports.enter_context(held(settings.host, settings.http_port))
        settings = replace(settings, port=port, http_port=http_port)
        async with (
            watched(settings) as (admin, exporting),
            opened(settings.database, settings.database_timeout) as store,
            kept(settings, store, exporting, writing=lambda: sum(one.commit_seconds for one in children)) as loops,
        ):
            authenticator = await authenticating(settings, store)
            workers = Workers(command, lambda number: work(of_worker(settings, number)), count)
            children.append(workers)
            _observe(exporting.instruments, workers)
            async with working(workers, settings.drain_seconds + END_MARGIN):
                admin.state = lambda: "the collector is stopping" if stop.is_set() else workers.reason
                tasks = {*loops, *workers.tasks}
                await first(_either(stop.wait(), workers.ready()), tasks)
                if not stop.is_set():
                    own = replace(settings, admin_port=admin.port or None)
                    await ready(own, workers.all, authenticator)
                    await first(stop.wait(), tasks)


async def _either(*awaitables: Awaitable[object]) -> None:
    waiting = {asyncio.ensure_future(each) for each in awaitables}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()


def _observe(instruments: Instruments, workers: Workers) -> None:
    instruments.observe(
        "processes",
        lambda: [
            (workers.serving, {STATE: "serving"}),
            (len(workers.all) - workers.serving, {STATE: "not_serving"}),
        ],
    )
    instruments.observe("process.restarts", one(lambda: workers.restarts))
