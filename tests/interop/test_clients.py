"""OpenTelemetry's clients, straight to the collector: what they recorded is stored, to the unit."""

from __future__ import annotations

import time
from collections import Counter
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import pytest

from tests.interop.audited import NOTHING, audited, overlapping
from tests.interop.clients import PROTOCOLS, Order
from tests.interop.conftest import PAIRS, Start, own_collector, port_of, relay
from tests.interop.fates import Scripted
from tests.interop.ledger import Quantities
from tests.interop.plans import rounds
from tests.interop.stored import difference, quarantined, stored, views
from tests.support.collector import Collector

PROCESSES = 2
MANY = 2500
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@pytest.mark.parametrize("temporality", ["delta", "cumulative"])
@pytest.mark.parametrize(("client", "protocol"), PAIRS)
def test_recorded_is_stored(
    client: str, protocol: str, temporality: str, collector: Collector, start: Start, prefix: str
) -> None:
    """Several processes at once, then each once more under its name, with sums that begin anew. The second ones send
    compressed."""
    recorded: Quantities = {}
    for life, compression in enumerate(("none", "gzip")):
        orders = [
            Order(
                protocol=protocol,
                temporality=temporality,
                port=port_of(collector, protocol),
                rounds=rounds(10 * life + process, f"{prefix}-{process}", 4),
                instance=f"{prefix}-{process}",
                compression=compression,
                spans=True,
            )
            for process in range(PROCESSES)
        ]
        for each in [start(client, order) for order in orders]:
            for entry, quantity in each.recorded().items():
                recorded[entry] = recorded.get(entry, Decimal(0)) + quantity
    assert {entry[0] for entry in recorded} == {"interop.requests", "interop.volume", "span:interop.requests"}
    found = stored(collector.dsn, prefix)
    assert difference(recorded, found) == {}
    billed = {entry: quantity for entry, quantity in found.items() if not entry[0].startswith("span:")}
    assert difference(billed, views(collector.dsn, prefix)) == {}
    assert audited(collector.dsn, prefix) == NOTHING


@pytest.mark.parametrize("client", PROTOCOLS)
def test_more_accounts_than_clients_keep_by_default(
    client: str, collector: Collector, start: Start, prefix: str
) -> None:
    """With its limit raised, as docs/clients.md shows, every account arrives under its name."""
    plan = [
        [
            {"account": f"{prefix}-{number}", "route": "/", "calls": 1, "volume_thousandths": 100}
            for number in range(MANY)
        ]
    ]
    order = Order("grpc", "delta", collector.port, plan, instance=prefix, cardinality=MANY + 100)
    recorded = start(client, order).recorded()
    assert difference(recorded, stored(collector.dsn, prefix)) == {}
    assert audited(collector.dsn, prefix) == NOTHING


@pytest.mark.parametrize("client", PROTOCOLS)
def test_connections_that_the_collector_ends(client: str, embedded_server: str, start: Start, prefix: str) -> None:
    """It ends connections of some age, so that clients behind a balancer move on. No client loses a request by that,
    not even one that sends nothing again."""
    with own_collector(embedded_server, "--max-connection-age", "1") as short:
        order = Order("grpc", "delta", short.port, rounds(6, prefix, 12), instance=prefix, pause_ms=400)
        recorded = start(client, order).recorded()
        assert difference(recorded, stored(short.dsn, prefix)) == {}
        assert audited(short.dsn, prefix) == NOTHING


@pytest.mark.parametrize("protocol", PROTOCOLS["javascript"])
def test_what_is_peculiar_to_javascript(protocol: str, collector: Collector, start: Start, prefix: str) -> None:
    """The tests above have tried it: its integers are doubles on the wire, its bodies come in chunks."""
    with relay(port_of(collector, protocol), protocol, Scripted()) as way:
        recorded = start("javascript", Order(protocol, "delta", way.port, rounds(6, prefix, 2))).recorded()
    seen = way.ledger.seen
    assert (bool(seen["double"]), seen["integer"], bool(seen["chunked"])) == (True, 0, protocol != "grpc")
    assert difference(recorded, stored(collector.dsn, prefix)) == {}
    assert audited(collector.dsn, prefix) == NOTHING


@pytest.mark.parametrize("temporality", ["delta", "cumulative"])
@pytest.mark.parametrize("protocol", PROTOCOLS["javascript"])
def test_javascript_records_and_exports_in_one_millisecond(
    protocol: str, temporality: str, collector: Collector, start: Start, prefix: str
) -> None:
    """Its clock has milliseconds: what a job records and exports at once starts when it ends."""
    port, now = port_of(collector, protocol), time.time_ns() // 1_000_000
    order = Order(protocol, temporality, port, rounds(3, prefix, 2), instance=prefix, frozen_ms=now)
    recorded = start("javascript", order).recorded()
    assert difference(recorded, stored(collector.dsn, prefix)) == {}
    assert audited(collector.dsn, prefix) == NOTHING


def test_two_processes_that_cannot_be_told_apart(collector: Collector, start: Start, prefix: str) -> None:
    """Delta, without service.instance.id, in the same millisecond: the second one's points have the first one's
    identity and other values. They are kept aside, whole: billed and kept aside are what both recorded."""
    now = time.time_ns() // 1_000_000
    recorded: Quantities = {}
    for seed in (4, 5):
        plan = rounds(seed, prefix, 1)
        order = Order("grpc", "delta", collector.port, plan, instance=None, frozen_ms=now)
        for entry, quantity in start("javascript", order).recorded().items():
            recorded[entry] = recorded.get(entry, Decimal(0)) + quantity
    billed, aside = stored(collector.dsn, prefix, quarantined=True), quarantined(collector.dsn, prefix)
    assert aside
    both = {entry: billed.get(entry, Decimal(0)) + aside.get(entry, Decimal(0)) for entry in {*billed, *aside}}
    assert difference(both, recorded) == {}
    assert audited(collector.dsn, prefix) == NOTHING


def test_two_processes_at_other_times_that_cannot_be_told_apart(
    collector: Collector, start: Start, prefix: str
) -> None:
    """What they recorded is billed, all of it. The audit finds that one stream covers the same time twice: each of the
    two was slow to export, the first since before the second began."""
    now = time.time_ns() // 1_000_000
    recorded: Quantities = {}
    with relay(collector.port, "grpc", Scripted()) as way:
        for seed, began in ((6, now - 60_000), (7, now - 50_000)):
            plan = rounds(seed, prefix, 3)
            order = Order("grpc", "delta", way.port, plan, instance=None, frozen_ms=began)
            for entry, quantity in start("javascript", order).recorded().items():
                recorded[entry] = recorded.get(entry, Decimal(0)) + quantity
        expected = overlapping(way.ledger.intervals().values())
    assert difference(recorded, stored(collector.dsn, prefix)) == {}
    found = audited(collector.dsn, prefix)
    assert (found.differences, found.drifts) == ((), ())
    assert expected
    assert Counter((microseconds(one.start), microseconds(one.end)) for one in found.overlaps) == expected


def microseconds(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(microseconds=1)
