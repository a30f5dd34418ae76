"""`tallymark plans`: the catalogue file, checked offline and applied."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from tallymark_collector.access.records import check_name, check_tenant
from tallymark_collector.billing import Catalog, records
from tallymark_collector.billing.records import Applied
from tallymark_collector.cli import opening, output
from tallymark_collector.cli.arguments import (
    AnyTenantOption,
    DatabaseOption,
    JsonOption,
    MetersOption,
    TenantOption,
    read_meters,
)
from tallymark_collector.cli.check import read_plans
from tallymark_collector.declarations.mapped import mismatches, unsaid
from tallymark_collector.documents.problems import DocumentError, Problem
from tallymark_collector.settings import DEFAULT_TENANT

commands = typer.Typer(no_args_is_help=True, help="Check and apply the file of plans, prices and accounts.")

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The catalogue, in YAML.")]


@commands.command()
def check(
    file: FileArgument, meters: MetersOption = None, tenant: AnyTenantOption = None, as_json: JsonOption = False
) -> None:
    """Say everything that is wrong with a file, each with its line; needs no database. Exit status 1 if anything is.

    With --meters also what does not fit between the two files: meters without a price, other units; with --tenant of
    those meters alone that take something of this tenant's.
    """
    try:
        catalog, warnings = _read(file, meters, tenant)
    except DocumentError as error:
        _write_problems(file, error, as_json)
        raise typer.Exit(1) from None
    _warn(warnings)
    accounts = len({subscription.account for subscription in catalog.subscriptions})
    if as_json:
        output.write_json(
            {
                "file": str(file),
                "problems": [],
                "warnings": [asdict(problem) for problem in warnings],
                "currency": catalog.currency,
                "meters": sorted(catalog.meters),
                "plans": sorted(catalog.plans),
                "accounts": accounts,
            }
        )
    else:
        output.say(
            f"{file}: good: plans {len(catalog.plans)}, meters {len(catalog.meters)}, accounts {accounts},"
            f" in {catalog.currency}"
        )


@commands.command()
def apply(
    file: FileArgument,
    database: DatabaseOption = None,
    tenant: TenantOption = DEFAULT_TENANT,
    meters: MetersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a file's plans and subscriptions to the database, for one tenant: all of it or nothing.

    The same file again changes nothing. A changed plan gets a new version, which prices the periods that end after
    now; what would change a closed period is refused. Accounts that only the database has are named and left alone.
    Exit status 1 if the file is wrong, or does not fit what that of --meters has for this tenant.
    """
    try:
        catalog, warnings = _read(file, meters, tenant)
    except DocumentError as error:
        if not as_json:
            raise
        _write_problems(file, error, as_json)
        raise typer.Exit(1) from None
    _warn(warnings)
    with output.progress(f"applying {file}"):
        applied = asyncio.run(_apply(opening.named(database), tenant, catalog))
    if as_json:
        output.write_json(asdict(applied))
        return
    output.say(f"new plan versions: {_listed(applied.new_versions)}")
    output.say(f"accounts changed: {_listed(applied.changed_accounts)}; unchanged: {applied.unchanged_accounts:,}")
    if applied.only_in_database:
        output.say(f"only in the database, left alone: {_listed(applied.only_in_database)}")


async def _apply(database: str, tenant: str, catalog: Catalog) -> Applied:
    async with opening.opened(database) as store, store.transaction() as connection:
        await check_tenant(connection, tenant)
        return await records.apply(connection, tenant, catalog, datetime.now(timezone.utc))


def _read(file: Path, meters: Path | None, tenant: str | None) -> tuple[Catalog, list[Problem]]:
    """The catalogue, and what somebody should know of it though it may be applied. Raises DocumentError."""
    plans = read_plans(file)
    rules = None if meters is None else read_meters(meters)
    if rules is not None and tenant is not None:
        rules = rules.of(check_name(tenant))
    found = [] if rules is None else mismatches(rules, plans)
    if found:
        raise DocumentError([Problem(each.file, each.line, 1, "", each.message) for each in found])
    return plans.catalog, unsaid(plans, rules)


def _warn(warnings: Sequence[Problem]) -> None:
    for problem in warnings:
        output.warn(str(problem))


def _write_problems(file: Path, error: DocumentError, as_json: bool) -> None:
    if as_json:
        output.write_json({"file": str(file), "problems": [asdict(problem) for problem in error.problems]})
    else:
        for problem in error.problems:
            output.say(str(problem))


def _listed(names: tuple[str, ...]) -> str:
    return f"{len(names):,} ({', '.join(names)})" if names else "none"
