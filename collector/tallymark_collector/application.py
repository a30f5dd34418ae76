"""The collector as one process: store, pipeline, server and the loops beside them, started and ended in order."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from typing import Final

from tallymark_collector import api
from tallymark_collector.access import Authenticator
from tallymark_collector.access.listening import check_host
from tallymark_collector.access.quotas import Quotas
from tallymark_collector.access.records import InDatabase, tenants
from tallymark_collector.access.requests import tenant_of
from tallymark_collector.access.tls import ServerCertificate, keep_certificate
from tallymark_collector.aggregates.backlog import Backlog, keep_looking
from tallymark_collector.aggregates.keeper import check_keeper
from tallymark_collector.aggregates.refresher import keep_refreshed
from tallymark_collector.aggregates.schedule import keep_audited, keep_retained
from tallymark_collector.billing.errors import BillingError
from tallymark_collector.billing.records import extend_periods, subscribed_tenants
from tallymark_collector.errors import TransientError
from tallymark_collector.forwarding import forwarding
from tallymark_collector.forwarding.forwarder import Forwarder
from tallymark_collector.known_meters import KnownMeters
from tallymark_collector.metering import Metering
from tallymark_collector.observation import Seen, observe_backlog
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.receivers.accepting import Troubles
from tallymark_collector.receivers.admin import Admin, administering
from tallymark_collector.receivers.grpc_server import Methods
from tallymark_collector.receivers.otlp import Accepted, nothing
from tallymark_collector.receivers.server import Server, serving
from tallymark_collector.settings import DATABASE_TIMEOUT, Settings
from tallymark_collector.store import Store
from tallymark_collector.store.committing import Committing, committing
from tallymark_collector.store.database import POOL_SIZE
from tallymark_collector.store.engines import connect_string, wants_timescale
from tallymark_collector.telemetry.exporting import Exporting
from tallymark_collector.telemetry.instruments import one

logger = logging.getLogger(__name__)

PERIODS_INTERVAL: Final = 3600.0
"""Seconds between looks for billing periods that have come near; they are written down weeks ahead."""
PERIODS_RETRY: Final = 10.0
LOAD_INTERVAL: Final = 0.5
"""Seconds between words about the load, to whoever puts off refreshes for it."""
UNMATCHED_INTERVAL: Final = 600.0
"""Seconds between lines of the log that tell which telemetry was no usage."""


MAX_TOLD: Final = 20
"""Names of tenants in one warning, and warnings."""

CANCEL_AGAIN: Final = 1.0
"""Seconds after which a task that was cancelled and goes on is cancelled again; its statement's end takes less."""


@asynccontextmanager
async def opened(
    database: str, patience: float = DATABASE_TIMEOUT, connections: int = POOL_SIZE
) -> AsyncIterator[Store]:
    """The store of a database (see `store.engines`). Raises UserError."""
    with connect_string(database) as dsn:
        store = Store(dsn, wants_timescale=wants_timescale(database), patience=patience, connections=connections)
        await store.open()
        try:
            yield store
        finally:
            await store.close()


@asynccontextmanager
async def _keeper(settings: Settings, store: Store) -> AsyncIterator[Store]:
    """The store of whoever keeps hours and drops what is old: the owner's where one is named."""
    if settings.owner_database is None:
        yield store
    else:
        async with opened(settings.owner_database) as owner:
            yield owner


Ready = Callable[[Server, Pipeline, Authenticator], Awaitable[None]]


async def serve(
    settings: Settings,
    ready: Ready | None = None,
    *,
    keeps: bool = True,
    load: Callable[[float], None] | None = None,
) -> None:
    """Migrates where its user may, serves until SIGTERM or SIGINT, then finishes what was accepted. Raises UserError.

    `ready` is called once requests are taken. Without `keeps` somebody else looks after what is stored, and is told by
    `load` how many seconds were spent on transactions with points since the start.
    """
    certificate = None if settings.tls is None else ServerCertificate(settings.tls)
    stop = stopping()
    writers: list[Committing] = []
    async with (
        watched(settings) as (admin, exporting),
        opened(settings.database, settings.database_timeout) as store,
        kept(settings, store, exporting, keeps=keeps, writing=lambda: _commit_seconds(writers)) as loops,
    ):
        authenticator = await authenticating(settings, store)
        seen = Seen(exporting.instruments, settings.limits)
        async with (
            committing(seen.timed(store), settings.limits, seen.requests.tenants) as writing,
            store.presence() as presence,
            _forwarding(settings) as forwarder,
            _asked(settings, authenticator, seen) as others,
        ):
            writers.append(writing)
            pipeline = Pipeline(
                seen.counted(writing),
                settings.limits,
                quotas=Quotas(InDatabase(store), settings.limits),
                metering=None if settings.meters is None else Metering(settings.meters, redaction=settings.redaction),
                known=KnownMeters(store),
                redaction=settings.redaction,
                tenants=seen.requests.tenants,
            )
            seen.observe(pipeline, writing, store, forwarder)
            beside = {asyncio.create_task(_keep_told(pipeline))}
            if load is not None:
                beside.add(asyncio.create_task(keep_saying(load, lambda: _commit_seconds(writers))))
            if certificate is not None:
                beside.add(asyncio.create_task(keep_certificate(certificate)))
            try:
                async with serving(
                    pipeline,
                    settings,
                    ask=presence.ask,
                    accepted=_accepted(settings, forwarder),
                    tenant_of=tenant_of(authenticator),
                    certificate=certificate,
                    requests=seen.requests,
                    admission=seen.admission,
                    others=others,
                ) as server:
                    admin.state = lambda: server.readiness.reason
                    seen.observe_restarts(lambda: server.restarts)
                    server.admin_port = admin.port or None
                    if ready is not None:
                        await ready(server, pipeline, authenticator)
                    await first(stop.wait(), {*loops, *beside, writing.running})
            finally:
                await ended(beside)


def _commit_seconds(writers: Sequence[Committing]) -> float:
    return sum(writing.progress.commit_seconds for writing in writers)


def stopping() -> asyncio.Event:
    """Is set when the process is told to end."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


@asynccontextmanager
async def watched(settings: Settings) -> AsyncIterator[tuple[Admin, Exporting]]:
    """Health and metrics while the context lasts; the collector is starting until somebody says otherwise. Raises
    UserError."""
    asyncio.get_running_loop().set_exception_handler(Troubles())
    exporting = Exporting(settings.telemetry)
    try:
        admin = Admin(exporting.page)
        exporting.instruments.observe("ready", one(lambda: not admin.state()))
        async with administering(settings.admin_host, settings.admin_port, admin):
            yield admin, exporting
    finally:
        await exporting.close()


@asynccontextmanager
async def kept(
    settings: Settings,
    store: Store,
    exporting: Exporting,
    *,
    keeps: bool = True,
    writing: Callable[[], float] = lambda: 0.0,
) -> AsyncIterator[set[asyncio.Task[None]]]:
    """The loops that look after what is stored, ended with the context; none without `keeps`. `writing` is what
    `keep_refreshed` takes. Raises UserError."""
    if not keeps:
        await store.prepare(logger.info)
        yield set()
        return
    async with _keeper(settings, store) as keeper:
        await store.prepare(logger.info)
        await check_keeper(keeper, store, settings.retention)
        await _tell_of_tenants(settings, store)
        backlog = Backlog()
        observe_backlog(exporting.instruments, backlog)
        loops = {
            asyncio.create_task(keep_refreshed(keeper, settings.refresh_interval, writing)),
            asyncio.create_task(keep_periods(store)),
            asyncio.create_task(keep_audited(keeper)),
            asyncio.create_task(keep_retained(keeper, settings.retention)),
            asyncio.create_task(keep_looking(store, backlog)),
        }
        try:
            yield loops
        finally:
            await ended(loops)


async def _tell_of_tenants(settings: Settings, store: Store) -> None:
    """Warns of tenants in the file of meters that nobody has made: of a misspelt one nothing is billed, in silence. It
    is no more than a warning, since a tenant may be made later."""
    named = {} if settings.meters is None else settings.meters.tenants()
    if settings.meters is None or not named:
        return
    made = [tenant.name for tenant in await store.ask(tenants)]
    unknown = [name for name in named if name not in made]
    for name in unknown[:MAX_TOLD]:
        meter = named[name]
        logger.warning(
            "%s:%s: the meter %r names the tenant %r, which nobody has made (there are %s): nothing is taken for it"
            " until somebody does, by `tallymark tenants set %s` or with its first token. Is it a slip?",
            *(settings.meters.file, settings.meters.lines.get(meter, 1), meter, name),
            *(", ".join(made[:MAX_TOLD]), name),
        )
    if (more := len(unknown) - MAX_TOLD) > 0:
        logger.warning("%s names %d more tenants which nobody has made", settings.meters.file, more)


def _accepted(settings: Settings, forwarder: Forwarder | None) -> Accepted:
    if settings.forwarding is None or forwarder is None:
        return nothing
    return forwarder.of_tenant(settings.forwarding.tenant)


@asynccontextmanager
async def _asked(settings: Settings, authenticator: Authenticator, seen: Seen) -> AsyncIterator[Mapping[str, Methods]]:
    """The services that answer questions, over connections of their own: whoever asks takes none from who writes."""
    if not settings.api:
        yield {}
        return
    async with opened(settings.database, settings.database_timeout, api.CONNECTIONS) as store:
        yield api.handlers(store, authenticator, settings, seen.admission, seen.requests)


@asynccontextmanager
async def _forwarding(settings: Settings) -> AsyncIterator[Forwarder | None]:
    """The way to the next hop, where there is one."""
    if settings.forwarding is None:
        yield None
    else:
        async with forwarding(settings.forwarding) as forwarder:
            yield forwarder


async def authenticating(settings: Settings, store: Store) -> Authenticator:
    """Raises UserError where strangers could write and nobody has said that they may."""
    authenticator = Authenticator(
        InDatabase(store),
        allow_anonymous=settings.allow_anonymous,
        # Who asks clients for certificates has said that not everybody may write.
        closed=settings.tls is not None and settings.tls.client_authority is not None,
    )
    check_host(
        settings.host,
        needs_credentials=await authenticator.needs_credentials(),
        allow_anonymous=settings.allow_anonymous,
    )
    return authenticator


async def keep_periods(store: Store, interval: float = PERIODS_INTERVAL, retry: float = PERIODS_RETRY) -> None:
    """Writes down billing periods as they come near, until cancelled."""
    while True:
        try:
            async with store.transaction() as connection:
                subscribed = await subscribed_tenants(connection)
            for tenant in subscribed:
                await _extend_periods(store, tenant, interval)
        except TransientError as error:
            logger.warning("billing periods are not extended, the next try is in %s s: %s", retry, error)
            await asyncio.sleep(retry)
        else:
            await asyncio.sleep(interval)


async def _extend_periods(store: Store, tenant: str, interval: float) -> None:
    try:
        async with store.transaction() as connection:
            await extend_periods(connection, tenant, datetime.now(timezone.utc))
    except (BillingError, ValueError):
        # A subscription that this machine cannot read (its time zone is unknown here) must not stop ingestion, nor the
        # other tenants' periods.
        logger.exception("billing periods of tenant %r are not extended, the next try is in %s s", tenant, interval)


async def keep_saying(
    load: Callable[[float], None], spent: Callable[[], float], interval: float = LOAD_INTERVAL
) -> None:
    """Tells of the load whenever there was some, until cancelled."""
    told = 0.0
    while True:
        await asyncio.sleep(interval)
        if spent() != told:
            told = spent()
            load(told)


async def _keep_told(pipeline: Pipeline, interval: float = UNMATCHED_INTERVAL) -> None:
    try:
        while True:
            await asyncio.sleep(interval)
            pipeline.unmatched.tell()
    finally:
        pipeline.unmatched.tell()


async def ended(tasks: Collection[asyncio.Task[None]], patience: float = CANCEL_AGAIN) -> None:
    """Cancels the tasks until they have ended, however; what they died of is not raised.

    Once is not enough: before Python 3.12 `asyncio.wait_for`, which psycopg and its pool wait with, swallows a
    cancellation that arrives together with what it waits for, and the task goes on.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=patience)
    await asyncio.gather(*tasks, return_exceptions=True)


async def first(stopped: Awaitable[object], loops: set[asyncio.Task[None]]) -> None:
    """Returns when the collector is told to stop; a loop that died takes the collector with it, in plain sight."""
    waiting = asyncio.ensure_future(stopped)
    done, _ = await asyncio.wait({waiting, *loops}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    for task in loops & done:
        task.result()
