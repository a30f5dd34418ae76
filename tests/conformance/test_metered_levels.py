"""Levels that a file of meters takes from gauges and UpDownCounters: what `test_random_metered_levels` does at random,
case by case, and what becomes of those that nobody is named for."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tallymark_collector.billing.aggregated import aggregated
from tallymark_collector.billing.plans import Aggregation
from tallymark_collector.metering import Rules, parse_rules
from tallymark_collector.quarantine import contradictions
from tallymark_collector.quarantine.settling import NotSettled
from tallymark_collector.store import Store
from tests.conformance.test_quarantine_metered import bill, limited, queue, send
from tests.support.telemetry import metrics_of
from tests.support.usage import BASE, SECOND, number, sum_metric

KINDS = pytest.mark.parametrize("kind", ["gauge", "updowncounter"])
START = datetime.fromtimestamp(BASE // SECOND, timezone.utc)
MINUTE = 60
SECRET = {"http.request.header.cookie": "s3cr3t"}
SAID = pytest.mark.parametrize("more", [{}, SECRET], ids=["plain", "secret"])


def rules(account: str = "org", fields: str = "") -> Rules:
    source = f"{{metric: seats, quantity: value, account: {account}{fields}}}"
    return parse_rules(f"meters: {{m: {{unit: '{{seat}}', aggregation: level, sources: [{source}]}}}}")


NAMED = rules()
MOVED = rules("{attribute: org, map: {acme: globex, globex: initech}}")
NOBODY = rules("nowhere")


def told(
    kind: str, at: int, value: float, attributes: dict[str, object] | None = None, start: int | None = None, **more: Any
) -> ExportMetricsServiceRequest:
    """One level, in seconds after BASE."""
    start_ns = 0 if start is None else BASE + start * SECOND
    point = number(start_ns, BASE + at * SECOND, value, {"org": "acme"} if attributes is None else attributes)
    if kind == "updowncounter":
        metric = sum_metric([point], "seats", "{seat}", temporality=2, monotonic=False)
    else:
        metric = Metric(name="seats", unit="{seat}")
        metric.gauge.data_points.append(point)
    return metrics_of({"service.name": "portal", "service.instance.id": "one", **more}, metric)


async def rows(store: Store) -> list[tuple[str, int, Decimal]]:
    """(account, seconds after BASE, value) as the view shows them."""
    async with store.reading() as connection:
        found = await (
            await connection.execute("SELECT account, time, value FROM usage_levels ORDER BY time, account, value")
        ).fetchall()
        [[summed]] = await (await connection.execute("SELECT count(*) FROM usage_point")).fetchall()
    assert summed == 0, "levels are in no sum"
    return [(account, (time - START) // timedelta(seconds=1), value) for account, time, value in found]


async def quantities(store: Store, how: str = "integral", end: int = 3600, **more: Any) -> dict[str, Decimal | None]:
    """By account, of the first `end` seconds after BASE; levels hold for half an hour."""
    declared = {"m": Aggregation(aggregation=how, stale_after=1800, **more)}  # type: ignore[arg-type]
    async with store.reading() as connection:
        found = await aggregated(connection, "default", None, START, START + timedelta(seconds=end), declared)
    return {each.account: each.quantity for each in found}


@KINDS
async def test_pods_of_one_series_are_summed_and_do_not_overwrite_one_another(store: Store, kind: str) -> None:
    """The file drops what tells them apart."""
    for pod, value in (("p1", 6), ("p2", 4), ("p3", 2)):
        await send(store, told(kind, 0, value, {"org": "acme", "pod": pod}), rules=NAMED)
    await send(store, told(kind, 600, 10, {"org": "acme", "pod": "p1"}), rules=NAMED)
    assert await quantities(store, "max") == {"acme": 16}
    # 12 for ten minutes, 16 for twenty, until the two that say no more are stale; 10 for ten more.
    minutes = 12 * 10 + 16 * 20 + 10 * 10
    found = (await quantities(store))["acme"]
    assert found is not None
    assert round(found * 60, 9) == minutes
    # Where all tell of the same, the file's series is one.
    assert await quantities(store, "latest", across="latest") == {"acme": 10}


@KINDS
async def test_from_the_first_level_under_another_file_on_it_is_the_new_accounts(store: Store, kind: str) -> None:
    first, second = told(kind, 0, 6), told(kind, 15 * MINUTE, 6)
    await send(store, first, rules=NAMED)
    await send(store, second, rules=MOVED)
    expected = [("acme", 0, 6), ("acme", 15 * MINUTE, 0), ("globex", 15 * MINUTE, 6)]
    assert await rows(store) == expected
    assert await quantities(store) == {"acme": Decimal("1.5"), "globex": 3}
    assert await quantities(store, "latest") == {"acme": 0, "globex": 6}
    assert await quantities(store, "max") == {"acme": 6, "globex": 6}
    # Sent again, by whichever collector and beside others, they change nothing.
    for file in (NAMED, MOVED, rules("{attribute: org, map: {acme: initech}}", ", factor: 10")):
        both = ExportMetricsServiceRequest.FromString(second.SerializeToString() + first.SerializeToString())
        assert [outcome.rejected for outcome in await send(store, both, first, second, rules=file)] == [0, 0, 0]
    assert await rows(store) == expected
    # Late, from before the change: as that time was. The file of now says otherwise.
    await send(store, told(kind, 5 * MINUTE, 12), told(kind, -5 * MINUTE, 1), rules=MOVED)
    assert await rows(store) == sorted(
        [*expected, ("acme", 5 * MINUTE, 12), ("acme", -5 * MINUTE, 1)], key=lambda row: (row[1], row[0], row[2])
    )
    assert await quantities(store) == {"acme": Decimal("2.5"), "globex": 3}
    # And back.
    await send(store, told(kind, 20 * MINUTE, 3), rules=NAMED)
    assert await quantities(store) == {"acme": 4, "globex": Decimal("0.5")}
    # The same time with another value is an answer too many, whoever it would be billed to.
    [outcome] = await send(store, told(kind, 15 * MINUTE, 7), rules=NAMED)
    assert "the level at this time was 6 before and is 7 now" in outcome.message
    [item] = await queue(store)
    with pytest.raises(NotSettled, match="a stream stands at one level at a time"):
        await bill(store, item, NAMED)
    async with store.reading() as connection:
        [there] = await contradictions.stored(connection, item, NAMED)
    assert (there.what, there.quantity) == ("the same stream and time, billed to account globex", 6)


@KINDS
async def test_another_factor_counts_from_the_next_level_on(store: Store, kind: str) -> None:
    by_ten = rules(fields=", factor: 10")
    await send(store, told(kind, 0, 0.25), rules=NAMED)
    await send(store, told(kind, 10 * MINUTE, 0.25), told(kind, 0, 0.25), told(kind, 5 * MINUTE, 0.5), rules=by_ten)
    assert await rows(store) == [
        ("acme", 0, Decimal("0.25")),
        ("acme", 5 * MINUTE, Decimal("0.5")),
        ("acme", 10 * MINUTE, Decimal("2.5")),
    ]
    assert await queue(store) == []


@KINDS
async def test_other_dimensions_end_the_series_of_before(store: Store, kind: str) -> None:
    """Also where the streams of a series are told to be one."""
    attributes: dict[str, object] = {"org": "acme", "region": "eu"}
    await send(store, told(kind, 0, 6, attributes), rules=rules(fields=", dimensions: [region]"))
    await send(store, told(kind, 15 * MINUTE, 6, attributes), rules=NAMED)
    for across in ("sum", "latest"):
        assert await quantities(store, across=across) == {"acme": Decimal("4.5")}, across
        assert await quantities(store, "max", across=across) == {"acme": 6}
        assert await quantities(store, "latest", across=across) == {"acme": 6}


@KINDS
async def test_an_account_that_the_resource_names_takes_its_level_with_it(store: Store, kind: str) -> None:
    """Without a change of the file: a pool's seat that another customer has by now."""
    file = rules("{resource: customer}")
    for minute, customer in ((0, "acme"), (10, "globex"), (20, "acme")):
        await send(store, told(kind, minute * MINUTE, 6, {}, customer=customer), rules=file)
    assert await quantities(store, end=1800) == {"acme": 2, "globex": 1}


@KINDS
@SAID
async def test_a_level_of_nobody_is_attributed_where_it_belongs_in_time(
    store: Store, kind: str, more: dict[str, object]
) -> None:
    first, second, third = (told(kind, minute * MINUTE, 6, {"org": "acme", **more}) for minute in (0, 10, 20))
    await send(store, second, rules=NOBODY)
    await send(store, first, third, rules=NAMED)
    assert await quantities(store, end=1800) == {"acme": 3}
    [item] = await queue(store)
    assert (item.reason, item.metered, b"s3cr3t" in item.payload) == ("account_missing", True, False)
    with pytest.raises(NotSettled, match="only an increase can be additional"):
        await bill(store, item, NOBODY, account="globex", additional=True)
    with pytest.raises(NotSettled, match="give that file, --meters"):
        await bill(store, item, None, account="globex")
    settled = await bill(store, item, NOBODY, account="globex")
    assert (settled.action.billed_to, settled.action.inserted) == ("globex", 1)
    assert await quantities(store, end=1800) == {"acme": 2, "globex": 1}
    # The client's retry, and a gateway's other batch, are there.
    for file in (NAMED, MOVED):
        [outcome] = await send(store, second, rules=file)
        assert outcome.rejected == 0
    assert await quantities(store, end=1800) == {"acme": 2, "globex": 1}
    async with store.reading() as connection:
        stored = "SELECT attributes::text, resource::text FROM usage_series, usage_stream"
        text = await (await connection.execute(stored)).fetchall()
    assert "s3cr3t" not in str(text)


@KINDS
@SAID
async def test_a_level_that_came_again_and_was_billed_is_not_somebody_elses(
    store: Store, kind: str, more: dict[str, object]
) -> None:
    one = told(kind, 0, 6, {"org": "acme", **more})
    await send(store, one, rules=NOBODY)
    await send(store, one, rules=NAMED)
    [item] = await queue(store)
    with pytest.raises(NotSettled, match="the same level came again and was billed to account 'acme'"):
        await bill(store, item, NOBODY, account="globex")
    assert (await bill(store, item, NOBODY, account="acme")).action.duplicates == 1
    assert await rows(store) == [("acme", 0, 6)]


@KINDS
@SAID
async def test_what_the_file_names_by_now_is_released(store: Store, kind: str, more: dict[str, object]) -> None:
    first, second = (told(kind, minute * MINUTE, 6, {"org": "acme", **more}) for minute in (0, 10))
    await send(store, first, rules=NOBODY)
    await send(store, second, rules=NAMED)
    [item] = await queue(store)
    with pytest.raises(NotSettled, match="names account 'acme' itself"):
        await bill(store, item, NAMED, account="globex")
    assert (await bill(store, item, NAMED)).action.billed_to == "acme"
    await send(store, first, second, rules=NAMED)
    assert [row for row in await rows(store) if row[2]] == [("acme", 0, 6), ("acme", 10 * MINUTE, 6)]
    # What is left of a redacted level tells another stream, of the same source: they are not summed.
    assert await quantities(store, "max") == {"acme": 6}
    assert await quantities(store, end=1200) == {"acme": 2}


@KINDS
async def test_a_start_means_nothing_to_a_level(store: Store, kind: str) -> None:
    """Released, it is of the stream that it came in, and not a second one beside it."""
    reversed_ = told(kind, 0, 6, start=10)
    await send(store, reversed_, rules=NAMED)
    [item] = await queue(store)
    assert item.reason == "time_reversed"
    assert (await bill(store, item, NAMED)).action.inserted == 1
    await send(store, told(kind, 10 * MINUTE, 3), told(kind, 0, 6), rules=NAMED)
    assert await rows(store) == [("acme", 0, 6), ("acme", 10 * MINUTE, 3)]
    assert await quantities(store, end=1200) == {"acme": Decimal("1.5")}


@KINDS
async def test_levels_without_what_could_not_be_kept_are_one_accounts_at_a_time(store: Store, kind: str) -> None:
    bad: dict[str, object] = {"org": "acme", "note": "\0"}
    file = rules(fields=", dimensions: [note]")
    await send(store, told(kind, 0, 6, bad), told(kind, 10 * MINUTE, 6, bad), rules=file)
    first, second = sorted(await queue(store), key=lambda item: str(item.time))
    assert {first.reason, second.reason} == {"attributes_invalid"}
    await bill(store, first, file, drop=("note",))
    moved = rules("{attribute: org, map: {acme: globex}}", ", dimensions: [note]")
    await bill(store, second, moved, drop=("note",))
    assert await quantities(store, end=1200) == {"acme": 1, "globex": 1}


@KINDS
async def test_a_stream_beyond_the_limit_is_released_where_it_belongs(store: Store, kind: str) -> None:
    first, second = told(kind, 0, 6), told(kind, 10 * MINUTE, 4)
    assert [one.rejected for one in await send(store, first, rules=NAMED, quotas=limited(store, 0))] == [1]
    await send(store, second, rules=MOVED)
    [item] = await queue(store)
    assert (item.reason, item.account) == ("streams_limited", "acme")
    assert (await bill(store, item, NAMED)).action.billed_to == "acme"
    assert await rows(store) == [("acme", 0, 6), ("acme", 10 * MINUTE, 0), ("globex", 10 * MINUTE, 4)]


@KINDS
async def test_before_since_nothing_is_anybodys(store: Store, kind: str) -> None:
    since = (START + timedelta(minutes=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    file = rules(fields=f", since: '{since}'")
    for minute in (0, 5, 10):
        [outcome] = await send(store, told(kind, minute * MINUTE, 6), rules=file)
        assert outcome.rejected == 0
    assert await rows(store) == [("acme", 10 * MINUTE, 6)]


@KINDS
async def test_two_levels_of_a_microsecond_are_one_accounts(store: Store, kind: str, dsn: str) -> None:
    """A database tells no times apart that are closer: the later of the two holds."""
    for nanoseconds, file in ((0, NAMED), (300, MOVED), (1000, MOVED)):
        message = told(kind, 0, 6 + nanoseconds / 100)
        for metric in message.resource_metrics[0].scope_metrics[0].metrics:
            (metric.sum if kind == "updowncounter" else metric.gauge).data_points[0].time_unix_nano += nanoseconds
        await send(store, message, rules=file)
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        found = connection.execute("SELECT account, part, value FROM usage_level ORDER BY time, part").fetchall()
    assert found == [("acme", 0, 6), ("acme", 300, 9), ("acme", -1, 0), ("globex", 0, 16)]


async def test_old_items_of_a_type_that_nobody_could_read_are_told_what_to_do(store: Store) -> None:
    increases = parse_rules("meters: {m: {unit: '{seat}', sources: [{metric: seats, quantity: value, account: org}]}}")
    [outcome] = await send(store, told("gauge", 0, 6), rules=increases)
    assert "it is a gauge: what it stands at is no amount; say `aggregation: level`" in outcome.message
    [item] = await queue(store)
    with pytest.raises(NotSettled, match="cannot be released"):
        await bill(store, item, NAMED)
