"""Clients, a gateway, the collector: what clients recorded is stored, though the gateway cuts it up, overtakes itself
and sends again what it takes for lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.interop import clients, gateway
from tests.interop.audited import NOTHING, audited
from tests.interop.clients import PROTOCOLS, NotBuiltError, Order
from tests.interop.conftest import Start, note_missing, note_tested, port_of, relay
from tests.interop.fates import FAULTS, Fate, Seeded
from tests.interop.ledger import Quantities
from tests.interop.plans import rounds
from tests.interop.stored import difference, stored
from tests.support.collector import Collector

PATIENCE_S = 60
CHANCES = {Fate.REFUSED: 0.1, Fate.LOST: 0.12, Fate.CUT: 0.03, Fate.CUT_AFTER: 0.03, Fate.LATE: 0.3}


@pytest.mark.parametrize("protocol", gateway.EXPORTERS)
def test_recorded_is_stored(protocol: str, collector: Collector, start: Start, prefix: str, tmp_path: Path) -> None:
    """Every client that is there, delta and cumulative at once. A gateway that ends drops what it is about to send
    again, so it is stopped when all is stored; then nothing may have come twice."""
    recorded: Quantities = {}
    try:
        with (
            relay(port_of(collector, protocol), protocol, Seeded(7, CHANCES)) as way,
            gateway.running(tmp_path, protocol, way.port) as found,
        ):
            note_tested("gateway", {"collector": found.version})
            started = []
            for number, name in enumerate(there()):
                spoken = PROTOCOLS[name][number % len(PROTOCOLS[name])]
                for temporality in ("delta", "cumulative"):
                    own = f"{prefix}-{name}-{temporality}"
                    plan = rounds(30 + number, own, 4)
                    order = Order(spoken, temporality, found.port_of(spoken), plan, instance=own, spans=True)
                    started.append(start(name, order))
            for each in started:
                recorded.update(each.recorded())
            deadline = time.monotonic() + PATIENCE_S
            while difference(recorded, stored(collector.dsn, prefix)) and time.monotonic() < deadline:
                time.sleep(0.2)
    except NotBuiltError as error:
        note_missing("gateway", str(error))
        pytest.skip(f"gateway NOT TESTED: {error}")
    print(way.fates.seen, way.ledger.seen)
    final = stored(collector.dsn, prefix)
    assert difference(final, recorded) == {}
    assert difference(final, way.ledger.quantities()) == {}
    assert audited(collector.dsn, prefix) == NOTHING
    assert sum(way.fates.seen[fault] for fault in FAULTS) > 5
    assert way.ledger.seen["again"]


def there() -> list[str]:
    """The clients that are built."""
    found = []
    for name in PROTOCOLS:
        try:
            clients.command(name)
        except NotBuiltError as error:
            note_missing(name, str(error))
        else:
            found.append(name)
    return found
