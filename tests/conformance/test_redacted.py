"""What is redacted stays what it was sent as: a duplicate is one, totals go on, a release has its identity."""

from __future__ import annotations

from decimal import Decimal

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tallymark_collector.metering import Metering, Rules
from tallymark_collector.metering.file import parse_rules
from tallymark_collector.pipeline import Outcome, Pipeline
from tallymark_collector.processors.redaction import Redaction
from tallymark_collector.quarantine import contradictions, items
from tallymark_collector.quarantine.items import Filter, Item
from tallymark_collector.quarantine.mending import Decision
from tallymark_collector.quarantine.settling import Person, Settled, release
from tallymark_collector.store import Store
from tests.support.usage import BASE, SECOND, key_values, number, request, sum_metric

ACCOUNT = "tallymark.account.id"
NOW = BASE + 3000 * SECOND
AHEAD = NOW + 3600 * SECOND
OFF = Redaction(on=False)
RULES = parse_rules("""
meters:
  gateway.calls:
    unit: "{request}"
    sources:
      - {metric: http.server.request.duration, quantity: count, account: http.request.header.x-api-key}
""")


def usage(secret: str, time_ns: int, value: int, temporality: int = 1, **more: object) -> ExportMetricsServiceRequest:
    named: dict[str, object] = {ACCOUNT: "acme", "url.full": f"https://a.example/?sig={secret}", **more}
    return request(sum_metric([number(BASE, time_ns, value, named)], temporality=temporality))


async def send(
    store: Store, *messages: ExportMetricsServiceRequest, now_ns: int = NOW, **how: Redaction
) -> list[Outcome]:
    pipeline = Pipeline(store, now_ns=lambda: now_ns, **how)  # type: ignore[arg-type]
    return [await pipeline.metrics("default", message.SerializeToString()) for message in messages]


async def rows(store: Store, query: str) -> list[tuple[object, ...]]:
    async with store.reading() as connection:
        return await (await connection.execute(query)).fetchall()  # type: ignore[arg-type]


async def open_items(store: Store) -> list[Item]:
    async with store.reading() as connection:
        entries = await items.open_items(connection, Filter("default"), 100)
        return [await items.find(connection, "default", entry.id) for entry in entries]


async def bill(store: Store, what: Item, rules: Rules | None = None, **decided: object) -> Settled:
    return await release(store, what, Decision(**decided), Person("anne"), NOW, rules)  # type: ignore[arg-type]


async def test_streams_that_differ_in_a_secret_are_two_of_one_series(store: Store) -> None:
    both = [usage("one", NOW, 2), usage("two", NOW, 5)]
    await send(store, *both)
    await send(store, *both)
    assert await rows(store, "SELECT count(*), sum(quantity) FROM usage_point") == [(2, 7)]
    [(attributes, streams)] = await rows(
        store,
        "SELECT e.attributes, count(*) FROM usage_series e JOIN usage_stream s USING (account, series) GROUP BY 1",
    )
    assert (attributes, streams) == ({"url.full": "https://a.example/?sig=REDACTED"}, 2)
    assert await rows(store, "SELECT sum(quantity), count(*) FROM usage_hourly") == [(7, 1)]


@pytest.mark.parametrize("first", [OFF, Redaction()])
async def test_turning_it_on_or_off_makes_no_stream_another(store: Store, first: Redaction) -> None:
    """Else every running total would be billed a second time, and what is sent again too."""
    second = Redaction() if first is OFF else OFF
    ended = BASE + 10 * SECOND
    await send(store, usage("s3cr3t", ended, 10, temporality=2), usage("s3cr3t", ended, 3), redaction=first)
    await send(store, usage("s3cr3t", NOW, 14, temporality=2), usage("s3cr3t", ended, 3), redaction=second)
    assert await rows(store, "SELECT sum(quantity) FROM usage_point") == [(14 + 3,)]


async def test_a_contradiction_keeps_no_secret_and_tells_what_it_contradicts(store: Store) -> None:
    await send(store, usage("s3cr3t", NOW, 2), usage("other", NOW, 2))
    for secret in ("s3cr3t", "other"):
        await send(store, usage(secret, NOW, 3), usage(secret, NOW, 3))
    found = await open_items(store)
    assert len(found) == 2, "each secret's stream has its own"
    for item in found:
        assert b"s3cr3t" not in item.payload
        assert b"other" not in item.payload
        async with store.reading() as connection:
            assert [one.quantity for one in await contradictions.stored(connection, item)] == [2]


async def test_what_is_released_as_it_came_is_a_duplicate_when_it_comes_again(store: Store) -> None:
    """Two that differ in nothing but what was redacted are two."""
    sent = [usage("one", AHEAD, 2), usage("two", AHEAD, 5), usage("two", AHEAD, 5)]
    await send(store, *sent)
    found = await open_items(store)
    assert len(found) == 2
    assert not any(secret in item.payload for item in found for secret in (b"sig=one", b"sig=two"))
    for item in found:
        assert (await bill(store, item, force=True)).action.inserted == 1
    await send(store, *sent, now_ns=AHEAD)
    assert await rows(store, "SELECT count(*), sum(quantity) FROM usage_point") == [(2, 7)]
    assert len(await rows(store, "SELECT FROM usage_series")) == 1
    assert await rows(store, "SELECT attributes FROM usage_series") == [
        ({"url.full": "https://a.example/?sig=REDACTED"},)
    ]


async def test_an_item_is_the_same_whether_redacted_or_not(store: Store) -> None:
    nobodys = request(sum_metric([number(BASE, NOW, 4, {"http.request.header.cookie": "s3cr3t", "a": "b"})]))
    await send(store, nobodys, redaction=OFF)
    await send(store, nobodys)
    [item] = await open_items(store)
    assert b"s3cr3t" in item.payload, "what was stored before stays"


@pytest.mark.parametrize("before", [OFF, Redaction()])
async def test_what_is_attributed_is_billed_once_in_each_wrapping(store: Store, before: Redaction) -> None:
    """A running total without an account, then the next, in other decoration: both are one stream of its own, also
    where an earlier version has stored the first as it came."""
    for end, value, pod in ((100, 10, "a"), (200, 17, "b")):
        attributes = {"http.request.header.cookie": "s3cr3t", "a": "b"}
        point = number(BASE, BASE + end * SECOND, value, attributes)
        message = request(sum_metric([point], temporality=2), pod=pod, **{"process.command_line": f"x {pod}"})
        await send(store, message, redaction=before if pod == "a" else Redaction())
    found = await open_items(store)
    assert len(found) == 2
    for item in found:
        await bill(store, item, account="acme")
    assert [b"s3cr3t" in item.payload for item in found].count(True) == (before is OFF)
    assert await rows(store, "SELECT sum(quantity) FROM usage_point") == [(17,)]
    [(attributes, streams)] = await rows(
        store, "SELECT e.attributes, count(*) FROM usage_series e JOIN usage_stream USING (account, series) GROUP BY 1"
    )
    assert (attributes, streams) == ({"http.request.header.cookie": "REDACTED", "a": "b"}, 1)


async def test_a_mark_that_a_client_sends_is_not_believed(store: Store) -> None:
    """It would say which stream a released point belongs to."""
    await send(store, usage("one", NOW, 2))
    [(stream,)] = await rows(store, "SELECT stream FROM usage_stream")
    mark = f"{stream.hex} {stream.hex}"  # type: ignore[attr-defined]
    plain = request(sum_metric([number(BASE, AHEAD, 9, {ACCOUNT: "acme", "tallymark.redacted": mark})]))
    await send(store, plain)
    [item] = await open_items(store)
    await bill(store, item, force=True)
    assert await rows(store, "SELECT count(DISTINCT stream), sum(quantity) FROM usage_point") == [(2, 11)]


def histogram(key: str, end_ns: int, count: int) -> ExportMetricsServiceRequest:
    metric = Metric(name="http.server.request.duration", unit="s")
    metric.histogram.aggregation_temporality = 1
    point = metric.histogram.data_points.add(start_time_unix_nano=BASE, time_unix_nano=end_ns, count=count, sum=1.5)
    point.attributes.extend(key_values({"http.request.header.x-api-key": key, "http.route": "/a"}))
    point.exemplars.add(time_unix_nano=BASE, as_double=1).filtered_attributes.extend(key_values({"note": "exemplar"}))
    return request(metric, scope="gateway")


async def test_an_account_that_stands_in_what_is_redacted_is_still_billed(store: Store) -> None:
    """By a file of meters: its identity, account and meter outlive the secret that named the account."""
    pipeline = Pipeline(store, now_ns=lambda: NOW, metering=Metering(RULES))
    sent = [histogram(key, AHEAD, count) for key, count in (("acme-key", 3), ("globex-key", 4))]
    for message in (*sent, sent[0]):
        await pipeline.metrics("default", message.SerializeToString())
    found = await open_items(store)
    assert sorted(item.account for item in found) == ["acme-key", "globex-key"]
    for item in found:
        assert b"acme-key" not in item.payload
        assert b"globex-key" not in item.payload
        assert b"exemplar" not in item.payload
        assert (await bill(store, item, RULES, force=True)).action.billed_to == item.account
    later = Pipeline(store, now_ns=lambda: AHEAD, metering=Metering(RULES))
    for message in sent:
        await later.metrics("default", message.SerializeToString())
    assert await rows(store, "SELECT account, sum(quantity) FROM usage_point GROUP BY 1 ORDER BY 1") == [
        ("acme-key", Decimal(3)),
        ("globex-key", Decimal(4)),
    ]


async def test_a_refused_span_keeps_what_a_release_reads(store: Store) -> None:
    message = ExportTraceServiceRequest()
    resource = message.resource_spans.add()
    resource.resource.attributes.extend(key_values({"service.name": "shop"}))
    span = resource.scope_spans.add().spans.add(trace_id=b"t" * 16, span_id=b"s" * 8, name="GET /a?token=s3cr3t")
    span.start_time_unix_nano, span.end_time_unix_nano = BASE, NOW
    span.attributes.extend(key_values({"tallymark.meter.calls": 3, "http.request.header.cookie": "s3cr3t", "a": "b"}))
    span.status.message = span.trace_state = "s3cr3t"
    span.links.add(trace_id=b"u" * 16, span_id=b"v" * 8).attributes.extend(key_values({"note": "s3cr3t"}))
    span.events.add(name="exception").attributes.extend(key_values({"exception.message": "s3cr3t"}))
    pipeline = Pipeline(store, now_ns=lambda: NOW)
    for _ in range(2):
        await pipeline.traces("default", message.SerializeToString())
    [item] = await open_items(store)
    assert b"s3cr3t" not in item.payload
    await bill(store, item, account="acme")
    assert await rows(store, "SELECT account, quantity, name, attributes FROM usage_evidence") == [
        ("acme", 3, "GET /a?token=REDACTED", {"http.request.header.cookie": "REDACTED", "a": "b"})
    ]
