"""`tallymark audit`: what is derived from the points, against the points."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Final

import typer

from tallymark_collector.aggregates.audit import MAX_OVERLAPS, Difference, Drift, Overlap, Report
from tallymark_collector.aggregates.audit import audit as compare
from tallymark_collector.aggregates.days import with_days
from tallymark_collector.cli import opening, output
from tallymark_collector.cli.arguments import (
    AccountOption,
    DatabaseOption,
    FromOption,
    JsonOption,
    ToOption,
    hours_touched,
    time_range,
)
from tallymark_collector.store import Store
from tallymark_collector.store.hours import BATCH

REPAIR_ROUNDS: Final = 20
"""Refreshes that a repair makes beyond those that its own hours need, for what was waiting before them."""


def audit(
    database: DatabaseOption = None,
    account: AccountOption = None,
    since: FromOption = None,
    until: ToOption = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make differing hours again from the points, and audit again.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare every cached hour with the points behind it. Exit status 1 if anything is found.

    Also compares the increases of cumulative streams with their totals, and looks for intervals of one stream that
    overlap; these two are for a person to judge and --repair leaves them. A range is widened to whole hours.
    """
    start, end = time_range(since, until)
    if start is not None:
        start, _ = hours_touched(start, start)
    if end is not None:
        _, end = hours_touched(end, end)
    with output.progress("comparing hours with points") as now:
        report, repaired = asyncio.run(_audit(opening.named(database), account, start, end, repair, now))
    if as_json:
        document = as_document(report)
        output.write_json({**document, "repaired": repaired} if repair else document)
    else:
        if repair:
            output.say(f"account-hours made again from their points: {repaired:,}")
        write_report(report)
    if not report.clean:
        raise typer.Exit(1)


async def _audit(
    database: str,
    account: str | None,
    start: datetime | None,
    end: datetime | None,
    repair: bool,
    now: output.Saying,
) -> tuple[Report, int]:
    async with opening.opened(database) as store:
        report = await _report(store, account, start, end)
        if not (repair and report.differences):
            return report, 0
        hours = {(found.bucket, found.account, found.tenant) for found in report.differences}
        await store.mark(hours)
        # Views are right from here on. Beside a busy collector there is always more to refresh, so not until the end.
        done = 0
        for _ in range(len(hours) // BATCH + REPAIR_ROUNDS):
            count = await store.refresh()
            if not count:
                break
            done += count
            now(f"making hours again: {done:,}")
        now("comparing again")
        return await _report(store, account, start, end), len(hours)


async def _report(store: Store, account: str | None, start: datetime | None, end: datetime | None) -> Report:
    async with store.reading() as connection:
        report = await compare(connection, account=account, start=start, end=end)
        return await with_days(connection, report, account=account, start=start, end=end)


def as_document(report: Report) -> dict[str, Any]:
    """JSON-able but for decimals and instants, which `output` writes."""
    return {
        "clean": report.clean,
        "hours": report.hours,
        "points": report.points,
        "differences": [found._asdict() for found in report.differences],
        "drifts": [found._asdict() for found in report.drifts],
        "overlaps": [found._asdict() for found in report.overlaps],
    }


def write_report(report: Report) -> None:
    """What an audit found, for people."""
    output.say(f"compared {report.hours:,} cached sums with {report.points:,} points")
    if report.clean:
        output.say("nothing differs")
    if report.differences:
        output.say(
            f"{len(report.differences):,} cached sums differ from their points; mend: `tallymark audit --repair`"
        )
        write_differences(report.differences)
    if report.drifts:
        output.say(f"{len(report.drifts):,} cumulative streams where the increases are not what the totals say")
        write_drifts(report.drifts)
    if report.overlaps:
        more = f" (the first {MAX_OVERLAPS:,} are shown)" if len(report.overlaps) == MAX_OVERLAPS else ""
        output.say(f"{len(report.overlaps):,} intervals overlap the one before: two writers under one name{more}")
        output.write_table(Overlap._fields, report.overlaps)


def write_differences(differences: Sequence[Difference]) -> None:
    """The differing buckets as a table."""
    output.write_table(Difference._fields, differences, ("raw", "aggregated"))


def write_drifts(drifts: Sequence[Drift]) -> None:
    """The differing streams as a table."""
    output.write_table(Drift._fields, drifts, ("billed", "sampled"))
