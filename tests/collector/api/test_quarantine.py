"""The queue of a tenant worked through over gRPC: the same decisions as on the command line, on the same trail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tallymark.v1 import quarantine_pb2 as pb
from tallymark.v1.access_pb2 import CreateCredentialRequest, RevokeCredentialRequest
from tallymark_collector.access import Scope
from tallymark_collector.metering import Metering, parse_rules
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.settings import Settings
from tallymark_collector.store import Store
from tests.collector.api.conftest import Asking, asked, made
from tests.support.usage import BASE, SECOND, number, request, sum_metric

SERVICE = "tallymark.v1.QuarantineService"
INSUFFICIENT = psycopg.errors.InsufficientPrivilege
NOW = BASE + 60 * SECOND
PAGE = Path(__file__).parents[3] / "docs" / "api.md"
EVERY = [Scope.READ, Scope.ADMINISTER]


async def send(store: Store, *points: Any, **of: Any) -> None:
    message = request(sum_metric([number(BASE, NOW, value, attributes) for value, attributes in points], **of))
    await Pipeline(store, now_ns=lambda: NOW).metrics("default", message.SerializeToString())


async def listed(asking: Asking, token: str, **wanted: Any) -> pb.ListItemsResponse:
    found = await asking.call(SERVICE, "ListItems", pb.ListItemsRequest(**wanted), token)
    assert isinstance(found, pb.ListItemsResponse)
    return found


async def test_usage_of_nobody_is_given_to_somebody_once(store: Store, asking: Asking, dsn: str) -> None:
    await send(store, (3, {"http.route": "/a"}))
    token = await made(store, "default", EVERY)
    page = await listed(asking, token)
    [item] = page.items
    assert (item.reason, item.meter, item.account, dict(page.open)) == (
        "account_missing",
        "api.requests",
        "",
        {"account_missing": 1},
    )
    explained = await asking.call(SERVICE, "GetItem", pb.GetItemRequest(id=item.id[:12]), token)
    assert (explained.id, explained.state, explained.refusal) == (item.id, "open", "")
    assert "attribute" in explained.release
    assert explained.content["value"] == "3"
    assert explained.meaning
    assert explained.remedy

    release = pb.ReleaseItemRequest(id=item.id, because="ticket 311")
    with pytest.raises(grpc.aio.AioRpcError, match="account") as error:
        await asking.call(SERVICE, "ReleaseItem", release, token)
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    release.account = "acme"
    done = await asking.call(SERVICE, "ReleaseItem", release, token)
    assert (done.done_now, done.action.action, done.action.billed_to, done.action.quantity) == (
        True,
        "attributed",
        "acme",
        "3",
    )
    assert (done.action.acted_by, done.action.because) == (token[:16], "ticket 311")
    # A client that did not hear the answer asks again: nothing is billed twice.
    again = await asking.call(SERVICE, "ReleaseItem", release, token)
    assert not again.done_now
    assert again.action == done.action
    assert [(row.group["account"], row.quantity) for row in (await asking.usage(token)).rows] == [("acme", "3")]
    explained = await asking.call(SERVICE, "GetItem", pb.GetItemRequest(id=item.id), token)
    assert (explained.state, [action.action for action in explained.history]) == ("attributed", ["attributed"])
    with psycopg.connect(dsn) as connection:
        trail = connection.execute("SELECT acted_by, because FROM tallymark.usage_quarantine_history").fetchall()
    assert trail == [(token[:16], "ticket 311")]


async def test_discarded_and_opened_again(store: Store, asking: Asking) -> None:
    await send(store, (3, {}))
    token = await made(store, "default", EVERY)
    [item] = (await listed(asking, token)).items
    reopen = pb.ReopenItemRequest(id=item.id, because="no")
    assert await asking.code(SERVICE, "ReopenItem", reopen, token) == "FAILED_PRECONDITION"
    for because in ("", "  ", "x" * 1001):
        discard = pb.DiscardItemRequest(id=item.id, because=because)
        assert await asking.code(SERVICE, "DiscardItem", discard, token) == "INVALID_ARGUMENT"
    discard = pb.DiscardItemRequest(id=item.id, because="a test")
    assert (await asking.call(SERVICE, "DiscardItem", discard, token)).done_now
    assert not (await asking.call(SERVICE, "DiscardItem", discard, token)).done_now
    assert not (await listed(asking, token)).items
    assert (await asking.call(SERVICE, "ReopenItem", reopen, token)).action.action == "reopened"
    assert [one.id for one in (await listed(asking, token)).items] == [item.id]


async def test_the_queue_by_what_is_asked(store: Store, asking: Asking) -> None:
    await send(store, (3, {}), (4, {"n": 1}), (-1, {"tallymark.account.id": "acme"}))
    await send(store, (5, {}), name="llm.tokens", unit="{token}")
    token = await made(store, "default", EVERY)
    assert dict((await listed(asking, token)).open) == {"account_missing": 3, "value_negative": 1}
    assert len((await listed(asking, token, account="")).items) == 3
    assert len((await listed(asking, token, account="acme")).items) == 1
    assert len((await listed(asking, token, meter="llm.tokens")).items) == 1
    page = await listed(asking, token, reason="account_missing", page_size=2)
    assert (len(page.items), dict(page.open)) == (2, {"account_missing": 3})
    for wanted in ({"reason": "none"}, {"page_size": 1001}, {"page_size": -1}):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await listed(asking, token, **wanted)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    for item, code in (("zz", "INVALID_ARGUMENT"), ("ab", "INVALID_ARGUMENT"), ("0" * 32, "NOT_FOUND")):
        assert await asking.code(SERVICE, "GetItem", pb.GetItemRequest(id=item), token) == code


async def test_mended_as_asked(store: Store, asking: Asking) -> None:
    await send(store, (3, {"tallymark.account.id": "acme"}), name="x" * 300, unit="{x}")
    token = await made(store, "default", EVERY)
    [item] = (await listed(asking, token)).items
    release = pb.ReleaseItemRequest(id=item.id, meter="api.requests", unit="")
    await asking.call(SERVICE, "ReleaseItem", release, token)
    [row] = (await asking.usage(token)).rows
    assert (row.group["meter"], row.group["unit"], row.quantity) == ("api.requests", "", "3")


async def test_items_are_read_with_the_collectors_file_of_meters(store: Store) -> None:
    rules = parse_rules("meters: {egress: {unit: By, sources: [{metric: sent, quantity: value, account: customer}]}}")
    message = request(sum_metric([number(BASE, NOW, 9, {})], name="sent", unit="By"), scope="gateway")
    pipeline = Pipeline(store, metering=Metering(rules), now_ns=lambda: NOW)
    await pipeline.metrics("default", message.SerializeToString())
    token = await made(store, "default", EVERY)
    async with asked(store) as without:
        [item] = (await listed(without, token)).items
        release = pb.ReleaseItemRequest(id=item.id, account="acme")
        assert await without.code(SERVICE, "ReleaseItem", release, token) == "FAILED_PRECONDITION"
    async with asked(store, Settings("unused", port=0, meters=rules)) as with_file:
        await with_file.call(SERVICE, "ReleaseItem", release, token)
        [row] = (await with_file.usage(token)).rows
        assert (row.group["meter"], row.group["account"], row.quantity) == ("egress", "acme", "9")


def rights_of_the_page() -> list[str]:
    """What docs/api.md has the owner grant."""
    [block] = [text for text in PAGE.read_text("utf-8").split("```")[1::2] if text.startswith("sql\n")]
    return [line for line in block.splitlines() if line.startswith("GRANT")]


async def test_a_collector_whose_role_may_not_says_so(store: Store, dsn: str) -> None:
    """As documented the collector's role settles nothing and makes no credentials."""
    await send(store, (3, {}))
    token = await made(store, "default", EVERY)
    role = "tallymark_test_api_writer"
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute(f"DROP ROLE IF EXISTS {role}")
        owner.execute(f"CREATE ROLE {role} LOGIN")
    try:
        await store.grant(writer=role)
        writer = Store(make_conninfo(dsn, user=role))
        await writer.open()
        try:
            async with asked(writer) as asking:
                [item] = (await listed(asking, token)).items
                for service, method, message in (
                    (SERVICE, "DiscardItem", pb.DiscardItemRequest(id=item.id, because="a test")),
                    ("tallymark.v1.AccessService", "CreateCredential", CreateCredentialRequest(scopes=["read"])),
                ):
                    with pytest.raises(grpc.aio.AioRpcError, match="the database user that this collector") as error:
                        await asking.call(service, method, message, token)
                    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
                with psycopg.connect(dsn, autocommit=True) as owner:
                    for right in rights_of_the_page():
                        owner.execute(right.replace("tallymark_writer", role))
                discard = pb.DiscardItemRequest(id=item.id, because="a test")
                assert (await asking.call(SERVICE, "DiscardItem", discard, token)).done_now
                access = "tallymark.v1.AccessService"
                made_now = await asking.call(
                    access, "CreateCredential", CreateCredentialRequest(scopes=["read"]), token
                )
                revoke = RevokeCredentialRequest(name=made_now.credential.name)
                assert (await asking.call(access, "RevokeCredential", revoke, token)).state == "revoked"
                with psycopg.connect(make_conninfo(dsn, user=role)) as other, pytest.raises(INSUFFICIENT):
                    other.execute("UPDATE tallymark.credential SET scopes = '{administer}'")
        finally:
            await writer.close()
    finally:
        with psycopg.connect(dsn, autocommit=True) as owner:
            owner.execute(f"DROP OWNED BY {role}")
            owner.execute(f"DROP ROLE {role}")


async def test_the_whole_queue_in_pages(store: Store, asking: Asking) -> None:
    """Also where the names in it are longer than a client takes at once."""
    points = [(n + 1, {"n": n}) for n in range(25)]
    await send(store, *points)
    await send(store, *points, name="m" * 200_000)
    token = await made(store, "default", EVERY)
    found: list[str] = []
    after, pages = "", 0
    while after or not pages:
        page = await listed(asking, token, page_size=20 - pages, page_token=after)
        assert page.ByteSize() < 4 * 1024 * 1024
        found += [item.id for item in page.items]
        after, pages = page.next_page_token, pages + 1
    assert len(found) == len(set(found)) == sum(page.open.values())
    assert pages == 3
    [long] = (await listed(asking, token, page_size=1, reason="meter_invalid")).items
    assert (len(long.meter), long.meter[-1]) == (4096, "…")
    for page_token in ("WyJhIl0=", "nonsense"):
        with pytest.raises(grpc.aio.AioRpcError, match="page_token was not given for this question"):
            await listed(asking, token, page_token=page_token)


async def test_an_item_too_large_to_be_read_beside_others_is_left_to_the_command_line(
    store: Store, asking: Asking
) -> None:
    await send(store, (3, {"text": "x" * 300_000}))
    token = await made(store, "default", EVERY)
    [item] = (await listed(asking, token)).items
    for method, message in (
        ("GetItem", pb.GetItemRequest(id=item.id)),
        ("ReleaseItem", pb.ReleaseItemRequest(id=item.id, account="acme")),
        ("DiscardItem", pb.DiscardItemRequest(id=item.id, because="a test")),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=r"bytes, at most 262,144 are read here") as error:
            await asking.call(SERVICE, method, message, token)
        assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_what_was_given_is_not_repeated_at_length(store: Store, asking: Asking) -> None:
    """A client shows neither status nor words of an answer whose head is too long."""
    await send(store, (3, {}))
    token = await made(store, "default", EVERY)
    [item] = (await listed(asking, token)).items
    long = "ä" * 100_000
    for method, message, code in (
        ("GetItem", pb.GetItemRequest(id=long), "INVALID_ARGUMENT"),
        ("DiscardItem", pb.DiscardItemRequest(id=long, because="x"), "INVALID_ARGUMENT"),
        ("DiscardItem", pb.DiscardItemRequest(id=item.id[:12], because="x"), "INVALID_ARGUMENT"),
        ("ReleaseItem", pb.ReleaseItemRequest(id=item.id, account=long), "FAILED_PRECONDITION"),
        ("ReleaseItem", pb.ReleaseItemRequest(id=item.id, account="a", drop=[long]), "FAILED_PRECONDITION"),
    ):
        assert await asking.code(SERVICE, method, message, token) == code, method


async def test_a_revoked_administrator_decides_nothing(store: Store, asking: Asking) -> None:
    await send(store, (3, {}))
    token = await made(store, "default", EVERY)
    [item] = (await listed(asking, token)).items
    revoke = RevokeCredentialRequest(name=token)
    await asking.call("tallymark.v1.AccessService", "RevokeCredential", revoke, token)
    discard = pb.DiscardItemRequest(id=item.id, because="x")
    assert await asking.code(SERVICE, "DiscardItem", discard, token) == "UNAUTHENTICATED"
