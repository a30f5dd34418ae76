"""Which credential is good for which method, of every method that there is; none is good for another tenant."""

from __future__ import annotations

import grpc
import pytest

from tallymark.v1 import access_pb2, quarantine_pb2, usage_pb2
from tallymark_collector.access import Scope
from tallymark_collector.model import Batch
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.store import Store
from tests.collector.api.conftest import METHODS, Asking, asked, made
from tests.support.usage import BASE, SECOND, number, point, request, stream, sum_metric

USAGE, ACCESS, QUARANTINE = (f"tallymark.v1.{name}Service" for name in ("Usage", "Access", "Quarantine"))

NEEDED = {
    (USAGE, "QueryUsage"): {Scope.READ, Scope.READ_ACCOUNT},
    (ACCESS, "CreateCredential"): {Scope.ADMINISTER},
    (ACCESS, "ListCredentials"): {Scope.ADMINISTER},
    (ACCESS, "RevokeCredential"): {Scope.ADMINISTER},
    (QUARANTINE, "ListItems"): {Scope.READ},
    (QUARANTINE, "GetItem"): {Scope.READ},
    (QUARANTINE, "ReleaseItem"): {Scope.ADMINISTER},
    (QUARANTINE, "DiscardItem"): {Scope.ADMINISTER},
    (QUARANTINE, "ReopenItem"): {Scope.ADMINISTER},
}


def test_it_is_said_of_every_method_who_may() -> None:
    assert set(METHODS) == set(NEEDED)


@pytest.mark.parametrize("scope", Scope)
async def test_a_scope_opens_what_it_is_for_and_nothing_else(store: Store, asking: Asking, scope: Scope) -> None:
    token = await made(store, "ours", [scope], account="acme" if scope is Scope.READ_ACCOUNT else None)
    for service, method in METHODS:
        code = await asking.code(service, method, token=token)
        if scope in NEEDED[service, method]:
            # Of an empty request; what is asked for may be refused then, the right to ask is not.
            assert code in ("OK", "INVALID_ARGUMENT", "NOT_FOUND"), (service, method, code)
        else:
            assert code == "PERMISSION_DENIED", (service, method, code)


async def test_all_scopes_but_those_that_it_needs_open_no_method(store: Store, asking: Asking) -> None:
    for (service, method), needed in NEEDED.items():
        scopes = [scope for scope in Scope if scope not in needed and scope is not Scope.READ_ACCOUNT]
        token = await made(store, "ours", scopes)
        assert await asking.code(service, method, token=token) == "PERMISSION_DENIED", (service, method)


async def test_who_shows_nothing_or_nothing_good_is_told_so(store: Store, asking: Asking) -> None:
    """Also on loopback before the first token was made, where whoever is on the machine may write."""
    for service, method in METHODS:
        assert await asking.code(service, method) == "UNAUTHENTICATED"
    good = await made(store, "ours", [Scope.READ, Scope.ADMINISTER])
    bad = good[:-1] + ("0" if good[-1] != "0" else "1")
    for service, method in METHODS:
        assert await asking.code(service, method) == "UNAUTHENTICATED"
        assert await asking.code(service, method, token=bad) == "UNAUTHENTICATED"


async def test_an_anonymous_writer_reads_nothing(store: Store) -> None:
    async with asked(store, allow_anonymous=True) as asking:
        for service, method in METHODS:
            assert await asking.code(service, method) == "UNAUTHENTICATED"


async def test_a_revoked_or_expired_credential_opens_nothing(store: Store, asking: Asking) -> None:
    revoked, expired = [await made(store, "ours", [Scope.READ, Scope.ADMINISTER]) for _ in range(2)]
    async with store.transaction() as connection:
        await connection.execute("UPDATE credential SET revoked_at = now() WHERE credential = %s", [revoked[4:16]])
        await connection.execute(
            "UPDATE credential SET expires_at = now() - interval '1 s' WHERE credential = %s", [expired[4:16]]
        )
    for service, method in METHODS:
        for token in (revoked, expired):
            assert await asking.code(service, method, token=token) == "UNAUTHENTICATED"


async def test_an_accounts_reader_reads_that_account_alone(store: Store, asking: Asking) -> None:
    for tenant, factor in (("ours", 1), ("theirs", 1000)):
        points = [point(stream(name, tenant=tenant), 0, 10, factor * n) for n, name in ((1, "acme"), (10, "globex"))]
        await store.write(Batch(points=points))
    token = await made(store, "ours", [Scope.READ_ACCOUNT], account="acme")
    for asked_for in ("", "acme"):
        found = await asking.usage(token, account=asked_for)
        assert [(row.group["account"], row.quantity) for row in found.rows] == [("acme", "1")]
        assert not found.HasField("unattributed_items")
    for other in ("globex", "nobody", "acme ", "%"):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await asking.usage(token, account=other)
        # The same words whether or not there is such an account.
        assert (refused.value.code().name, refused.value.details()) == (
            "PERMISSION_DENIED",
            f"the credential {token[:16]} may not read this",
        )


async def test_a_tenants_reader_reads_that_tenant_alone(store: Store, asking: Asking) -> None:
    for tenant, factor in (("ours", 1), ("theirs", 1000)):
        points = [point(stream(name, tenant=tenant), 0, 10, factor * n) for n, name in ((1, "acme"), (10, "globex"))]
        await store.write(Batch(points=points))
    token = await made(store, "theirs")
    found = await asking.usage(token)
    assert {row.group["account"]: row.quantity for row in found.rows} == {"acme": "1000", "globex": "10000"}
    assert [row.quantity for row in (await asking.usage(token, account="acme")).rows] == ["1000"]
    ours = await made(store, "ours")
    page = await asking.usage(token, page_size=1)
    followed = await asking.usage(ours, page_size=1, page_token=page.next_page_token)
    # A page's token holds no right: with another credential it goes on in that one's own usage.
    assert [row.quantity for row in followed.rows] == ["10"]


async def test_credentials_of_another_tenant_are_not_there(store: Store, asking: Asking) -> None:
    ours, theirs = [await made(store, tenant, [Scope.ADMINISTER]) for tenant in ("ours", "theirs")]
    listed = await asking.call(ACCESS, "ListCredentials", token=ours)
    assert [one.name for one in listed.credentials] == [ours[:16]]
    for name in (theirs, theirs[:16], theirs[4:16]):
        revoke = access_pb2.RevokeCredentialRequest(name=name)
        assert await asking.code(ACCESS, "RevokeCredential", revoke, token=ours) == "NOT_FOUND"
    assert await asking.code(ACCESS, "ListCredentials", token=theirs) == "OK"


async def test_what_a_tenant_makes_is_its_own(store: Store, asking: Asking) -> None:
    admin = await made(store, "ours", [Scope.ADMINISTER])
    await store.write(Batch(points=[point(stream(tenant="theirs"), 0, 10, 7), point(stream(tenant="ours"), 0, 10, 3)]))
    create = access_pb2.CreateCredentialRequest(scopes=["read"], note="for the dashboard")
    answer = await asking.call(ACCESS, "CreateCredential", create, admin)
    assert [row.quantity for row in (await asking.usage(answer.token)).rows] == ["3"]
    usage = usage_pb2.QueryUsageRequest()
    assert await asking.code(USAGE, "QueryUsage", usage, admin) == "PERMISSION_DENIED"


async def test_items_of_another_tenant_are_not_there(store: Store) -> None:
    now = BASE + 60 * SECOND
    for tenant in ("ours", "theirs"):
        await Pipeline(store, now_ns=lambda: now).metrics(
            tenant, request(sum_metric([number(BASE, now, 3, {})])).SerializeToString()
        )
    every = [Scope.READ, Scope.ADMINISTER]
    ours, theirs = await made(store, "ours", every), await made(store, "theirs", every)
    async with asked(store) as asking:
        [item] = (await asking.call(QUARANTINE, "ListItems", token=theirs)).items
        [own] = (await asking.call(QUARANTINE, "ListItems", token=ours)).items
        assert item.id != own.id
        for method, message in (
            ("GetItem", quarantine_pb2.GetItemRequest(id=item.id)),
            ("ReleaseItem", quarantine_pb2.ReleaseItemRequest(id=item.id, account="acme")),
            ("DiscardItem", quarantine_pb2.DiscardItemRequest(id=item.id, because="mine")),
            ("ReopenItem", quarantine_pb2.ReopenItemRequest(id=item.id)),
        ):
            assert await asking.code(QUARANTINE, method, message, ours) == "NOT_FOUND"
        found = await asking.call(QUARANTINE, "GetItem", quarantine_pb2.GetItemRequest(id=item.id), theirs)
        assert (found.state, len(found.history)) == ("open", 0)
