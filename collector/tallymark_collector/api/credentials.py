"""`tallymark.v1.AccessService`: a tenant's credentials, made, listed and revoked by the tenant."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from tallymark.v1 import access_pb2
from tallymark_collector.access import Principal, Scope, records, tokens
from tallymark_collector.api import values
from tallymark_collector.api.calls import Method
from tallymark_collector.api.reading import Readers
from tallymark_collector.errors import UserError
from tallymark_collector.store.database import Connection

logger = logging.getLogger(__name__)

NAME: Final = "tallymark.v1.AccessService"
PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1_000


def methods(readers: Readers) -> list[Method[Any]]:
    """The service's methods."""

    async def create(
        principal: Principal, request: access_pb2.CreateCredentialRequest
    ) -> access_pb2.CreateCredentialResponse:
        principal.check_administer()
        scopes = [_scope(name) for name in request.scopes]
        after = values.length(request, "expires_after")
        expires_at = None if after is None else _expiry(after)

        async def work(connection: Connection) -> tuple[records.Credential, tokens.Token | None, bool]:
            await records.taking_turns(connection, principal)
            await records.check_room(connection, principal.tenant)
            return await records.add(
                connection,
                principal.tenant,
                scopes,
                account=request.account or None,
                expires_at=expires_at,
                note=request.note,
            )

        async with readers.turn(principal, administers=True):
            made, token, _ = await readers.store.settle(work)
        assert token is not None
        logger.info("%s of tenant %r made the credential %s", principal.credential, principal.tenant, made.name)
        return access_pb2.CreateCredentialResponse(credential=_document(made), token=token.text)

    async def list_(
        principal: Principal, request: access_pb2.ListCredentialsRequest
    ) -> access_pb2.ListCredentialsResponse:
        principal.check_administer()
        size = values.page_size(request.page_size, PAGE_SIZE, MAX_PAGE_SIZE)
        [after] = values.page_after(request, 1) or [""]
        async with readers.reading(principal, administers=True) as connection:
            found = await records.page_of_credentials(connection, principal.tenant, after or "", size + 1)
        return access_pb2.ListCredentialsResponse(
            credentials=map(_document, found[:size]),
            next_page_token=values.page_token(request, [found[size - 1].id]) if len(found) > size else "",
        )

    async def revoke(principal: Principal, request: access_pb2.RevokeCredentialRequest) -> access_pb2.Credential:
        principal.check_administer()

        async def work(connection: Connection) -> tuple[records.Credential, bool]:
            await records.taking_turns(connection, principal)
            return await records.revoke(connection, request.name, principal.tenant)

        async with readers.turn(principal, administers=True):
            ended, _ = await readers.store.settle(work)
        logger.info("%s of tenant %r revoked the credential %s", principal.credential, principal.tenant, ended.name)
        return _document(ended)

    return [
        Method("CreateCredential", access_pb2.CreateCredentialRequest, create, administers=True),
        Method("ListCredentials", access_pb2.ListCredentialsRequest, list_, administers=True),
        Method("RevokeCredential", access_pb2.RevokeCredentialRequest, revoke, administers=True),
    ]


def _scope(name: str) -> Scope:
    try:
        return Scope(name)
    except ValueError:
        known = ", ".join(scope.value for scope in Scope)
        shown = "what was given" if tokens.find(name) else repr(name[:64])
        raise UserError(f"scopes: {shown} is none of {known}") from None


def _expiry(after: timedelta) -> datetime:
    if not timedelta() < after <= records.MAX_EXPIRY:
        raise UserError(f"expires_after has to be more than nothing, and {records.MAX_EXPIRY.days} days at most")
    return datetime.now(timezone.utc) + after


def _document(credential: records.Credential) -> access_pb2.Credential:
    return access_pb2.Credential(
        name=credential.name,
        kind=credential.kind,
        scopes=credential.scopes,
        account=credential.account or "",
        state=credential.state(datetime.now(timezone.utc)),
        create_time=values.timestamp(credential.created_at),
        expire_time=values.timestamp(credential.expires_at),
        revoke_time=values.timestamp(credential.revoked_at),
        certificate=credential.identity or "",
        note=credential.note,
    )
