"""What producers say of themselves, for tests; the producer "one" is the one of `tests.support.usage.stream`."""

from __future__ import annotations

from decimal import Decimal

from tallymark_collector.model import Closing, ControlTotal, EvidenceCount, Origin, Producer
from tests.support.usage import BASE, SECOND

ORIGIN = Origin(b"", b"", "tallymark.control.total", "1", 2, True, ())


def producer(instance: str = "one", tenant: str = "default") -> Producer:
    """A process of the service "shop"."""
    return Producer(tenant, "", "shop", instance)


def told(
    end: float,
    total: int | str,
    start: float = 0,
    meter: str = "api.requests",
    of: str = "one",
    tenant: str = "default",
) -> ControlTotal:
    """A control total; times in seconds after BASE."""
    times = (BASE + int(start * SECOND), BASE + int(end * SECOND))
    return ControlTotal(producer(of, tenant), meter, "{request}", *times, Decimal(total), ORIGIN)


def closed(end: float, start: float = 0, of: str = "one") -> Closing:
    """The end of a run."""
    return Closing(producer(of), BASE + int(start * SECOND), BASE + int(end * SECOND))


def on_spans(
    end: float, quantity: int | str, account: str = "acme", meter: str = "api.requests", of: str = "one"
) -> EvidenceCount:
    """Usage on spans in the ten seconds until `end`."""
    times = (BASE + int((end - 10) * SECOND), BASE + int(end * SECOND))
    return EvidenceCount(producer(of), account, meter, "{request}", *times, Decimal(quantity), ORIGIN)
