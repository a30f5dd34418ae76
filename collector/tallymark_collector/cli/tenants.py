"""`tallymark tenants`: whose services send usage, and how much they may send."""

from __future__ import annotations

import asyncio
import math
from typing import Annotated, Any, Final

import typer

from tallymark_collector.access import records
from tallymark_collector.access.lookups import REMEMBERED_SECONDS
from tallymark_collector.access.records import Tenant
from tallymark_collector.cli import opening, output
from tallymark_collector.cli.arguments import DatabaseOption, JsonOption
from tallymark_collector.errors import UserError

commands = typer.Typer(no_args_is_help=True, help="Tenants and their limits.")

_LIMITS: Final = Tenant._fields[1:]
_WORDS: Final = {"default": None, "unlimited": math.inf}


@commands.command("list")
def list_(database: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """Show every tenant and its limits."""
    found = asyncio.run(_list(opening.named(database)))
    if as_json:
        output.write_json([_document(tenant) for tenant in found])
        return
    columns = ("tenant", *_LIMITS)
    output.write_table(columns, [[tenant.name, *map(_shown, tenant[1:])] for tenant in found], _LIMITS)


@commands.command("set")
def set_(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tenant; made where it is new.")],
    database: DatabaseOption = None,
    points_per_second: Annotated[
        str | None,
        typer.Option(
            "--points-per-second",
            metavar="N",
            help="More is refused, to be sent again later. A number, unlimited, or default: what serve was told.",
        ),
    ] = None,
    new_streams_per_hour: Annotated[
        str | None,
        typer.Option(
            "--new-streams-per-hour",
            metavar="N",
            help="Streams never seen before; the points of more are set aside. A number, unlimited, or default.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a tenant, or change its limits; those that are left out stay. Takes the schema's owner."""
    given = {"points_per_second": points_per_second, "new_streams_per_hour": new_streams_per_hour}
    limits = {column: _number(column, text) for column, text in given.items() if text is not None}
    after, is_new = asyncio.run(_set(opening.named(database), Tenant(name, **limits), [*limits]))
    if as_json:
        output.write_json(_document(after))
        return
    if is_new:
        output.tell(f"{name} is a new tenant")
    said = ", ".join(f"{column} {_shown(getattr(after, column))}" for column in _LIMITS)
    output.say(f"{after.name}: {said}; collectors follow within {REMEMBERED_SECONDS:g} s")


async def _list(database: str) -> list[Tenant]:
    async with opening.opened(database) as store, store.reading() as connection:
        return await records.tenants(connection)


async def _set(database: str, tenant: Tenant, changed: list[str]) -> tuple[Tenant, bool]:
    async with opening.opened(database) as store, store.transaction() as connection:
        is_new = await records.add_tenant(connection, tenant.name)
        return await records.set_limits(connection, tenant, changed), is_new


def _number(column: str, text: str) -> float | None:
    if text in _WORDS:
        return _WORDS[text]
    least = 1.0 if column == "new_streams_per_hour" else 0.001
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        option = "--" + column.replace("_", "-")
        raise UserError(f"{option} {text!r} is no limit: give a number from {least:g} on, unlimited, or default")
    return number


def _document(tenant: Tenant) -> dict[str, Any]:
    return {"tenant": tenant.name, **{column: _plain(getattr(tenant, column)) for column in _LIMITS}}


def _plain(limit: float | None) -> float | str | None:
    """JSON has no infinity."""
    return "unlimited" if limit == math.inf else limit


def _shown(limit: float | None) -> str:
    return "default" if limit is None else "unlimited" if limit == math.inf else f"{limit:g}"
