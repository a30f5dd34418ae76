"""What an audit says of what clients sent, as `tallymark audit` looks for it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tallymark_collector.aggregates.audit import Difference, Drift, Overlap, Report, audit
from tallymark_collector.aggregates.days import with_days
from tallymark_collector.store import Store


@dataclass(frozen=True)
class Audited:
    """Findings of the accounts of one prefix."""

    differences: Sequence[Difference] = ()
    drifts: Sequence[Drift] = ()
    overlaps: Sequence[Overlap] = ()


NOTHING = Audited()


def overlapping(intervals: Iterable[Sequence[tuple[int, int]]]) -> Counter[tuple[int, int]]:
    """Of streams' intervals those, in microseconds, that begin before one that began no later has ended."""
    found: Counter[tuple[int, int]] = Counter()
    for of_stream in intervals:
        ordered = sorted((start // 1000, end // 1000) for start, end in of_stream)
        for place, (start, end) in enumerate(ordered):
            found[start, end] += any(start < other for _, other in ordered[:place])
    return +found


def audited(dsn: str, prefix: str) -> Audited:
    """Hours and days against points, increases against totals, intervals against one another."""
    found = asyncio.run(_audit(dsn))
    assert found.points, "an audit of nothing finds nothing"
    return Audited(
        tuple(one for one in found.differences if one.account.startswith(f"{prefix}-")),
        tuple(one for one in found.drifts if one.account.startswith(f"{prefix}-")),
        tuple(one for one in found.overlaps if one.account.startswith(f"{prefix}-")),
    )


async def _audit(dsn: str) -> Report:
    store = Store(dsn)
    await store.open()
    try:
        async with store.reading() as connection:
            return await with_days(connection, await audit(connection))
    finally:
        await store.close()
