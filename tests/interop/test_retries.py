"""Requests that fail on their way, before and after the collector has committed them.

What is asserted always: what is stored is what was let through, each point once. What a client promises comes on top:
where it sends a request again, all that it recorded is stored; where it does not, cumulative sums heal with the next
export, and of delta sums that request is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

import pytest

from tests.interop.clients import Order, Running
from tests.interop.conftest import port_of, relay
from tests.interop.fates import FAULTS, Fate, Scripted, Seeded
from tests.interop.ledger import Quantities
from tests.interop.plans import rounds
from tests.interop.stored import difference, stored
from tests.interop.test_clients import PAIRS
from tests.support.collector import Collector

Start = Callable[[str, Order], Running]

NEVER: frozenset[Fate] = frozenset()
ALWAYS = frozenset(FAULTS)
SENDS_AGAIN = {
    ("python", "grpc"): ALWAYS,
    ("python", "http/protobuf"): ALWAYS,
    ("javascript", "grpc"): NEVER,
    ("javascript", "http/json"): ALWAYS,
    ("javascript", "http/protobuf"): ALWAYS,
    ("go", "grpc"): ALWAYS,
    ("go", "http/protobuf"): ALWAYS,
    ("java", "grpc"): frozenset({Fate.REFUSED, Fate.LOST}),
    ("java", "http/protobuf"): ALWAYS,
}
"""After which faults a client sends the same request again: docs/clients.md tells it to users."""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fate: fate.name.lower())
@pytest.mark.parametrize(("client", "protocol"), PAIRS)
def test_what_a_client_promises(
    client: str, protocol: str, fault: Fate, collector: Collector, start: Start, prefix: str
) -> None:
    """The first of three delta requests meets the fault."""
    with relay(port_of(collector, protocol), protocol, Scripted(fault)) as way:
        order = Order(protocol, "delta", way.port, rounds(1, prefix, 3), instance=prefix)
        recorded = start(client, order).recorded()
    through = way.ledger.quantities()
    assert way.fates.seen[fault] == 1
    found = stored(collector.dsn, prefix)
    assert difference(found, through) == {}
    if fault in SENDS_AGAIN[client, protocol]:
        assert difference(found, recorded) == {}
        assert bool(way.ledger.seen["again"]) == (fault in (Fate.LOST, Fate.CUT_AFTER))
    elif fault in (Fate.LOST, Fate.CUT_AFTER):
        assert difference(found, recorded) == {}
        assert not way.ledger.seen["again"]
    else:
        first = of_rounds(rounds(1, prefix, 3)[:1])
        assert difference(found, less(recorded, first)) == {}


@pytest.mark.parametrize("temporality", ["delta", "cumulative"])
@pytest.mark.parametrize(("client", "protocol"), PAIRS)
def test_faults_in_random_mixture(
    client: str, protocol: str, temporality: str, collector: Collector, start: Start, prefix: str
) -> None:
    """Two processes, one seed; the last request of a cumulative client that does not send again gets through."""
    chances = {Fate.REFUSED: 0.15, Fate.LOST: 0.15, Fate.CUT: 0.08, Fate.CUT_AFTER: 0.08, Fate.LATE: 0.2}
    recorded: Quantities = {}
    with relay(port_of(collector, protocol), protocol, Seeded(len(client) + len(protocol), chances)) as way:
        orders = [
            Order(
                protocol=protocol,
                temporality=temporality,
                port=way.port,
                rounds=rounds(20 + process, f"{prefix}-{process}", 6),
                instance=f"{prefix}-{process}",
            )
            for process in range(2)
        ]
        for each in [start(client, order) for order in orders]:
            recorded.update(each.recorded())
    through = way.ledger.quantities()
    print(way.fates.seen, way.ledger.seen)
    assert sum(way.fates.seen[fault] for fault in FAULTS) > 2
    found = stored(collector.dsn, prefix)
    assert difference(found, through) == {}
    if SENDS_AGAIN[client, protocol] == ALWAYS:
        assert difference(found, recorded) == {}
    else:
        assert all(found.get(entry, Decimal(0)) <= quantity for entry, quantity in recorded.items())


def of_rounds(calls: list[list[dict[str, object]]]) -> Quantities:
    """What these rounds record."""
    found: Quantities = {}
    for call in (call for each in calls for call in each):
        account, route = str(call["account"]), str(call["route"])
        volume = Decimal(str(call["volume_thousandths"])) / 1000
        for entry, quantity in (
            (("interop.requests", account, route), Decimal(str(call["calls"]))),
            (("interop.volume", account, route), volume),
        ):
            found[entry] = found.get(entry, Decimal(0)) + quantity
    return found


def less(one: Quantities, other: Quantities) -> Quantities:
    """One minus other, entry by entry."""
    return {entry: quantity - other.get(entry, Decimal(0)) for entry, quantity in one.items()}
