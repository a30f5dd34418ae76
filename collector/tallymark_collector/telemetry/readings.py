"""From what is counted to what instruments report: attributes and values, and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from tallymark_collector.telemetry import instruments as of
from tallymark_collector.telemetry.instruments import Instruments, Read, Readings
from tallymark_collector.telemetry.requests import Requests
from tallymark_collector.telemetry.written import Committed, Written


class Progress(Protocol):
    """What a queue has done since the start."""

    @property
    def refused(self) -> Counter[str]: ...
    @property
    def broken_groups(self) -> int: ...


class Queue(Protocol):
    """Requests that wait for a transaction."""

    @property
    def queued_requests(self) -> int: ...
    @property
    def queued_points(self) -> int: ...
    @property
    def oldest_seconds(self) -> float: ...
    @property
    def progress(self) -> Progress: ...


class ForwardTotals(Protocol):
    """Requests for the next hop, since the start."""

    @property
    def sent(self) -> int: ...
    @property
    def rejected(self) -> int: ...
    @property
    def refused(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    @property
    def timeouts(self) -> int: ...


class Forwards(Protocol):
    """What sends requests on."""

    @property
    def totals(self) -> ForwardTotals:
        """What became of requests."""
        ...

    @property
    def waiting(self) -> int:
        """Requests that are not acknowledged there yet."""
        ...


def observe_requests(instruments: Instruments, requests: Requests) -> None:
    """Requests and their bytes."""

    def answered() -> Readings:
        for key, count in requests.answered.copy().items():
            tenant, protocol, signal, answer, error = key
            attributes = {of.TENANT: tenant, of.PROTOCOL: protocol, of.SIGNAL: signal, of.ANSWER: answer}
            yield count, {**attributes, of.ERROR: error}

    def received() -> Readings:
        for (tenant, protocol), size in requests.received.copy().items():
            yield size, {of.TENANT: tenant, of.PROTOCOL: protocol}

    instruments.observe("requests", answered)
    instruments.observe("received", received)


def observe_written(instruments: Instruments, written: Written) -> None:
    """What was committed."""

    def quarantined() -> Readings:
        for (tenant, reason), count in written.quarantined.copy().items():
            yield count, {of.TENANT: tenant, of.REASON: reason}

    instruments.observe("points", _by_tenant(written.points))
    instruments.observe("duplicates", _by_tenant(written.duplicates))
    instruments.observe("evidence", _by_tenant(written.evidence))
    instruments.observe("quarantined", quarantined)


def observe_unmatched(instruments: Instruments, unmatched: Counter[str]) -> None:
    """What is no usage, by tenant."""
    instruments.observe("unmatched", _by_tenant(unmatched))


def transactions(instruments: Instruments) -> Committed:
    """What is to be told of each transaction."""
    duration, requests, points = (
        instruments.histogram(f"commit.{name}") for name in ("duration", "requests", "points")
    )

    def committed(seconds: float, of_requests: int, of_points: int) -> None:
        duration.record(seconds)
        requests.record(of_requests)
        points.record(of_points)

    return committed


def observe_queue(instruments: Instruments, queue: Queue) -> None:
    """What waits for the next transaction."""
    instruments.observe("queue.requests", of.one(lambda: queue.queued_requests))
    instruments.observe("queue.points", of.one(lambda: queue.queued_points))
    instruments.observe("queue.age", of.one(lambda: queue.oldest_seconds))
    instruments.observe("queue.refused", _by_tenant(queue.progress.refused))
    instruments.observe("commit.broken", of.one(lambda: queue.progress.broken_groups))


def observe_forwarder(instruments: Instruments, forwarder: Forwards) -> None:
    """What is sent on."""

    def by_fate() -> Readings:
        totals = forwarder.totals
        for state, count in (("sent", totals.sent), ("refused", totals.refused), ("dropped", totals.dropped)):
            yield count, {of.STATE: state}

    instruments.observe("forward.requests", by_fate)
    instruments.observe("forward.rejected", of.one(lambda: forwarder.totals.rejected))
    instruments.observe("forward.timeouts", of.one(lambda: forwarder.totals.timeouts))
    instruments.observe("forward.waiting", of.one(lambda: forwarder.waiting))


def _by_tenant(counts: Counter[str]) -> Read:
    return lambda: [(count, {of.TENANT: tenant}) for tenant, count in counts.copy().items()]
