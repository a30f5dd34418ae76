"""The loops beside the server that look after what is stored: the audit of what changed, and what is dropped."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timezone
from typing import Final

from tallymark_collector.aggregates.changed import audit_changed
from tallymark_collector.aggregates.retention import drop_old
from tallymark_collector.aggregates.unfinalized import held_back
from tallymark_collector.aggregates.unsettled import held_by_quarantine
from tallymark_collector.errors import TransientError
from tallymark_collector.settings import Retention
from tallymark_collector.store import Store

logger = logging.getLogger(__name__)

AUDIT_INTERVAL: Final = 300.0
"""Seconds between looks at what was made again."""
RETENTION_INTERVAL: Final = 3600.0
"""Seconds between looks for what may be dropped; pieces of points are days wide."""
RETENTION_RETRY: Final = 60.0
"""Seconds after which what the database did not let us do is tried again; twice as long each time that it did not."""
SHOWN: Final = 10
"""Differences that the log shows one by one; all of them are in audit_finding."""


async def keep_audited(store: Store, interval: float = AUDIT_INTERVAL) -> None:
    """Audits what changed until cancelled: at once while more waits, every `interval` seconds otherwise."""
    while True:
        try:
            looked = await audit_changed(store, datetime.now(timezone.utc))
        except TransientError as error:
            logger.warning("changed hours are not audited, the next try is in %s s: %s", interval, error)
        else:
            for found in looked.differences[:SHOWN]:
                logger.warning(
                    "the %s of %s of account %r, meter %s, says %s where its points say %s; it is made again",
                    *(found.width, found.bucket.isoformat(), found.account, found.meter, found.aggregated, found.raw),
                )
            if len(looked.differences) > SHOWN:
                logger.warning("%s more differ: see audit_finding", len(looked.differences) - SHOWN)
            if looked.hours:
                continue
        await asyncio.sleep(interval)


async def keep_retained(
    store: Store, retention: Retention, interval: float = RETENTION_INTERVAL, retry: float = RETENTION_RETRY
) -> None:
    """Lays out points as columns and drops what need not be kept, every `interval` seconds until cancelled."""
    failed = 0
    while True:
        now = datetime.now(timezone.utc)
        try:
            dropped = await drop_old(store, retention, now)
            held = [await look(store, retention, now) for look in (held_back, held_by_quarantine)]
            if retention.columnstore_after is not None:
                pieces = await store.lay_out(now - retention.columnstore_after)
                logger.info("%s pieces of points were laid out as columns", pieces)
        except TransientError as error:
            wait = min(retry * 2**failed, interval)
            failed += 1
            logger.warning("old points stay as they are, the next try is in %s s: %s", wait, error)
        else:
            failed, wait = 0, interval
            for sentence in dropped.sentences():
                logger.info("%s", sentence)
            for sentence in filter(None, held):
                logger.warning("%s", sentence)
            if dropped.cut_short is not None:
                wait = min(retry, interval)
                logger.warning("other old points stay, the next try is in %s s: %s", wait, dropped.cut_short)
        await asyncio.sleep(wait)
