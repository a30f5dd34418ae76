"""Usage that a file of meters takes from other people's telemetry, in quarantine: settled with that file, each meter by
itself, and billed once whatever comes again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tallymark_collector.access.quotas import Quotas
from tallymark_collector.access.records import InDatabase
from tallymark_collector.aggregates.audit import audit
from tallymark_collector.metering import Metering, Rules, parse_rules
from tallymark_collector.pipeline import Outcome, Pipeline
from tallymark_collector.quarantine import contradictions, items
from tallymark_collector.quarantine.items import Filter, Item
from tallymark_collector.quarantine.mending import Decision
from tallymark_collector.quarantine.settling import NotSettled, Person, Settled, discard, release, reopen
from tallymark_collector.settings import Limits
from tallymark_collector.store import Store
from tests.support.telemetry import histogram, histogram_point, metrics_of, span, spans_of
from tests.support.usage import BASE, SECOND, key_values, number, request, sum_metric

NOW = BASE + 3000 * SECOND
DAY = 86_400 * SECOND
KONG: dict[str, object] = {"service.name": "kong", "service.instance.id": "one"}
ANNE = Person("anne", "on the phone")
METERS = """
meters:
  requests:
    unit: "{{request}}"
    sources:
      - {{metric: h, quantity: count, account: {account}, dimensions: [route]}}
      - {{span: "*", account: {account}, {spans}}}
  milliseconds:
    unit: ms
    sources:
      - {{metric: h, quantity: sum, factor: 1000, account: {account}}}
      - {{span: "*", quantity: duration, factor: 1000, account: {account}, {spans}}}
  egress:
    unit: MBy
    sources: [{{metric: egress, quantity: value, factor: 1/1000, account: {account}}}]
"""


def meters(account: str = "consumer", spans: str = "spans_are_complete: true") -> Rules:
    return parse_rules(METERS.format(account=account, spans=spans))


RULES = meters()
Message = ExportMetricsServiceRequest | ExportTraceServiceRequest


async def send(
    store: Store,
    *messages: Message,
    rules: Rules = RULES,
    tenant: str = "default",
    now_ns: int = NOW,
    quotas: Quotas | None = None,
) -> list[Outcome]:
    pipeline = Pipeline(store, now_ns=lambda: now_ns, metering=Metering(rules))
    if quotas is not None:
        pipeline.quotas = quotas
    return [
        await (pipeline.metrics if isinstance(one, ExportMetricsServiceRequest) else pipeline.traces)(
            tenant, one.SerializeToString()
        )
        for one in messages
    ]


async def queue(store: Store, tenant: str = "default", **wanted: str) -> list[Item]:
    async with store.reading() as connection:
        found = await items.open_items(connection, Filter(tenant, **wanted), 1000)  # type: ignore[arg-type]
        return [await items.find(connection, tenant, entry.id) for entry in found]


async def of_meter(store: Store, meter: str) -> Item:
    [found] = await queue(store, meter=meter)
    return found


async def bill(store: Store, what: Item, rules: Rules | None = RULES, now_ns: int = NOW, **decided: object) -> Settled:
    return await release(store, what, Decision(**decided), ANNE, now_ns, rules)  # type: ignore[arg-type]


async def billed(store: Store) -> dict[tuple[str, str], Decimal]:
    """What the views say, which is also what the points say."""
    sums = []
    async with store.reading() as connection:
        for query in (
            "SELECT account, meter, sum(quantity) FROM usage_hourly GROUP BY 1, 2",
            "SELECT p.account, s.meter, sum(quantity) FROM usage_point p JOIN usage_series s USING (account, series)"
            " GROUP BY 1, 2",
        ):
            rows = await (await connection.execute(query)).fetchall()
            sums.append({(account, meter): quantity for account, meter, quantity in rows})
    assert sums[0] == sums[1]
    return {key: quantity for key, quantity in sums[0].items() if quantity}


async def clean(store: Store) -> bool:
    async with store.reading() as connection:
        return (await audit(connection)).clean


def one(
    start: int, end: int, count: int, total: float, attributes: Mapping[str, object] | None = None, **more: object
) -> ExportMetricsServiceRequest:
    """A histogram's point, in seconds after BASE; `resource` is what a gateway adds to it."""
    resource = {**KONG, **more.pop("resource", {})}  # type: ignore[dict-item]
    point = histogram_point(BASE + start * SECOND, BASE + end * SECOND, count, total, attributes or {})
    return metrics_of(resource, histogram([point], "h", **more))  # type: ignore[arg-type]


def egress(value: int, attributes: Mapping[str, object] | None = None, end: int = 1) -> ExportMetricsServiceRequest:
    return metrics_of(
        KONG, sum_metric([number(BASE, BASE + end * SECOND, value, attributes or {})], "egress", unit="kBy")
    )


def spans(*numbers: int, attributes: Mapping[str, object] | None = None, **fields: object) -> ExportTraceServiceRequest:
    return spans_of(KONG, [span(n, attributes or {}, **fields) for n in numbers])


async def test_each_meter_of_a_point_is_settled_by_itself_and_once(store: Store) -> None:
    sent = one(0, 1, 3, 1.5, {"route": "/a"})
    [outcome] = await send(store, sent)
    assert outcome.rejected == 1, "one point, though two meters miss its account"
    requests, milliseconds = await of_meter(store, "requests"), await of_meter(store, "milliseconds")
    assert (requests.reason, requests.metered, requests.payload) == ("account_missing", True, milliseconds.payload)
    settled = await bill(store, requests, account="acme")
    assert (settled.action.action, settled.action.billed_to, settled.action.quantity) == ("attributed", "acme", 3)
    assert settled.action.changed == {"tallymark.account.id": [None, "acme"]}
    assert await billed(store) == {("acme", "requests"): 3}
    assert not (await bill(store, requests, account="globex")).done_now
    assert [item.meter for item in await queue(store)] == ["milliseconds"]
    # What the other meter makes of it is another decision.
    await bill(store, milliseconds, account="globex")
    for _ in range(2):
        await send(store, sent)
    assert await queue(store) == []
    assert await billed(store) == {("acme", "requests"): 3, ("globex", "milliseconds"): 1500}
    assert await clean(store)


async def test_another_wrapping_is_the_same_usage(store: Store) -> None:
    await send(store, one(0, 1, 3, 1.5))
    await bill(store, await of_meter(store, "requests"), account="acme")
    await send(store, one(0, 1, 3, 1.5, resource={"k8s.pod.name": "kong-1"}))
    again = await of_meter(store, "requests")
    with pytest.raises(NotSettled, match="the same point was billed as something else before, to account 'acme'"):
        await bill(store, again, account="globex")
    settled = await bill(store, again, account="acme")
    assert (settled.action.inserted, settled.action.duplicates) == (0, 1)
    assert await billed(store) == {("acme", "requests"): 3}


async def test_nothing_is_billed_without_the_file_that_made_it_usage(store: Store) -> None:
    """Without it a counter would be a meter under its own name, a histogram nothing."""
    await send(store, egress(2500), one(0, 1, 3, 1.5))
    found = await queue(store)
    assert sorted(item.meter for item in found) == ["egress", "milliseconds", "requests"]
    # One that has no such meter; one that has it, of another metric; one whose conditions do not hold.
    forgotten = [
        "jobs: {unit: '1', sources: [{metric: jobs, quantity: value, account: x}]}",
        "NAME: {unit: '1', sources: [{metric: jobs, quantity: value, account: x}]}",
        "NAME: {unit: '1', sources: [{metric: '*', quantity: QUANTITY, factor: 1, where: {a: b}, account: x}]}",
    ]
    for item in found:
        with pytest.raises(
            NotSettled, match=r"a file of meters made it usage of meter '\w+': give that file, --meters"
        ):
            await bill(store, item, None, account="acme")
        for text in forgotten:
            quantity = {"egress": "value", "requests": "count", "milliseconds": "sum"}[item.meter]
            rules = parse_rules("meters:\n  " + text.replace("NAME", item.meter).replace("QUANTITY", quantity))
            for decided in ({}, {"account": "acme"}):
                with pytest.raises(NotSettled, match=r"has no meter|is no usage of meter"):
                    await bill(store, item, rules, **decided)
    assert (await billed(store), len(await queue(store))) == ({}, 3)
    for item in found:
        await bill(store, item, account="acme")
    expected = {"egress": Decimal("2.5"), "requests": 3, "milliseconds": 1500}
    assert await billed(store) == {("acme", meter): quantity for meter, quantity in expected.items()}


async def test_running_totals_become_the_increases_of_one_account(store: Store) -> None:
    totals = [one(0, at, count, count / 2, temporality=2) for at, count in [(1, 4), (3, 9), (2, 6)]]
    await send(store, *totals)
    found = await queue(store, meter="requests")
    await bill(store, found[0], account="acme")
    with pytest.raises(NotSettled, match="totals of the same stream were billed as something else before"):
        await bill(store, found[1], account="globex")
    for other in found[1:]:
        await bill(store, other, account="acme")
    await send(store, *totals)
    # The other meter's totals are still there to be given to whoever it is.
    assert [item.meter for item in await queue(store)] == ["milliseconds"] * 3
    for other in await queue(store):
        await bill(store, other, account="globex")
    assert await billed(store) == {("acme", "requests"): 9, ("globex", "milliseconds"): 4500}
    assert await clean(store)


async def test_another_value_is_a_decision(store: Store) -> None:
    await send(store, one(0, 1, 5, 1.0), one(0, 1, 6, 1.0))
    five, six = await queue(store, meter="requests")
    await bill(store, five, account="acme")
    with pytest.raises(NotSettled, match=r"stored before for the same stream.*--additional"):
        await bill(store, six, account="acme")
    await bill(store, six, account="acme", additional=True)
    assert await billed(store) == {("acme", "requests"): 11}


async def test_spans_are_billed_by_their_identifiers(store: Store) -> None:
    nobody = spans(1, 2)
    await send(store, nobody)
    assert len(await queue(store)) == 4
    for item in await queue(store, meter="requests"):
        settled = await bill(store, item, account="acme")
        assert (settled.action.inserted, settled.action.evidence, settled.action.quantity) == (1, 1, 1)
    assert await billed(store) == {("acme", "requests"): 2}
    # The same spans, whose gateway says by now whose they are.
    named = spans(1, 2, attributes={"consumer": "acme"})
    [outcome] = await send(store, named)
    assert outcome.rejected == 0
    assert await billed(store) == {("acme", "requests"): 2, ("acme", "milliseconds"): 2000}
    for item in await queue(store, meter="milliseconds"):
        settled = await bill(store, item, account="acme")
        assert (settled.action.inserted, settled.action.duplicates) == (0, 1)
    # Decorated, or read with more attributes: still the same span.
    other = spans_of({**KONG, "k8s.pod.name": "x"}, [span(1, {"note": "again"})])
    await send(store, other)
    with pytest.raises(NotSettled, match="the same point was billed as something else before, to account 'acme'"):
        await bill(store, await of_meter(store, "requests"), account="globex")
    assert await billed(store) == {("acme", "requests"): 2, ("acme", "milliseconds"): 2000}
    assert await clean(store)


async def test_what_the_file_names_by_now_is_released_and_never_attributed(store: Store) -> None:
    await send(store, one(0, 1, 3, 1.5, {"caller": "acme"}), spans(1, attributes={"caller": "acme"}))
    better = meters(account="[consumer, caller]")
    for item in await queue(store):
        with pytest.raises(NotSettled, match=r"account_missing: .*quarantine attribute \w+ --account ACCOUNT"):
            await bill(store, item)
        with pytest.raises(NotSettled, match="it names account 'acme' itself"):
            await bill(store, item, better, account="globex")
        settled = await bill(store, item, better)
        assert (settled.action.action, settled.action.billed_to) == ("released", "acme")
    expected = {("acme", "requests"): 4, ("acme", "milliseconds"): 2500}
    assert await billed(store) == expected
    # `serve` started anew with that file, and the client sends once more.
    await send(store, one(0, 1, 3, 1.5, {"caller": "acme"}), spans(1, attributes={"caller": "acme"}), rules=better)
    assert await billed(store) == expected


async def test_usage_that_names_its_account_is_not_given_to_another(store: Store) -> None:
    await send(store, one(-400 * 86_400 - 4000, -400 * 86_400 - 3999, 3, 1.5, {"consumer": "acme"}))
    for item in await queue(store):
        assert (item.reason, item.account) == ("time_too_old", "acme")
        with pytest.raises(NotSettled, match="it names account 'acme' itself"):
            await bill(store, item, account="globex")
        await bill(store, item)
    assert await billed(store) == {("acme", "requests"): 3, ("acme", "milliseconds"): 1500}


async def test_a_sampled_span_is_billed_once_the_file_allows_it(store: Store) -> None:
    sampled = spans(1, attributes={"consumer": "acme"}, trace_state="ot=th:8")
    await send(store, sampled)
    allowing = meters(spans="sampled: allow")
    found = await queue(store)
    assert {item.reason for item in found} == {"span_sampled"}
    for item in found:
        with pytest.raises(NotSettled, match=r"stays in quarantine: span_sampled: .*sampled: allow"):
            await bill(store, item)
        await bill(store, item, allowing)
    await send(store, sampled, rules=allowing)
    await send(store, sampled)
    assert (await billed(store), await queue(store)) == ({("acme", "requests"): 1, ("acme", "milliseconds"): 1000}, [])


async def test_a_unit_that_the_file_did_not_know(store: Store) -> None:
    metric = sum_metric([number(BASE, BASE + SECOND, 7, {"consumer": "acme"})], "egress", unit="kBy")
    other = "meters: {egress: {unit: MBy, sources: [{metric: egress, quantity: value, account: consumer}]}}"
    await send(store, metrics_of(KONG, metric), rules=parse_rules(other))
    item = await of_meter(store, "egress")
    assert item.reason == "meter_invalid"
    with pytest.raises(NotSettled, match="--meter-name changes nothing about why it is here"):
        await bill(store, item, meter="other")
    with pytest.raises(NotSettled, match=r"stays in quarantine: meter_invalid: .*say by which `factor`"):
        await bill(store, item, parse_rules(other))
    await bill(store, item)
    await send(store, metrics_of(KONG, metric))
    assert await billed(store) == {("acme", "egress"): Decimal("0.007")}


async def test_overflow_and_names_that_are_none_need_a_person(store: Store) -> None:
    await send(
        store,
        one(0, 1, 3, 1.5, {"otel.metric.overflow": True}),
        one(0, 1, 4, 1.5, {"consumer": True}),
        one(0, 1, 5, 1.5),
    )
    overflow, wrong, nobody = await queue(store, meter="requests")
    assert [item.reason for item in (overflow, wrong, nobody)] == [
        "attribute_overflow",
        "attributes_invalid",
        "account_missing",
    ]
    with pytest.raises(NotSettled, match="needs a decision: --account"):
        await bill(store, overflow)
    with pytest.raises(NotSettled, match="attributes_invalid: meter requests: consumer must be a string"):
        await bill(store, wrong, account="acme")
    settled = await bill(store, wrong, account="acme", drop=("consumer",))
    assert settled.action.changed["consumer"] == ["bool_value: true", None]
    # Less their attributes all three are one stream's one interval: they are told apart by what was sent.
    await bill(store, overflow, account="acme")
    await bill(store, nobody, account="acme")
    assert await billed(store) == {("acme", "requests"): 12}


async def test_the_name_of_an_account_is_not_left_out_to_give_its_usage_to_another(store: Store) -> None:
    """What else is wrong hides whose it is from the list, not from the one who looks."""
    attributes = {"consumer": "acme", "route": "\0"}
    await send(store, one(0, 1, 3, 1.5, attributes), spans(1, attributes={"consumer": "acme"}, trace_id=b"short"))
    found = await queue(store, meter="requests")
    assert [(item.reason, item.account) for item in found] == [("attributes_invalid", "")] * 2
    for item in found:
        with pytest.raises(NotSettled, match="it names account 'acme' itself"):
            await bill(store, item, account="globex", drop=("consumer", "route"))
        if item.signal == "traces":
            with pytest.raises(NotSettled, match="attributes_invalid: meter requests: trace_id has 16 bytes"):
                await bill(store, item, drop=("route",))
        else:
            settled = await bill(store, item, drop=("route",))
            assert (settled.action.billed_to, settled.action.changed) == (
                "acme",
                {"route": ["\N{REPLACEMENT CHARACTER}", None]},
            )
    # The other meter, which keeps no route, had nothing to refuse.
    assert await billed(store) == {("acme", "requests"): 3, ("acme", "milliseconds"): 1500}


async def test_times_that_were_refused(store: Store) -> None:
    ahead = one(90_000, 90_001, 3, 1.5, {"consumer": "acme"})
    reversed_ = [one(5, 1, 4, 1.5, {"consumer": "acme"}), one(6, 1, 4, 1.5, {"consumer": "acme"})]
    backwards = spans(1, start_time_unix_nano=BASE + 9 * SECOND)
    await send(store, ahead, *reversed_, backwards)
    found = await queue(store, meter="requests")
    assert sorted(item.reason for item in found) == ["time_ahead"] + ["time_reversed"] * 3
    for item in found:
        if item.reason == "time_ahead":
            with pytest.raises(NotSettled, match=r"time_ahead: .*\(or --force\)"):
                await bill(store, item)
            await bill(store, item, force=True)
        elif item.signal == "traces":
            with pytest.raises(NotSettled, match="stays in quarantine: account_missing"):
                await bill(store, item)
            await bill(store, item, account="acme")
        else:
            await bill(store, item)
    await send(store, ahead, *reversed_, backwards)
    await send(store, ahead, now_ns=BASE + 90_002 * SECOND)
    assert (await billed(store))["acme", "requests"] == 3 + 4 + 4 + 1
    [backward] = [item for item in await queue(store, meter="milliseconds") if item.signal == "traces"]
    with pytest.raises(NotSettled, match="nobody knows how much it is"):
        await bill(store, backward, account="acme")


async def test_discarding_needs_no_file(store: Store) -> None:
    await send(store, egress(7))
    item = await of_meter(store, "egress")
    await discard(store, item, Person("anne", "a test"))
    await send(store, egress(7))
    assert (await queue(store), await billed(store)) == ([], {})
    await reopen(store, item, ANNE)
    await bill(store, item, account="acme")
    assert await billed(store) == {("acme", "egress"): Decimal("0.007")}


async def test_one_tenant_s_items_are_not_another_s(store: Store) -> None:
    await send(store, egress(7), tenant="one")
    await send(store, egress(7), tenant="two")
    [first], [second] = await queue(store, "one"), await queue(store, "two")
    assert first.id != second.id
    async with store.reading() as connection:
        with pytest.raises(items.UserError, match="no item of tenant 'two'"):
            await items.find(connection, "two", first.id)
        assert second.id not in await items.open_ids(connection, Filter("one"))
    # Different accounts: what one tenant decides binds no other.
    await bill(store, first, account="acme")
    await bill(store, second, account="globex")
    async with store.reading() as connection:
        rows = await (
            await connection.execute("SELECT tenant, account, sum(quantity) FROM usage_hourly GROUP BY 1, 2 ORDER BY 1")
        ).fetchall()
    assert rows == [("one", "acme", Decimal("0.007")), ("two", "globex", Decimal("0.007"))]


async def test_what_it_contradicts_is_found_with_the_file(store: Store) -> None:
    acme = {"consumer": "acme"}
    await send(store, one(0, 1, 5, 1.0, acme), one(0, 1, 6, 1.0, acme))
    item = await of_meter(store, "requests")
    assert (item.reason, item.account, item.metered) == ("value_conflict", "acme", True)
    async with store.reading() as connection:
        [stored] = await contradictions.stored(connection, item, RULES)
        assert (stored.what, stored.quantity) == ("the same stream and interval", 5)
        assert await contradictions.stored(connection, item) == []
    await bill(store, item, additional=True)
    assert await billed(store) == {("acme", "requests"): 11, ("acme", "milliseconds"): 1000}


async def test_a_span_that_contradicts_one_is_one_item_of_a_meter(store: Store) -> None:
    """Not another one for what it shows: it is the span itself that is billed."""
    acme = {"consumer": "acme"}
    again = spans(1, attributes=acme, start_time_unix_nano=BASE + SECOND // 2)
    first, second = await send(store, spans(1, attributes=acme), again)
    assert (first.rejected, second.rejected) == (0, 1)
    [item] = await queue(store)
    assert (item.reason, item.meter, item.metered) == ("value_conflict", "milliseconds", True)
    assert (await send(store, again))[0].rejected == 1
    assert [one.id for one in await queue(store)] == [item.id]
    assert await billed(store) == {("acme", "requests"): 1, ("acme", "milliseconds"): 1000}


def limited(store: Store, streams: float) -> Quotas:
    return Quotas(InDatabase(store), Limits(new_streams_per_hour=streams))


async def test_streams_over_the_limit_of_a_tenant_are_released_and_then_known(store: Store) -> None:
    """Points of the SDK, a histogram's for two meters, and spans that end at one nanosecond."""
    acme = {"consumer": "acme"}
    sdk = request(
        sum_metric([number(BASE, BASE + SECOND, 2**n, {"tallymark.account.id": "acme", "n": n}) for n in range(3)])
    )
    messages: list[Message] = [sdk, one(0, 1, 3, 1.5, acme), spans(1, 2, attributes=acme)]
    full = limited(store, 1)
    outcomes = await send(store, *messages, quotas=full)
    assert [outcome.rejected for outcome in outcomes] == [2, 2, 4]
    assert all("streams_limited" in outcome.message for outcome in outcomes)
    assert await billed(store) == {("acme", "api.requests"): 1}
    found = await queue(store)
    assert {item.reason for item in found} == {"streams_limited"}
    assert sorted(item.meter for item in found) == ["api.requests"] * 2 + ["milliseconds"] * 3 + ["requests"] * 3
    for item in found:
        if item.metered:
            with pytest.raises(NotSettled, match="give that file, --meters"):
                await bill(store, item, None)
        settled = await bill(store, item)
        assert (settled.action.action, settled.action.inserted) == ("released", 1)
    expected = {("acme", "api.requests"): 7, ("acme", "requests"): 5, ("acme", "milliseconds"): 3500}
    assert await billed(store) == expected
    # Their streams are known from now on, so the limit lets them pass: as duplicates.
    assert [outcome.rejected for outcome in await send(store, *messages, quotas=full)] == [0, 0, 0]
    assert (await queue(store), await billed(store)) == ([], expected)
    assert await clean(store)


async def test_a_limited_running_total_is_released_after_its_successor(store: Store) -> None:
    first, second = (one(0, at, count, 1.0, {"consumer": "acme"}, temporality=2) for at, count in [(1, 4), (2, 9)])
    await send(store, first, quotas=limited(store, 1))
    [over] = await queue(store)
    await send(store, second)
    await bill(store, over)
    for _ in range(2):
        await send(store, first, second)
    assert await billed(store) == {("acme", "requests"): 9, ("acme", "milliseconds"): 1000}


def metric(points: Iterable[object]) -> Metric:
    """A type that no meter can read: kept whole, with all of its points."""
    found = Metric(name="h")
    for value in points:
        found.gauge.data_points.add(time_unix_nano=BASE, as_int=value, attributes=key_values({}))  # type: ignore[arg-type]
    return found


async def test_a_metric_of_another_type_is_never_billed(store: Store) -> None:
    await send(store, metrics_of(KONG, metric([1, 2])))
    item = await of_meter(store, "requests")
    assert (item.reason, item.metered) == ("type_unsupported", True)
    with pytest.raises(NotSettled, match="cannot be released: it is a level where an increase is billed"):
        await bill(store, item)
