"""Where the collector's instruments meet its parts: which of their plain counts each one reads."""

from __future__ import annotations

from collections.abc import Callable

from tallymark_collector.aggregates.backlog import Backlog
from tallymark_collector.forwarding.forwarder import Forwarder
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.receivers.admission import Admission
from tallymark_collector.settings import Limits
from tallymark_collector.store import Store
from tallymark_collector.store.committing import Committing
from tallymark_collector.store.writer import Encoded
from tallymark_collector.telemetry import readings
from tallymark_collector.telemetry.instruments import STATE, Instruments, Readings, one
from tallymark_collector.telemetry.requests import Requests
from tallymark_collector.telemetry.written import Counted, Timed, Writing, Written


class Seen:
    """What is counted on the way of a request."""

    def __init__(self, instruments: Instruments, limits: Limits) -> None:
        self.requests = Requests()
        self.admission = Admission(limits.in_flight_bytes, limits.retry_after)
        self._written = Written(self.requests.tenants)
        self._instruments = instruments

    def timed(self, store: Store) -> Timed[Encoded]:
        """The same store, whose transactions are measured."""
        return Timed(store, readings.transactions(self._instruments))

    def counted(self, behind: Writing) -> Counted:
        """The same way to the store, of which is counted what was committed."""
        return Counted(behind, self._written)

    def observe(self, pipeline: Pipeline, writing: Committing, store: Store, forwarder: Forwarder | None) -> None:
        """Has the instruments read it all from now on."""

        def connections() -> Readings:
            pool = store.pool()
            return [(pool.used, {STATE: "used"}), (pool.idle, {STATE: "idle"})]

        instruments = self._instruments
        readings.observe_requests(instruments, self.requests)
        readings.observe_written(instruments, self._written)
        readings.observe_queue(instruments, writing)
        instruments.observe("in_flight", one(lambda: self.admission.under_way))
        readings.observe_unmatched(instruments, pipeline.totals.unmatched)
        instruments.observe("database.connections", connections)
        instruments.observe("database.waiting", one(lambda: store.pool().waiting))
        if forwarder is not None:
            readings.observe_forwarder(instruments, forwarder)

    def observe_restarts(self, restarts: Callable[[], int]) -> None:
        """How often a server ended by itself."""
        self._instruments.observe("grpc.restarts", one(restarts))


def observe_backlog(instruments: Instruments, backlog: Backlog) -> None:
    """What waits in the database."""
    instruments.observe("refresh.lag", one(lambda: backlog.lag))
    instruments.observe("refresh.waiting", one(lambda: backlog.hours))
    instruments.observe("audit.findings", one(lambda: backlog.findings))
    instruments.observe("backlog.age", one(lambda: backlog.age))
