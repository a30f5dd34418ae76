"""What waits in the database, as whoever watches sees it."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import psycopg

from tallymark_collector.aggregates import backlog as module
from tallymark_collector.aggregates.backlog import Backlog, keep_looking
from tallymark_collector.model import Batch
from tallymark_collector.store import Store
from tests.support.usage import point, stream


async def test_lag_is_the_age_of_the_oldest_mark(store: Store, dsn: str) -> None:
    backlog = Backlog()
    await backlog.look(store)
    assert (backlog.hours, backlog.lag, backlog.findings) == (0, 0.0, 0)
    await store.write(Batch(points=[point(stream(), 0, 1, 1), point(stream("globex"), 4000, 4001, 1)]))
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        hours = connection.execute("SELECT DISTINCT account, tenant, bucket FROM usage_dirty").rowcount
        connection.execute("UPDATE usage_dirty SET marked_at = now() - interval '1 hour' WHERE account = 'globex'")
        connection.execute(
            "INSERT INTO audit_finding (bucket, account, tenant, width, raw) VALUES (now(), 'a', 't', '1 hour', %s)",
            [Decimal(1)],
        )
    await backlog.look(store)
    assert backlog.hours == hours > 0
    assert backlog.findings == 1
    assert 3600 <= backlog.lag < 7200
    while await store.refresh():
        pass
    await backlog.look(store)
    assert (backlog.hours, backlog.lag) == (0, 0.0)
    assert 0 <= backlog.age < 3600


async def test_a_database_that_is_away_ends_nothing(dsn: str) -> None:
    store = Store(dsn)
    await store.open()
    backlog = Backlog()
    looking = asyncio.create_task(keep_looking(store, backlog, interval=0.01))
    try:
        await store.close()  # from here on every look fails
        done, _ = await asyncio.wait({looking}, timeout=0.3)
        assert not done
    finally:
        looking.cancel()
        await asyncio.wait({looking})
    assert module.LOOK_INTERVAL < 60
