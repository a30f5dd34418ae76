"""The collector's own metrics: the table of them, and instruments that read what is counted elsewhere."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

from opentelemetry.metrics import CallbackOptions, Histogram, Meter, Observation

PREFIX: Final = "tallymark.collector."
SCOPE: Final = "tallymark_collector"

TENANT: Final = "tallymark.tenant"
PROTOCOL: Final = "tallymark.protocol"
SIGNAL: Final = "tallymark.signal"
ANSWER: Final = "tallymark.answer"
REASON: Final = "tallymark.reason"
STATE: Final = "tallymark.state"
ERROR: Final = "error.type"

Readings = Iterable[tuple[float, Mapping[str, str]]]
Read = Callable[[], Readings]
"""Values and their attributes, now. Called from the thread of whoever asks."""


class Kind(str, enum.Enum):
    """OpenTelemetry's kinds of instruments, those of them that are used here."""

    COUNTER = "counter"
    UP_DOWN_COUNTER = "up-down counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Instrument(NamedTuple):
    """A metric. docs/metrics.md has the same table; a test compares them."""

    name: str
    """Behind `PREFIX`."""
    kind: Kind
    unit: str
    """In UCUM."""
    attributes: tuple[str, ...]
    description: str
    bounds: tuple[float, ...] | None = None
    """Of a histogram's buckets."""


_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_REQUESTS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_POINTS: Final = (0.0, 1.0, 10.0, 100.0, 1_000.0, 10_000.0, 100_000.0)

INSTRUMENTS: Final = (
    Instrument(
        *("requests", Kind.COUNTER, "{request}", (TENANT, PROTOCOL, SIGNAL, ANSWER, ERROR)),
        "Requests that were answered.",
    ),
    Instrument("received", Kind.COUNTER, "By", (TENANT, PROTOCOL), "Bytes of requests, decompressed, as protobuf."),
    Instrument("in_flight", Kind.UP_DOWN_COUNTER, "By", (), "Bytes of requests between arrival and answer."),
    Instrument("points", Kind.COUNTER, "{point}", (TENANT,), "Points that were committed and new."),
    Instrument("duplicates", Kind.COUNTER, "{point}", (TENANT,), "Points that were there before with the same value."),
    Instrument("evidence", Kind.COUNTER, "{span}", (TENANT,), "Spans that were committed and new."),
    Instrument("quarantined", Kind.COUNTER, "{item}", (TENANT, REASON), "Points and spans that were set aside."),
    Instrument("unmatched", Kind.COUNTER, "{item}", (TENANT,), "Points, spans and log records that are no usage."),
    Instrument(
        *("commit.duration", Kind.HISTOGRAM, "s", (), "Time of a transaction that was committed."), bounds=_SECONDS
    ),
    Instrument(*("commit.requests", Kind.HISTOGRAM, "{request}", (), "Requests in one transaction."), bounds=_REQUESTS),
    Instrument(*("commit.points", Kind.HISTOGRAM, "{point}", (), "Points in one transaction."), bounds=_POINTS),
    Instrument("queue.requests", Kind.UP_DOWN_COUNTER, "{request}", (), "Requests that wait for a transaction."),
    Instrument("queue.points", Kind.UP_DOWN_COUNTER, "{point}", (), "What these requests hold."),
    Instrument("queue.age", Kind.GAUGE, "s", (), "How long the oldest of these requests has waited."),
    Instrument(
        "queue.refused", Kind.COUNTER, "{request}", (TENANT,), "Requests that found no room to wait, or lost it."
    ),
    Instrument("commit.broken", Kind.COUNTER, "{transaction}", (), "Transactions that were taken apart: see the log."),
    Instrument("ready", Kind.GAUGE, "1", (), "1 if usage is taken, else 0."),
    Instrument("database.connections", Kind.UP_DOWN_COUNTER, "{connection}", (STATE,), "Connections of the pool."),
    Instrument("database.waiting", Kind.UP_DOWN_COUNTER, "{request}", (), "Who waits for a connection of the pool."),
    Instrument("refresh.lag", Kind.GAUGE, "s", (), "Age of the oldest mark of an hour that is to be made again."),
    Instrument("refresh.waiting", Kind.GAUGE, "{hour}", (), "Account-hours that are to be made again."),
    Instrument("audit.findings", Kind.GAUGE, "{finding}", (), "Differences that the audit has ever found."),
    Instrument("backlog.age", Kind.GAUGE, "s", (), "Time since the last look for the three before this one."),
    Instrument("forward.requests", Kind.COUNTER, "{request}", (STATE,), "Requests for the next hop, by what became."),
    Instrument("forward.rejected", Kind.COUNTER, "{item}", (), "Parts of taken requests that the next hop refused."),
    Instrument("forward.timeouts", Kind.COUNTER, "{request}", (), "Times that the next hop did not answer in time."),
    Instrument("forward.waiting", Kind.UP_DOWN_COUNTER, "{request}", (), "Requests that wait for the next hop."),
    Instrument("processes", Kind.UP_DOWN_COUNTER, "{process}", (STATE,), "Processes under this one."),
    Instrument("process.restarts", Kind.COUNTER, "{restart}", (), "Processes that died and were started again."),
    Instrument("grpc.restarts", Kind.COUNTER, "{restart}", (), "Times that gRPC's server ended and was started again."),
)
_BY_NAME: Final = {instrument.name: instrument for instrument in INSTRUMENTS}


class Instruments:
    """Instruments of the table on one OpenTelemetry meter, those that have something to read."""

    def __init__(self, otel_meter: Meter) -> None:
        self._meter = otel_meter

    def observe(self, name: str, read: Read) -> None:
        """Reads this instrument's values there."""
        instrument = _BY_NAME[name]

        def callback(_options: CallbackOptions) -> Iterable[Observation]:
            return [Observation(value, dict(attributes)) for value, attributes in _steady(read)]

        create = {
            Kind.COUNTER: self._meter.create_observable_counter,
            Kind.UP_DOWN_COUNTER: self._meter.create_observable_up_down_counter,
            Kind.GAUGE: self._meter.create_observable_gauge,
        }[instrument.kind]
        create(PREFIX + name, [callback], unit=instrument.unit, description=instrument.description)

    def histogram(self, name: str) -> Histogram:
        """What is told single values, once a transaction at most."""
        _, _, unit, _, description, bounds = _BY_NAME[name]
        return self._meter.create_histogram(
            PREFIX + name, unit=unit, description=description, explicit_bucket_boundaries_advisory=bounds
        )


def one(read: Callable[[], float]) -> Read:
    """A single value without attributes."""
    return lambda: [(read(), {})]


def _steady(read: Read, tries: int = 5) -> list[tuple[float, Mapping[str, str]]]:
    """What is read belongs to the event loop's thread, which may add a key meanwhile: then it is read again."""
    for _ in range(tries - 1):
        try:
            return list(read())
        except RuntimeError:
            continue
    return list(read())
