"""`tallymark tokens`: credentials of tenants, made, listed and revoked."""

from __future__ import annotations

import asyncio
import re
import sys
from datetime import datetime, timedelta, timezone
from typing import Annotated, Any, Final

import typer

from tallymark_collector.access import Scope, records
from tallymark_collector.access.lookups import REMEMBERED_SECONDS
from tallymark_collector.access.records import Credential
from tallymark_collector.access.tokens import Token
from tallymark_collector.cli import opening, output
from tallymark_collector.cli.arguments import AnyTenantOption, DatabaseOption, JsonOption
from tallymark_collector.errors import UserError

commands = typer.Typer(no_args_is_help=True, help="Who may send usage and read it: tokens and client certificates.")

_EXPIRY: Final = re.compile(r"(?P<number>[1-9]\d{0,4})(?P<unit>[hdw])", re.ASCII)
_UNITS: Final = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_COLUMNS: Final = ("credential", "tenant", "scopes", "account", "state", "created", "expires", "certificate", "note")


@commands.command()
def create(
    tenant: Annotated[str, typer.Option("--tenant", metavar="TENANT", help="For whom; made where it is new.")],
    scope: Annotated[list[Scope], typer.Option("--scope", help="What it may do; may be given several times.")],
    database: DatabaseOption = None,
    account: Annotated[
        str | None, typer.Option("--account", metavar="ACCOUNT", help="The only account, for read-account.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="TIME", show_default="never", help="After 12h, 90d, 52w.")
    ] = None,
    certificate: Annotated[
        str | None,
        typer.Option(
            "--client-cert",
            metavar="NAME",
            help="Trust a client certificate instead: uri:…, dns:… (of its subject alternative name) or sha256:….",
        ),
    ] = None,
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="Who holds it, for the list.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Make a token, or trust a client certificate. A token is shown this once and stored nowhere.

    Takes the schema's owner. Collectors that are running take it at once.
    """
    expires_at = None if expires is None else datetime.now(timezone.utc) + _duration(expires)
    made, token, is_new = asyncio.run(
        _create(opening.named(database), tenant, scope, account, certificate, expires_at, note)
    )
    if is_new:
        output.tell(f"{tenant} is a new tenant")
    if as_json:
        _reveal_json({**_document(made), "token": None if token is None else token.text})
        return
    if token is None:
        output.say(f"{made.name} trusts {made.identity} for tenant {made.tenant}")
        return
    output.tell(f"the token {made.name} of tenant {made.tenant}; it is not shown again:")
    _reveal(token)


@commands.command("list")
def list_(database: DatabaseOption = None, tenant: AnyTenantOption = None, as_json: JsonOption = False) -> None:
    """Show every credential, revoked and expired ones too; never a token itself."""
    found = asyncio.run(_list(opening.named(database), tenant))
    if as_json:
        output.write_json([_document(credential) for credential in found])
        return
    if not found:
        output.tell("no credential has been made")
        return
    documents = [_document(credential) for credential in found]
    output.write_table(_COLUMNS, [[_shown(document[name]) for name in _COLUMNS] for document in documents])


@commands.command()
def revoke(
    credential: Annotated[str, typer.Argument(metavar="ID", help="Its name in the list, tmk_…; the token does, too.")],
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a credential for good. Again is fine. Collectors refuse it within seconds."""
    ended, was_live = asyncio.run(_revoke(opening.named(database), credential))
    if as_json:
        output.write_json(_document(ended))
    elif was_live:
        output.say(f"{ended.name} is revoked: collectors refuse it within {REMEMBERED_SECONDS:g} s")
    else:
        output.say(f"{ended.name} had been revoked before")


async def _create(
    database: str,
    tenant: str,
    scopes: list[Scope],
    account: str | None,
    certificate: str | None,
    expires_at: datetime | None,
    note: str,
) -> tuple[Credential, Token | None, bool]:
    async with opening.opened(database) as store, store.transaction() as connection:
        return await records.add(
            connection, tenant, scopes, account=account, identity=certificate, expires_at=expires_at, note=note
        )


async def _list(database: str, tenant: str | None) -> list[Credential]:
    async with opening.opened(database) as store, store.reading() as connection:
        await records.check_tenant(connection, tenant)
        return await records.credentials(connection, tenant)


async def _revoke(database: str, credential: str) -> tuple[Credential, bool]:
    async with opening.opened(database) as store, store.transaction() as connection:
        return await records.revoke(connection, credential)


def _duration(text: str) -> timedelta:
    found = _EXPIRY.fullmatch(text)
    duration = None if found is None else int(found["number"]) * _UNITS[found["unit"]]
    if duration is None or duration > records.MAX_EXPIRY:
        raise UserError(
            f"--expires {text!r} is no time to expire after: write hours, days or weeks such as 12h, 90d or 52w,"
            f" {records.MAX_EXPIRY.days} days at most"
        )
    return duration


def _document(credential: Credential) -> dict[str, Any]:
    return {
        "credential": credential.name,
        "kind": credential.kind,
        "tenant": credential.tenant,
        "scopes": [*credential.scopes],
        "account": credential.account,
        "state": credential.state(datetime.now(timezone.utc)),
        "created": credential.created_at,
        "expires": credential.expires_at,
        "revoked": credential.revoked_at,
        "certificate": credential.identity,
        "note": credential.note,
    }


def _shown(value: object) -> object:
    return ", ".join(value) if isinstance(value, list) else value


def _reveal(token: Token) -> None:
    """To stdout as it is: everything else that is printed has tokens hidden."""
    sys.stdout.write(f"{token.text}\n")


def _reveal_json(document: dict[str, Any]) -> None:
    output.write_json(document)
