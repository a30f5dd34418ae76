"""Tenants and credentials in the database. Whoever makes or changes them is the schema's owner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, NamedTuple

import psycopg

from tallymark_collector.access import certificates, tokens
from tallymark_collector.access.principal import Principal, Scope
from tallymark_collector.documents.fields import A_TENANT, TENANT
from tallymark_collector.errors import NotPossible, NotThere, Unauthenticated, UserError
from tallymark_collector.model import Stream
from tallymark_collector.store import Store, locks
from tallymark_collector.store.database import Connection

MAX_NOTE: Final = 200
MAX_EXPIRY: Final = timedelta(days=3660)
MAX_ACCOUNT: Final = 256
"""Characters, as of usage (`processors.validation`)."""
MAX_LIVE: Final = 1_000
"""Credentials of a tenant that live at the same time, where the tenant makes them itself."""
MAX_MADE: Final = 20_000
"""The same of all that there are, ended ones too, which stay."""

_COLUMNS: Final = (
    "credential, kind, tenant, account, scopes, verifier, identity, note, created_at, expires_at, revoked_at"
)

# Of a certificate that was revoked and trusted again, the live row comes last and counts.
_FIND_SQL: Final = f"""
SELECT {_COLUMNS} FROM credential WHERE kind = 'token' AND credential = ANY (%(keys)s)
UNION ALL
SELECT {_COLUMNS} FROM credential WHERE identity = ANY (%(keys)s)
ORDER BY revoked_at NULLS LAST"""  # noqa: S608 - a constant of ours

_LIST_SQL: Final = f"""
SELECT {_COLUMNS} FROM credential WHERE %(tenant)s::text IS NULL OR tenant = %(tenant)s
ORDER BY tenant, created_at, credential"""  # noqa: S608 - a constant of ours

_PAGE_SQL: Final = f"""
SELECT {_COLUMNS} FROM credential WHERE tenant = %(tenant)s AND credential COLLATE "C" > %(after)s
ORDER BY credential COLLATE "C" LIMIT %(limit)s"""  # noqa: S608 - a constant of ours


@dataclass(frozen=True, slots=True)
class Credential:
    """A row of the table: what somebody may do who shows the token or the certificate."""

    id: str
    kind: str
    """`token` or `certificate`."""
    tenant: str
    account: str | None
    scopes: tuple[str, ...]
    verifier: bytes | None
    identity: str | None
    note: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    @property
    def key(self) -> str:
        """What it is looked up by."""
        return self.identity or self.id

    @property
    def name(self) -> str:
        """What it is called in lists and logs."""
        return f"{tokens.PREFIX}_{self.id}"

    def state(self, now: datetime) -> str:
        """`live`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "live" if self.expires_at is None or now < self.expires_at else "expired"

    def principal(self) -> Principal:
        """On whose behalf comes who shows it."""
        return Principal(self.tenant, frozenset(map(Scope, self.scopes)), self.account, self.name)


class Tenant(NamedTuple):
    """A tenant and its limits; None is what the collector was told for all, infinity is none."""

    name: str
    points_per_second: float | None = None
    new_streams_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class InDatabase:
    """Credentials and limits, which the collectors of one database share (`lookups.Directory`, `quotas.Directory`)."""

    store: Store

    async def find(self, keys: Sequence[str]) -> Mapping[str, Credential]:
        """Those of the keys that are known. Raises StoreUnavailable."""

        async def find(connection: Connection) -> list[Credential]:
            return _credentials(await (await connection.execute(_FIND_SQL, {"keys": [*keys]})).fetchall())

        return {credential.key: credential for credential in await self.store.ask(find)}

    async def any(self) -> bool:
        """True if a credential has ever been made. Raises StoreUnavailable."""

        async def any_there(connection: Connection) -> bool:
            return await (await connection.execute("SELECT EXISTS (SELECT FROM credential)")).fetchone() == (True,)

        return await self.store.ask(any_there)

    async def tenant(self, name: str) -> Tenant:
        """A tenant's limits. Raises StoreUnavailable."""

        async def find(connection: Connection) -> Tenant:
            return next(iter(await tenants(connection, name)), Tenant(name))

        return await self.store.ask(find)

    async def unseen(self, streams: Iterable[Stream]) -> list[Stream]:
        """The streams that have never been written. Raises StoreUnavailable."""
        return await self.store.unseen(streams)


def check_name(tenant: str) -> str:
    """The name of a tenant that is to be made. Raises UserError."""
    if not TENANT.fullmatch(tenant):
        raise UserError(f"{tenant!r} is no name of a tenant: {A_TENANT}")
    return tenant


async def add(
    connection: Connection,
    tenant: str,
    scopes: Iterable[Scope],
    *,
    account: str | None = None,
    identity: str | None = None,
    expires_at: datetime | None = None,
    note: str = "",
) -> tuple[Credential, tokens.Token | None, bool]:
    """A new token, or with `identity` a client certificate that is trusted from now on; whether the tenant is new, too.

    The token is nowhere but in what is returned. The connection must be in a transaction. Raises UserError.
    """
    wanted = tuple(sorted({scope.value for scope in scopes}))
    _check(wanted, account, note)
    if identity is not None:
        identity = certificates.check_identity(identity)
    # Asked first: who may make credentials need not have the right to make tenants.
    is_new = not await tenants(connection, tenant) and await add_tenant(connection, tenant)
    token = tokens.make() if identity is None else None
    try:
        row = await (
            await connection.execute(
                f"""INSERT INTO credential
                    (credential, kind, tenant, account, scopes, verifier, identity, note, expires_at)
                    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s) RETURNING {_COLUMNS}""",  # noqa: S608
                [
                    tokens.new_id() if token is None else token.id,
                    "certificate" if token is None else "token",
                    *(
                        tenant,
                        account,
                        [*wanted],
                        None if token is None else token.verifier(),
                        identity,
                        note,
                        expires_at,
                    ),
                ],
            )
        ).fetchall()
    except psycopg.errors.UniqueViolation:
        raise UserError(
            f"the certificate {identity} is trusted already: see `tallymark tokens list`, and revoke that one first"
        ) from None
    return _credentials(row)[0], token, is_new


def _check(scopes: tuple[str, ...], account: str | None, note: str) -> None:
    if not scopes:
        raise UserError(f"a credential needs a scope: {', '.join(scope.value for scope in Scope)}")
    if Scope.READ_ACCOUNT.value in scopes and len(scopes) > 1:
        raise UserError(f"the scope {Scope.READ_ACCOUNT.value!r} stands alone: make a second credential for the others")
    if (Scope.READ_ACCOUNT.value in scopes) != (account is not None):
        raise UserError(
            f"an account goes with the scope {Scope.READ_ACCOUNT.value!r}, and that with an account: the other scopes"
            " are for all accounts of the tenant"
        )
    if account is not None and (not 0 < len(account) <= MAX_ACCOUNT or "\0" in account):
        raise UserError(f"an account has 1 to {MAX_ACCOUNT} characters, none NUL")
    if len(note) > MAX_NOTE or "\0" in note:
        raise UserError(f"a note has at most {MAX_NOTE} characters, none NUL")
    if tokens.find(note) or tokens.find(account or ""):
        raise UserError("there is a token in the note or the account: it would be stored, and shown in lists")


async def check_live(connection: Connection, shown: Principal) -> None:
    """Raises Unauthenticated where a credential has ended by now: what collectors remember of one (`lookups`) must not
    be long enough to make another, or to decide something for good."""
    [is_live] = await (
        await connection.execute(
            "SELECT EXISTS (SELECT FROM credential WHERE credential = %s AND revoked_at IS NULL"
            " AND (expires_at IS NULL OR expires_at > now()))",
            [shown.credential.removeprefix(f"{tokens.PREFIX}_")],
        )
    ).fetchone() or [False]
    if not is_live:
        raise Unauthenticated(f"{shown.credential} has ended: have a new one made")


async def taking_turns(connection: Connection, maker: Principal) -> None:
    """Others who make or revoke credentials of the tenant wait for this transaction's end. Raises as `check_live`."""
    await locks.taken(connection, f"{locks.CREDENTIALS}:{maker.tenant}")
    await check_live(connection, maker)


async def check_room(connection: Connection, tenant: str) -> None:
    """Raises NotPossible where the tenant has as many credentials as it may make itself. In its turn."""
    [live, made] = await (
        await connection.execute(
            "SELECT count(*) FILTER (WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())), count(*)"
            " FROM credential WHERE tenant = %s",
            [tenant],
        )
    ).fetchone() or [0, 0]
    if live >= MAX_LIVE:
        raise NotPossible(f"the tenant has {live:,} live credentials, at most {MAX_LIVE:,} are made so: revoke some")
    if made >= MAX_MADE:
        raise NotPossible(
            f"the tenant has had {made:,} credentials, at most {MAX_MADE:,} are made so: the collector's operator makes"
            " more (`tallymark tokens create`)"
        )


async def revoke(connection: Connection, credential: str, tenant: str | None = None) -> tuple[Credential, bool]:
    """Ends a credential for good; False if it had ended that way before. Takes the id with or without `tmk_`, or the
    token itself. Raises NotThere where there is none, or none of the tenant that is named."""
    token = tokens.read(credential)
    name = token.id if token is not None else credential.removeprefix(f"{tokens.PREFIX}_")
    rows = await (
        await connection.execute(
            f"""UPDATE credential c SET revoked_at = coalesce(c.revoked_at, now())
                FROM (SELECT credential AS id, revoked_at IS NULL AS was_live FROM credential
                      WHERE credential = %(id)s AND (%(tenant)s::text IS NULL OR tenant = %(tenant)s)
                      FOR UPDATE) before
                WHERE c.credential = before.id
                RETURNING before.was_live, {", ".join(f"c.{name.strip()}" for name in _COLUMNS.split(","))}""",  # noqa: S608
            {"id": name, "tenant": tenant},
        )
    ).fetchall()
    if not rows:
        # What was given may be a token with a slip in it: it is not repeated.
        shown = f"{tokens.PREFIX}_{name}" if tokens.ID_PATTERN.fullmatch(name) else "of that name"
        raise NotThere(f"there is no credential {shown}: `tallymark tokens list` shows them")
    [(was_live, *row)] = rows
    return _credentials([row])[0], bool(was_live)


async def credentials(connection: Connection, tenant: str | None = None) -> list[Credential]:
    """All credentials, dead ones too, or those of one tenant."""
    return _credentials(await (await connection.execute(_LIST_SQL, {"tenant": tenant})).fetchall())


async def page_of_credentials(connection: Connection, tenant: str, after: str, limit: int) -> list[Credential]:
    """The next credentials of a tenant by their ids, dead ones too; "" is before the first."""
    found = await connection.execute(_PAGE_SQL, {"tenant": tenant, "after": after, "limit": limit})
    return _credentials(await found.fetchall())


async def tenants(connection: Connection, name: str | None = None) -> list[Tenant]:
    """All tenants, or the one of that name."""
    rows = await (
        await connection.execute(
            "SELECT tenant, points_per_second, new_streams_per_hour FROM tenant"
            " WHERE %(name)s::text IS NULL OR tenant = %(name)s ORDER BY tenant",
            {"name": name},
        )
    ).fetchall()
    return [Tenant(*row) for row in rows]


async def check_tenant(connection: Connection, name: str | None, remedy: str = "") -> None:
    """Raises UserError where there is no tenant of that name: a slip must not read as "no usage". `remedy` is what else
    can be done."""
    if name is None or await tenants(connection, name):
        return
    known = ", ".join(tenant.name for tenant in (await tenants(connection))[:20])
    raise UserError(f"there is no tenant {name!r}: there are {known}{f'; {remedy}' if remedy else ''}")


async def add_tenant(connection: Connection, name: str) -> bool:
    """Makes a tenant; False where it is there. Raises UserError."""
    result = await connection.execute(
        "INSERT INTO tenant (tenant) VALUES (%s) ON CONFLICT DO NOTHING", [check_name(name)]
    )
    return result.rowcount == 1


async def set_limits(connection: Connection, tenant: Tenant, changed: Iterable[str]) -> Tenant:
    """Sets the limits that `changed` names (columns) as the tenant has them here; returns all. Raises UserError."""
    for column in changed:
        if column not in Tenant._fields[1:]:
            raise ValueError(column)
        await connection.execute(
            f"UPDATE tenant SET {column} = %s WHERE tenant = %s",  # noqa: S608 - a column of ours
            [getattr(tenant, column), tenant.name],
        )
    await check_tenant(connection, tenant.name)
    return (await tenants(connection, tenant.name))[0]


def _credentials(rows: Iterable[Sequence[object]]) -> list[Credential]:
    names = tuple(Credential.__dataclass_fields__)
    found = []
    for row in rows:
        values = dict(zip(names, row, strict=True))
        values["scopes"] = tuple(values["scopes"])  # type: ignore[arg-type]
        found.append(Credential(**values))  # type: ignore[arg-type]
    return found
