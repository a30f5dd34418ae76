"""A tenant makes, lists and revokes its own credentials over gRPC."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timezone
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.duration_pb2 import Duration

from tallymark.v1.access_pb2 import (
    CreateCredentialRequest,
    ListCredentialsRequest,
    RevokeCredentialRequest,
)
from tallymark_collector.access import Scope, records
from tallymark_collector.store import Store
from tests.collector.api.conftest import Asking, made

SERVICE = "tallymark.v1.AccessService"


async def test_a_token_from_its_making_to_its_end(
    store: Store, asking: Asking, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    admin = await made(store, "ours", [Scope.ADMINISTER])
    create = CreateCredentialRequest(
        scopes=["read-account"], account="acme", expires_after=Duration(seconds=3600), note="the dashboard"
    )
    answer = await asking.call(SERVICE, "CreateCredential", create, admin)
    of = answer.credential
    assert (of.kind, of.scopes, of.account, of.state, of.note) == (
        "token",
        ["read-account"],
        "acme",
        "live",
        "the dashboard",
    )
    assert of.name == answer.token[:16]
    assert 3590 < (of.expire_time.ToDatetime() - of.create_time.ToDatetime()).total_seconds() < 3610
    assert (await asking.usage(answer.token)).next_page_token == ""
    # The token is kept nowhere: neither in the database, nor in the log, nor in a list.
    with psycopg.connect(dsn) as connection:
        assert answer.token not in str(connection.execute("SELECT * FROM tallymark.credential").fetchall())
    listed = await asking.call(SERVICE, "ListCredentials", None, admin)
    assert answer.token not in str(listed) + caplog.text
    assert f"{admin[:16]} of tenant 'ours' made the credential {of.name}" in caplog.text

    ended = await asking.call(SERVICE, "RevokeCredential", RevokeCredentialRequest(name=of.name), admin)
    assert ended.state == "revoked"
    again = await asking.call(SERVICE, "RevokeCredential", RevokeCredentialRequest(name=answer.token), admin)
    assert again.revoke_time == ended.revoke_time
    assert f"{admin[:16]} of tenant 'ours' revoked the credential {of.name}" in caplog.text


async def test_lists_have_pages(store: Store, asking: Asking) -> None:
    admin = await made(store, "ours", [Scope.ADMINISTER])
    names = {admin[:16], *[(await made(store, "ours"))[:16] for _ in range(6)]}
    await made(store, "theirs")
    found: list[str] = []
    after = ""
    for _ in range(4):
        page = await asking.call(
            SERVICE, "ListCredentials", ListCredentialsRequest(page_size=2, page_token=after), admin
        )
        found += [credential.name for credential in page.credentials]
        after = page.next_page_token
    assert after == ""
    assert found == sorted(names)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({}, "a credential needs a scope"),
        ({"scopes": ["root"]}, "scopes: 'root' is none of write, read, read-account, administer"),
        ({"scopes": ["read-account"]}, "an account goes with the scope 'read-account'"),
        ({"scopes": ["read"], "account": "acme"}, "an account goes with the scope 'read-account'"),
        ({"scopes": ["read", "read-account"], "account": "acme"}, "'read-account' stands alone"),
        ({"scopes": ["read"], "expires_after": Duration()}, "expires_after has to be more than nothing, and 3660 days"),
        ({"scopes": ["read"], "expires_after": Duration(seconds=-1)}, "expires_after has to be more than nothing"),
        ({"scopes": ["read"], "expires_after": Duration(seconds=3661 * 86400)}, "3660 days at most"),
        ({"scopes": ["read"], "expires_after": Duration(seconds=2**62)}, "is no length of time"),
        ({"scopes": ["read"], "note": "x" * 201}, "a note has at most 200 characters"),
        ({"scopes": ["read"], "note": "a\0b"}, "note holds a NUL character"),
    ],
)
async def test_what_makes_no_credential(store: Store, asking: Asking, asked: dict[str, Any], why: str) -> None:
    admin = await made(store, "ours", [Scope.ADMINISTER])
    with pytest.raises(grpc.aio.AioRpcError, match=why) as error:
        await asking.call(SERVICE, "CreateCredential", CreateCredentialRequest(**asked), admin)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    async with store.reading() as connection:
        assert len(await records.credentials(connection)) == 1


async def test_a_secret_that_was_given_in_the_wrong_place_is_not_repeated(store: Store, asking: Asking) -> None:
    admin, other = await made(store, "ours", [Scope.ADMINISTER]), await made(store, "ours")
    for asked in ({"scopes": [other]}, {"scopes": ["read"], "note": other}):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await asking.call(SERVICE, "CreateCredential", CreateCredentialRequest(**asked), admin)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert other[20:] not in (error.value.details() or "")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await asking.call(SERVICE, "RevokeCredential", RevokeCredentialRequest(name=other[:-1]), admin)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert other[20:-1] not in (error.value.details() or "")


async def test_how_many_a_tenant_makes_is_bounded(
    store: Store, asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LIVE", 4)
    admin = await made(store, "ours", [Scope.ADMINISTER])
    for tenant in ("theirs",) * 5:
        await made(store, tenant)
    create = CreateCredentialRequest(scopes=["read"])
    answers = [await asking.call(SERVICE, "CreateCredential", create, admin) for _ in range(3)]
    assert await asking.code(SERVICE, "CreateCredential", create, admin) == "FAILED_PRECONDITION"
    revoke = RevokeCredentialRequest(name=answers[0].credential.name)
    await asking.call(SERVICE, "RevokeCredential", revoke, admin)
    assert await asking.code(SERVICE, "CreateCredential", create, admin) == "OK"


async def test_dates_of_what_has_ended(store: Store, asking: Asking) -> None:
    admin = await made(store, "ours", [Scope.ADMINISTER])
    async with store.transaction() as connection:
        at = datetime(2026, 1, 1, tzinfo=timezone.utc)
        await records.add(connection, "ours", [Scope.WRITE], expires_at=at)
        await records.add(connection, "ours", [Scope.WRITE], identity="dns:shop.example")
    found = (await asking.call(SERVICE, "ListCredentials", None, admin)).credentials
    assert sorted((one.kind, one.state, one.certificate) for one in found) == [
        ("certificate", "live", "dns:shop.example"),
        ("token", "expired", ""),
        ("token", "live", ""),
    ]
    [expired] = [one for one in found if one.state == "expired"]
    assert expired.expire_time.ToJsonString() == "2026-01-01T00:00:00Z"


@pytest.mark.parametrize("method", ["CreateCredential", "RevokeCredential"])
async def test_an_administrator_who_was_revoked_makes_no_successor(store: Store, asking: Asking, method: str) -> None:
    """Though collectors remember the credential for seconds."""
    admin, other = [await made(store, "ours", [Scope.ADMINISTER]) for _ in range(2)]
    assert await asking.code(SERVICE, "ListCredentials", None, admin) == "OK"
    await asking.call(SERVICE, "RevokeCredential", RevokeCredentialRequest(name=admin), admin)
    message = CreateCredentialRequest(scopes=["administer"])
    if method == "RevokeCredential":
        message = RevokeCredentialRequest(name=other)
    assert await asking.code(SERVICE, method, message, admin) == "UNAUTHENTICATED"
    async with store.reading() as connection:
        assert [one.state(datetime.now(timezone.utc)) for one in await records.credentials(connection)] == [
            "revoked",
            "live",
        ]


async def test_what_a_tenant_leaves_behind_is_bounded(
    store: Store, asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_MADE", 3)
    admin = await made(store, "ours", [Scope.ADMINISTER])
    create = CreateCredentialRequest(scopes=["read"])
    for _ in range(2):
        answer = await asking.call(SERVICE, "CreateCredential", create, admin)
        await asking.call(SERVICE, "RevokeCredential", RevokeCredentialRequest(name=answer.credential.name), admin)
    with pytest.raises(grpc.aio.AioRpcError, match="has had 3 credentials, at most 3 are made so"):
        await asking.call(SERVICE, "CreateCredential", create, admin)
    monkeypatch.setattr(records, "MAX_MADE", 10)
    long = CreateCredentialRequest(scopes=["read-account"], account="a" * 257)
    with pytest.raises(grpc.aio.AioRpcError, match="an account has 1 to 256 characters"):
        await asking.call(SERVICE, "CreateCredential", long, admin)


async def test_sessions_that_the_server_ended_cost_no_call(store: Store, asking: Asking, dsn: str) -> None:
    admin = await made(store, "ours", [Scope.ADMINISTER])
    create = CreateCredentialRequest(scopes=["read"])
    await asyncio.gather(*(asking.call(SERVICE, "ListCredentials", None, admin) for _ in range(4)))
    with psycopg.connect(dsn, autocommit=True) as other:
        other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    assert [await asking.code(SERVICE, "CreateCredential", create, admin) for _ in range(4)] == ["OK"] * 4
