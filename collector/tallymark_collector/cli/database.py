"""`tallymark migrate` and `tallymark status`: the database itself."""

from __future__ import annotations

import asyncio
from typing import Annotated, Final, NamedTuple

import typer

from tallymark_collector import application
from tallymark_collector.access.records import check_tenant
from tallymark_collector.cli import health, opening, output
from tallymark_collector.cli.arguments import AccountOption, AnyTenantOption, DatabaseOption, JsonOption, TenantOption
from tallymark_collector.cli.redaction import shown
from tallymark_collector.errors import UserError
from tallymark_collector.query.status import Contents, Count, Server, contents, server
from tallymark_collector.settings import DEFAULT_PORT, DEFAULT_TENANT
from tallymark_collector.store import migrations
from tallymark_collector.store.engines.moving import INTERRUPTED
from tallymark_collector.store.roles import AccountReader

METERS_SHOWN: Final = 5
"""Meters of usage without an account that are named; --json names all."""


def migrate(
    database: DatabaseOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing: list what is pending; exit status 1 if anything is.")
    ] = False,
    writer: Annotated[
        str | None,
        typer.Option(envvar="TALLYMARK_WRITER", metavar="ROLE", help="Grant this role what `serve` needs."),
    ] = None,
    reader: Annotated[
        str | None,
        typer.Option(envvar="TALLYMARK_READER", metavar="ROLE", help="Grant this role the public views, to read."),
    ] = None,
    account_reader: Annotated[
        str | None,
        typer.Option(
            "--account-reader",
            metavar="ROLE",
            show_default=False,
            help="Grant this role the usage of --account of --tenant, to read, and nothing else.",
        ),
    ] = None,
    tenant: TenantOption = DEFAULT_TENANT,
    account: AccountOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring the database to this version. Safe to run again, and by several at once; `serve` does it too.

    Roles are granted what this version needs, no more, each time they are named; they must exist.
    """
    found = opening.named(database)
    granted = _Granted(writer, reader, _account_reader(account_reader, tenant, account))
    with output.progress("looking for migrations") as now:
        names = asyncio.run(_pending(opening.existing(found)) if check else _migrate(found, now, granted))
    if as_json:
        output.write_json({"pending" if check else "applied": names})
    else:
        for name in names:
            output.say(f"{'pending' if check else 'applied'}: {name}")
        if not names:
            output.say("nothing is pending: the database is at this version")
    if check and names:
        raise typer.Exit(1)


async def _pending(database: str) -> list[str]:
    async with application.opened(database) as store:
        return await store.pending()


class _Granted(NamedTuple):
    """The roles that are named."""

    writer: str | None
    reader: str | None
    account_reader: AccountReader | None


def _account_reader(role: str | None, tenant: str, account: str | None) -> AccountReader | None:
    if role is None:
        if account is not None:
            raise UserError("--account without --account-reader: say which role is to read it")
        return None
    if not account:
        raise UserError("--account-reader needs --account: whose usage the role is to read")
    return AccountReader(role, tenant, account)


async def _migrate(database: str, now: output.Saying, granted: _Granted) -> list[str]:
    async with application.opened(database) as store:
        pending = await store.pending()
        now(f"applying {', '.join(pending)}" if pending else "nothing is pending")
        names = await store.migrate(now)
        if granted.account_reader is not None:
            async with store.reading() as connection:
                await check_tenant(connection, granted.account_reader.tenant)
        await store.grant(**granted._asdict())
        return names


def status(
    database: DatabaseOption = None,
    tenant: AnyTenantOption = None,
    endpoint: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="A collector to ask how it is.")
    ] = f"127.0.0.1:{DEFAULT_PORT}",
    tls_ca: health.AuthorityOption = None,
    tls_name: health.NameOption = None,
    client_cert: health.ClientCertificateOption = None,
    client_key: health.ClientKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the database is, what is in it and waits, and whether a collector answers.

    Large tables are estimated, and then it says so.
    """
    found = opening.existing(opening.named(database))
    with output.progress("looking at the database"):
        about, lacking, trouble, held = asyncio.run(_status(found, tenant))
        state = health.state_of(endpoint, tls=health.Tls(tls_ca, tls_name, client_cert, client_key))
    applied = [migration.name for migration in migrations.available() if migration.name not in lacking]
    if as_json:
        output.write_json(
            {
                "database": shown(found),
                **({} if tenant is None else {"tenant": tenant}),
                "server": {"version": about.version, "timescaledb_license": about.timescaledb_license},
                "migrations": {"applied": applied, "pending": lacking},
                "takes_no_usage": trouble,
                **_contents_document(held),
                "collector": {"endpoint": endpoint, "state": state},
            }
        )
        return
    output.write_facts(
        {
            "database": shown(found),
            "server": f"PostgreSQL {about.version}",
            **({"TimescaleDB": f"license {about.timescaledb_license}"} if about.timescaledb_license else {}),
            "migrations": f"{len(applied)} applied, {len(lacking)} pending",
            **({} if trouble is None else {"takes no usage": trouble}),
            **({} if tenant is None else {"tenant": tenant}),
            **_contents_facts(held),
            "collector": f"{endpoint} {state}",
        }
    )
    if lacking:
        output.say(f"pending: {', '.join(lacking)}; run `tallymark migrate`")


class _Found(NamedTuple):
    server: Server
    pending: list[str]
    trouble: str | None
    """Why the database takes no writes."""
    contents: Contents | None


async def _status(database: str, tenant: str | None) -> _Found:
    async with application.opened(database) as store:
        about, pending = await store.ask(server), await store.pending()
        async with store.presence() as presence:
            trouble = await presence.ask()
        found = _Found(about, pending, trouble, None)
        # What only the engine adds changes nothing of what is there; while the points are moved nobody finds them.
        if not {migration.name for migration in migrations.available()}.isdisjoint(pending) or INTERRUPTED in pending:
            return found
        async with store.reading() as connection:
            await check_tenant(connection, tenant)
            return found._replace(contents=await contents(connection, tenant))


def _contents_document(held: Contents | None) -> dict[str, object]:
    if held is None:
        return {}
    return {
        "points": _count_document(held.points),
        "oldest": held.oldest,
        "newest": held.newest,
        "hours_waiting": held.waiting,
        "quarantine": dict(held.quarantine),
        "unattributed": dict(held.unattributed),
        "evidence": _count_document(held.evidence),
    }


def _count_document(count: Count) -> dict[str, object]:
    return {"count": count.rows, "exact": count.exact}


def _contents_facts(held: Contents | None) -> dict[str, object]:
    if held is None:
        return {}
    total = sum(held.quarantine.values())
    nameless = sum(held.unattributed.values())
    first = ", ".join(f"{meter} {count:,}" for meter, count in list(held.unattributed.items())[:METERS_SHOWN])
    others = len(held.unattributed) - METERS_SHOWN
    meters = f"{first}, and {others:,} more meters" if others > 0 else first
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in held.quarantine.items())
    return {
        "points": _counted(held.points),
        "oldest point": held.oldest or "none",
        "newest point": held.newest or "none",
        "hours waiting": f"{held.waiting:,} for a refresh",
        "quarantine": f"{total:,} open ({reasons}): tallymark quarantine list" if total else "0 open",
        "unattributed": f"{nameless:,} items of no account ({meters}): tallymark quarantine attribute"
        if nameless
        else "0 items of no account",
        "evidence": f"{_counted(held.evidence)} spans",
    }


def _counted(count: Count) -> str:
    return f"{count.rows:,}" if count.exact else f"about {count.rows:,} (estimated)"
