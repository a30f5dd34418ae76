"""OpenTelemetry's clients, straight to the collector: what they recorded is stored, to the unit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.interop.clients import PROTOCOLS, Order, Running
from tests.interop.conftest import port_of
from tests.interop.plans import rounds
from tests.interop.stored import difference, stored, views
from tests.support.collector import Collector

PAIRS = [(client, protocol) for client, protocols in PROTOCOLS.items() for protocol in protocols]
PROCESSES = 2
Start = Callable[[str, Order], Running]


@pytest.mark.parametrize("temporality", ["delta", "cumulative"])
@pytest.mark.parametrize(("client", "protocol"), PAIRS)
def test_recorded_is_stored(
    client: str, protocol: str, temporality: str, collector: Collector, start: Start, prefix: str
) -> None:
    """Several processes at once, then each once more under its name, with sums that begin anew. The second ones send
    compressed."""
    recorded = {}
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
                recorded[entry] = recorded.get(entry, 0) + quantity
    assert {entry[0] for entry in recorded} == {"interop.requests", "interop.volume", "span:interop.requests"}
    found = stored(collector.dsn, prefix)
    assert difference(recorded, found) == {}
    billed = {entry: quantity for entry, quantity in found.items() if not entry[0].startswith("span:")}
    assert difference(billed, views(collector.dsn, prefix)) == {}


@pytest.mark.parametrize("temporality", ["delta", "cumulative"])
@pytest.mark.parametrize("protocol", PROTOCOLS["javascript"])
def test_javascript_records_and_exports_in_one_millisecond(
    protocol: str, temporality: str, collector: Collector, start: Start, prefix: str
) -> None:
    """Its clock has milliseconds: what a job records and exports at once starts when it ends."""
    order = Order(
        protocol, temporality, port_of(collector, protocol), rounds(3, prefix, 2), instance=prefix, frozen=True
    )
    recorded = start("javascript", order).recorded()
    assert difference(recorded, stored(collector.dsn, prefix)) == {}
