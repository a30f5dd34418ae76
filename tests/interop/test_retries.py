"""Requests that fail on their way, before and after the collector has committed them.

What is asserted always: what is stored is what was let through, each point once. What a client promises comes on top:
where it sends a request again, all that it recorded is stored; where it does not, cumulative sums heal with the next
export, and of delta sums that request is gone.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from decimal import Decimal

import pytest

from tests.interop.audited import NOTHING, audited
from tests.interop.clients import SWITCH, Call, Order
from tests.interop.conftest import PAIRS, Start, port_of, relay
from tests.interop.fates import FAULTS, Fate, Scripted, Seeded
from tests.interop.ledger import Quantities
from tests.interop.plans import rounds
from tests.interop.stored import difference, stored
from tests.support.collector import Collector

pytestmark = pytest.mark.skipif(not os.environ.get(SWITCH), reason="NOT TESTED: make interop runs it")

AFTER_COMMIT = (Fate.LOST, Fate.CUT_AFTER)
NEVER: frozenset[Fate] = frozenset()
REFUSALS = frozenset({Fate.REFUSED, Fate.LOST})
ALWAYS = frozenset(FAULTS)
SENDS_AGAIN = {
    ("python", "grpc"): ALWAYS,
    ("python", "http/protobuf"): ALWAYS,
    ("javascript", "grpc"): NEVER,
    ("javascript", "http/json"): ALWAYS,
    ("javascript", "http/protobuf"): ALWAYS,
    ("go", "grpc"): ALWAYS,
    ("go", "http/protobuf"): REFUSALS,
    ("java", "grpc"): REFUSALS,
    ("java", "http/protobuf"): REFUSALS,
}
"""After which faults a client sends the same request again: docs/clients.md tells it to users."""
assert {*SENDS_AGAIN} == {*PAIRS}


@pytest.mark.parametrize(("client", "protocol"), PAIRS)
def test_what_a_client_promises(client: str, protocol: str, collector: Collector, start: Start, prefix: str) -> None:
    """Delta: of each of four processes the first of three requests meets another fault."""
    ways, processes = {}, {}
    with ExitStack() as stack:
        for fault in FAULTS:
            way = ways[fault] = stack.enter_context(relay(port_of(collector, protocol), protocol, Scripted(fault)))
            own = f"{prefix}-{fault.name}"
            order = Order(protocol, "delta", way.port, rounds(1, own, 3), instance=own)
            processes[fault] = start(client, order)
        recorded = {fault: process.recorded() for fault, process in processes.items()}
    for fault, way in ways.items():
        own = f"{prefix}-{fault.name}"
        assert way.fates.seen[fault] == 1
        found = stored(collector.dsn, own)
        assert difference(found, way.ledger.quantities()) == {}, fault
        sends_again = fault in SENDS_AGAIN[client, protocol]
        if sends_again or fault in AFTER_COMMIT:
            assert difference(found, recorded[fault]) == {}, fault
        else:
            first = of_rounds(rounds(1, own, 3)[:1])
            assert difference(found, less(recorded[fault], first)) == {}, fault
        assert bool(way.ledger.seen["again"]) == (sends_again and fault in AFTER_COMMIT), fault
        assert audited(collector.dsn, own) == NOTHING, fault


@pytest.mark.parametrize(("client", "protocol"), [pair for pair in PAIRS if SENDS_AGAIN[pair] != ALWAYS])
def test_cumulative_sums_heal(client: str, protocol: str, collector: Collector, start: Start, prefix: str) -> None:
    """What a client does not send again comes with its next total."""
    faults = [fault for fault in FAULTS if fault not in SENDS_AGAIN[client, protocol]]
    with ExitStack() as stack:
        processes = {}
        for fault in faults:
            way = stack.enter_context(relay(port_of(collector, protocol), protocol, Scripted(fault)))
            own = f"{prefix}-{fault.name}"
            order = Order(protocol, "cumulative", way.port, rounds(2, own, 3), instance=own)
            processes[fault] = start(client, order)
        for fault, process in processes.items():
            assert difference(process.recorded(), stored(collector.dsn, f"{prefix}-{fault.name}")) == {}, fault
            assert audited(collector.dsn, f"{prefix}-{fault.name}") == NOTHING, fault


@pytest.mark.parametrize(("client", "protocol"), PAIRS)
def test_faults_in_random_mixture(client: str, protocol: str, collector: Collector, start: Start, prefix: str) -> None:
    """Two processes of each temporality, and what the client is equal to: all that it sends again after, or, where it
    never does, everything."""
    chances = {Fate.REFUSED: 0.15, Fate.LOST: 0.15, Fate.CUT: 0.07, Fate.CUT_AFTER: 0.07}
    promised = SENDS_AGAIN[client, protocol]
    chances = {fate: chance for fate, chance in chances.items() if fate in promised or not promised}
    recorded: Quantities = {}
    with relay(port_of(collector, protocol), protocol, Seeded(5, {**chances, Fate.LATE: 0.2})) as way:
        processes = []
        for number in range(4):
            own = f"{prefix}-{number}"
            temporality = "delta" if number % 2 else "cumulative"
            plan = rounds(20 + number, own, 4)
            order = Order(protocol, temporality, way.port, plan, instance=own, spans=number == 0)
            processes.append(start(client, order))
        for process in processes:
            recorded.update(process.recorded())
    print(way.fates.seen, way.ledger.seen)
    assert sum(way.fates.seen[fault] for fault in FAULTS) > 3
    found = stored(collector.dsn, prefix)
    assert difference(found, way.ledger.quantities()) == {}
    assert audited(collector.dsn, prefix) == NOTHING
    if promised:
        assert difference(found, recorded) == {}
        assert way.ledger.seen["again"]
    else:
        assert all(found.get(entry, Decimal(0)) <= quantity for entry, quantity in recorded.items())


def of_rounds(plan: list[list[Call]]) -> Quantities:
    """What these rounds record."""
    found: Quantities = {}
    for call in (call for each in plan for call in each):
        for meter, quantity in (
            ("interop.requests", Decimal(call["calls"])),
            ("interop.volume", Decimal(call["volume_thousandths"]) / 1000),
        ):
            entry = (meter, call["account"], call["route"])
            found[entry] = found.get(entry, Decimal(0)) + quantity
    return found


def less(one: Quantities, other: Quantities) -> Quantities:
    """One minus other, entry by entry."""
    return {entry: quantity - other.get(entry, Decimal(0)) for entry, quantity in one.items()}
