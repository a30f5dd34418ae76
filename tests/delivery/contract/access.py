"""Tenants and their tokens, and credentials that are none: whoever shows one of these may leave nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

import psycopg

from tallymark_collector.access import Scope, records, tokens

UNKNOWN: Final = ("UNAUTHENTICATED", "HTTP 401")
FORBIDDEN: Final = ("PERMISSION_DENIED", "HTTP 403")


class Bad(NamedTuple):
    """A credential that is not good for sending usage, and the names of the answers that say so."""

    what: str
    token: str
    answers: tuple[str, str]


class Access(NamedTuple):
    """What one tenant's gateway shows, and what a thief would."""

    tenant: str
    token: str
    bad: Sequence[Bad]


def admitted(dsn: str, tenants: Sequence[str]) -> list[Access]:
    """Makes the tenants and their tokens. The schema must be there."""
    return asyncio.run(_admitted(dsn, tenants))


async def _admitted(dsn: str, tenants: Sequence[str]) -> list[Access]:
    found = []
    async with await psycopg.AsyncConnection.connect(dsn, options="-c search_path=tallymark") as connection:
        for tenant in tenants:
            texts = []
            for scope in (Scope.WRITE, Scope.WRITE, Scope.READ):
                credential, token, _ = await records.add(connection, tenant, [scope])
                assert token is not None
                texts.append(token.text)
                if len(texts) == 2:
                    await records.revoke(connection, credential.name)
            good, revoked, reading = texts
            slip = good[:-1] + ("0" if good[-1] != "0" else "1")
            bad = [Bad(what, text, UNKNOWN) for what, text in (("none", ""), ("a slip", slip), ("revoked", revoked))]
            bad += [Bad("never made", tokens.make().text, UNKNOWN), Bad("for reading", reading, FORBIDDEN)]
            found.append(Access(tenant, good, bad))
    return found
