"""`tallymark usage`: what was used, by any dimensions."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated

import typer

from tallymark_collector.access.records import check_tenant
from tallymark_collector.cli import opening, output
from tallymark_collector.cli.arguments import (
    AccountOption,
    DatabaseOption,
    FromOption,
    TenantOption,
    ToOption,
    day_or_instant,
    midnight,
    time_range,
)
from tallymark_collector.cli.output import Format
from tallymark_collector.errors import UserError
from tallymark_collector.query.by_aggregation import Billed, usage_as_billed
from tallymark_collector.query.status import unattributed
from tallymark_collector.query.usage import DIMENSIONS
from tallymark_collector.settings import DEFAULT_TENANT


def usage(
    database: DatabaseOption = None,
    tenant: TenantOption = DEFAULT_TENANT,
    since: FromOption = None,
    until: ToOption = None,
    by: Annotated[
        str, typer.Option(metavar="NAMES", help=f"Dimensions, separated by commas, of: {', '.join(DIMENSIONS)}.")
    ] = "account,meter",
    account: AccountOption = None,
    meter: Annotated[str | None, typer.Option(metavar="METER", help="Only this meter.")] = None,
    as_of: Annotated[
        str | None,
        typer.Option("--as-of", metavar="TIME", help="Only what was recorded until then, summed from the points."),
    ] = None,
    format_: Annotated[Format | None, typer.Option("--format", help="How to write it.", show_default="table")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Show usage, exact, right whether or not hours have been refreshed, by the aggregations of the plans in force.

    Quantities in JSON are text in plain digits; times are ISO 8601 in UTC.
    """
    if as_json and format_ not in (None, Format.JSON):
        raise UserError(f"--json and --format {format_.value} contradict each other: give one of them")
    start, end = time_range(since, until)
    moment = None if as_of is None else midnight(day_or_instant(as_of, "--as-of"))
    names = [name.strip() for name in by.split(",") if name.strip()]
    with output.progress("summing usage"):
        asked = _usage(opening.named(database), tenant, names, start, end, account, meter, moment)
        billed, nameless = asyncio.run(asked)
    found = billed.usage
    for remark in billed.remarks:
        output.warn(remark)
    chosen = Format.JSON if as_json else format_ or Format.TABLE
    if not found.rows and output.interactive():
        output.tell("no usage there" if account is None else f"no usage of account {account!r} there")
        if chosen is Format.TABLE:
            return
    if nameless:
        output.warn(
            f"usage that names no account, not among this: items in quarantine {nameless:,}:"
            " tallymark quarantine list --account ''"
        )
    output.write_rows(chosen, found.columns, found.rows, numbers=("quantity", "points"))


async def _usage(
    database: str,
    tenant: str,
    by: list[str],
    start: datetime | None,
    end: datetime | None,
    account: str | None,
    meter: str | None,
    as_of: datetime | None,
) -> tuple[Billed, int]:
    """The usage, and where all accounts are meant, how many items name none."""
    async with opening.opened(database) as store, store.reading() as connection:
        await check_tenant(connection, tenant)
        found = await usage_as_billed(
            connection, tenant=tenant, by=by, start=start, end=end, account=account, meter=meter, as_of=as_of
        )
        if account is not None or as_of is not None:
            return found, 0
        nameless = await unattributed(connection, tenant, meter=meter, start=start, end=end)
        return found, sum(nameless.values())
