"""Usage over gRPC: exact, by the questions that are asked, with refusals that say what to do."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from tallymark_collector.access import Scope
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.billing.records import apply
from tallymark_collector.model import Batch, Temporality
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.store import Store
from tests.collector.api.conftest import Asking, made
from tests.support.usage import BASE, SECOND, number, point, request, stream, sum_metric


def at(seconds: float) -> Timestamp:
    found = Timestamp()
    found.FromNanoseconds(BASE + round(seconds * SECOND))
    return found


async def refused(asking: Asking, token: str, **asked: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await asking.usage(token, **asked)
    return error.value.code().name, error.value.details() or ""


async def test_quantities_are_exact_and_grouped_as_asked(store: Store, asking: Asking) -> None:
    values = ["0.1", "0.2", "1234567890123456789.000000000000000001", "1E+3"]
    points = [
        point(stream("acme", **{"http.route": f"/{n % 2}"}), 100 * n, 3000 * n + 10, value)
        for n, value in enumerate(values)
    ]
    await store.write(Batch(points=[*points, point(stream("acme"), 0, 20, 7)]))
    token = await made(store, "default")
    [total] = (await asking.usage(token)).rows
    assert (dict(total.group), total.aggregation, total.points) == (
        {"account": "acme", "meter": "api.requests", "unit": "{request}"},
        "sum",
        5,
    )
    assert total.quantity == "1234567890123457796.300000000000000001"
    by_hour = (await asking.usage(token, group_by=["route", "hour"])).rows
    expected: dict[tuple[str | None, str], Fraction] = defaultdict(Fraction)
    for each in [*points, point(stream("acme"), 0, 20, 7)]:
        hour = datetime.fromtimestamp(each.time_ns // SECOND // 3600 * 3600, timezone.utc)
        route = each.stream.series.attributes.get("http.route")
        expected[None if route is None else str(route), f"{hour:%Y-%m-%dT%H:%M:%SZ}"] += Fraction(each.value)
    assert {(row.group.get("route"), row.group["hour"]): Fraction(row.quantity) for row in by_hour} == expected
    # An attribute that is not there is absent, not empty.
    assert [row.points for row in by_hour if "route" not in row.group] == [1]


async def test_a_range_begins_and_ends_at_the_microsecond(store: Store, asking: Asking) -> None:
    await store.write(Batch(points=[point(stream(), n, n + 1, 10**n) for n in range(4)]))
    token = await made(store, "default")
    [row] = (await asking.usage(token, start=at(2), end=at(3.000001))).rows
    assert row.quantity == "110"  # the points at 2 and 3
    assert not (await asking.usage(token, start=at(10), end=at(10))).rows


async def test_pages(store: Store, asking: Asking) -> None:
    await store.write(Batch(points=[point(stream(f"a{n:02}"), 0, 1, n + 1) for n in range(25)]))
    token = await made(store, "default")
    found, page_token, pages = [], "", 0
    while True:
        page = await asking.usage(token, page_size=10 - pages, page_token=page_token)  # the size may change
        found += [(row.group["account"], row.quantity) for row in page.rows]
        page_token, pages = page.next_page_token, pages + 1
        if not page_token:
            break
    assert found == [(f"a{n:02}", str(n + 1)) for n in range(25)]
    assert pages == 3


async def test_the_longest_names_have_pages(store: Store, asking: Asking) -> None:
    longest = dict.fromkeys(("http.route", "http.request.method", "error.type", "tallymark.plan"), "😀" * 4096)
    await store.write(Batch(points=[point(stream(account, **longest), 0, 1, 1) for account in ("a", "b")]))
    token = await made(store, "default")
    by = ["route", "method", "error", "plan", "account"]
    first = await asking.usage(token, page_size=1, group_by=by)
    second = await asking.usage(token, page_size=1, group_by=by, page_token=first.next_page_token)
    assert [page.rows[0].group["account"] for page in (first, second)] == ["a", "b"]
    assert second.next_page_token == ""


async def test_what_was_recorded_until_then(store: Store, dsn: str, asking: Asking) -> None:
    await store.write(Batch(points=[point(stream(), 0, 1, 5)]))
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE tallymark.usage_point SET recorded_at = recorded_at - interval '2 hours'")
    await store.write(Batch(points=[point(stream(), 1, 2, 7)]))
    token = await made(store, "default")
    hour_ago = Timestamp()
    hour_ago.FromDatetime(datetime.now(timezone.utc) - timedelta(hours=1))
    found = await asking.usage(token, as_of=hour_ago)
    assert [row.quantity for row in found.rows] == ["5"]
    assert not found.HasField("unattributed_items")
    hour_ago.FromDatetime(datetime.now(timezone.utc))
    code, why = await refused(asking, token, as_of=hour_ago)
    assert code == "INVALID_ARGUMENT"
    assert "may still change" in why


async def test_usage_of_nobody_is_told_of(store: Store, asking: Asking) -> None:
    now = BASE + 60 * SECOND
    pipeline = Pipeline(store, now_ns=lambda: now)
    for tenant in ("default", "another"):
        metric = sum_metric([number(BASE, now, 3, {"n": tenant}), number(BASE, now, 4, {"n": "x"})])
        await pipeline.metrics(tenant, request(metric).SerializeToString())
    token = await made(store, "default")
    assert (await asking.usage(token)).unattributed_items == 2
    assert (await asking.usage(token, end=at(60))).unattributed_items == 0
    assert (await asking.usage(token, meter="other")).unattributed_items == 0


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"group_by": ["colour"]}, "cannot group by colour: choose from account, meter"),
        ({"group_by": ["account", "; DROP TABLE"]}, "cannot group by ; DROP TABLE"),
        ({"start": at(10), "end": at(0)}, "the range ends .* before it starts"),
        ({"start": Timestamp(nanos=1)}, "start: nanos are 1, and have to be whole microseconds"),
        ({"start": Timestamp(nanos=-1000)}, "start: nanos are -1000"),
        ({"end": Timestamp(seconds=2**62)}, "end: 4611686018427387904 s since 1970 is no time"),
        ({"as_of": Timestamp(seconds=-(2**62))}, "as_of: -4611686018427387904 s since 1970 is no time"),
        (
            {"start": Timestamp(seconds=253402300000)},
            "start: 253402300000 s since 1970 is no time of the years 1900 to",
        ),
        (
            {"end": Timestamp(seconds=-62135596800)},
            "end: -62135596800 s since 1970 is no time of the years 1900 to 9998",
        ),
        ({"page_size": -1}, r"page_size is -1, and has to be 0 \(which is 1,000\) to 10,000"),
        ({"page_size": 10_001}, "page_size is 10001"),
        ({"page_token": "nonsense"}, "page_token was not given for this question"),
        ({"page_token": "WyJhIl0="}, "page_token was not given for this question"),
        ({"page_token": "é"}, "page_token was not given for this question"),
        ({"page_token": "W" * 10_000}, "page_token was not given for this question"),
        ({"account": "a\0b"}, "account holds a NUL character"),
        ({"group_by": ["account", "me\0ter"]}, "group_by holds a NUL character"),
    ],
)
async def test_what_cannot_be_asked_is_refused_with_the_reason(
    store: Store, asking: Asking, asked: dict[str, Any], why: str
) -> None:
    token = await made(store, "default")
    with pytest.raises(grpc.aio.AioRpcError, match=why) as error:
        await asking.usage(token, **asked)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_token_of_another_question_is_refused(store: Store, asking: Asking) -> None:
    await store.write(Batch(points=[point(stream(f"a{n}"), 0, 1, 1) for n in range(3)]))
    token = await made(store, "default")
    after = (await asking.usage(token, page_size=1)).next_page_token
    for other in ({"meter": "api.requests"}, {"end": at(100)}, {"group_by": ["route"]}, {"account": "a1"}):
        code, why = await refused(asking, token, page_token=after, **other)
        assert code == "INVALID_ARGUMENT"
        assert "page_token was not given for this question" in why


async def test_a_forged_token_shows_nothing_more(store: Store, asking: Asking) -> None:
    """What a token says is a place in the credential's own usage, whatever stands in it."""
    for tenant in ("ours", "theirs"):
        await store.write(Batch(points=[point(stream(f"{tenant}-{n}", tenant=tenant), 0, 1, 1) for n in range(3)]))
    ours, theirs = await made(store, "ours"), await made(store, "theirs")
    forged = (await asking.usage(theirs, page_size=1)).next_page_token
    assert [row.group["account"] for row in (await asking.usage(ours, page_token=forged)).rows] == []
    one = await made(store, "ours", [Scope.READ_ACCOUNT], account="ours-2")
    of_all = (await asking.usage(ours, page_size=1)).next_page_token
    assert [row.group["account"] for row in (await asking.usage(one, page_token=of_all)).rows] == ["ours-2"]


async def test_bytes_that_are_no_request_are_refused(store: Store, asking: Asking) -> None:
    token = await made(store, "default")
    invoke = asking.channel.unary_unary("/tallymark.v1.UsageService/QueryUsage")
    for sent, code in ((b"\xff\xff", "INVALID_ARGUMENT"), (b"\x0a\x82\x80\x10" + b"a" * 262146, "RESOURCE_EXHAUSTED")):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await invoke(sent, metadata=[("authorization", f"Bearer {token}")], timeout=60)
        assert error.value.code().name == code
    for _ in range(600):  # a call is counted once it has ended here, too
        answered = {(each.signal, each.answer, each.error) for each in asking.requests.answered}
        if len(answered) == 2:
            break
        await asyncio.sleep(0.1)
    assert answered == {
        ("usage", "INVALID_ARGUMENT", "MalformedRequest"),
        ("usage", "RESOURCE_EXHAUSTED", "TooLarge"),
    }


async def test_levels_that_are_left_out_are_named(store: Store, asking: Asking) -> None:
    """They are in no sum, so that nothing else would tell of them."""
    plans = """
    currency: EUR
    meters:
      api.requests: {unit: "{request}"}
      seats: {unit: "{request}", aggregation: max, across: latest}
    plans: {pro: {charges: [{meter: seats, unit_price: '1'}]}}
    accounts: {acme: {plan: pro, since: 2026-09-01}}
    """
    async with store.transaction() as connection:
        await apply(connection, "default", parse_catalog(plans), datetime.now(timezone.utc))
    held = stream(meter="seats", temporality=Temporality.LEVEL)
    await store.write(Batch(points=[point(held, 10, 10, 7), point(stream(), 0, 1, 5)]))
    token = await made(store, "default")
    of_one = await asking.usage(token, account="acme")
    assert {row.group["meter"]: (row.aggregation, row.quantity) for row in of_one.rows} == {
        "api.requests": ("sum", "5"),
        "seats": ("max", "7"),
    }
    for asked in ({}, {"account": "acme", "group_by": ["day"]}):
        found = await asking.usage(token, **asked)
        assert [row.group["meter"] for row in found.rows] == ["api.requests"]
        [remark] = found.remarks
        assert remark.startswith("left out: seats: ")
        code, why = await refused(asking, token, meter="seats", **asked)
        assert (code, "'seats' is billed by its max" in why) == ("INVALID_ARGUMENT", True)
    assert not (await asking.usage(token, account="globex", group_by=["day"])).remarks
