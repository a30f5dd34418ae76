"""What the collector is told: options of the command line over `TALLYMARK_*` variables over these defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from tallymark_collector.processors.validation import TimeLimits

DEFAULT_TENANT: Final = "default"
"""Whose usage it is while no credentials are configured."""

DEFAULT_PORT: Final = 4317
"""OTLP over gRPC."""


RETENTION_MARGIN: Final = timedelta(days=2)
"""A point this much younger than what may be dropped is set aside already: it cannot be told from a replay once the
points of its time are gone, and it must not come between a collector's clock and another's."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long things are kept; None is for ever. Needs TimescaleDB. Hours, days and periods are always kept."""

    points: timedelta | None = None
    """Raw points: what an audit compares with, and what tells a retry from a new point."""
    evidence: timedelta | None = None
    """Spans."""
    billing_grace: timedelta = timedelta(days=35)
    """After a billing period's end its points are kept for at least so long."""
    columnstore_after: timedelta | None = None
    """Age at which points are laid out as columns (TimescaleDB's community edition)."""

    def times(self) -> TimeLimits:
        """How old a point may be when it arrives."""
        limits = TimeLimits()
        if self.points is None:
            return limits
        return TimeLimits(limits.ahead, min(limits.retention, self.points - RETENTION_MARGIN))


@dataclass(frozen=True, slots=True)
class Limits:
    """Everything that is bounded has a name here."""

    times: TimeLimits = field(default_factory=TimeLimits)
    request_bytes: int = 64 * 1024 * 1024
    """One request after decompression: what OTLP's specification recommends."""
    in_flight_bytes: int = 256 * 1024 * 1024
    """All requests between arrival and answer. Past it a request is refused, retryable; decoded points take about
    ten times their bytes."""
    queued_points: int = 250_000
    """Points of decoded requests that wait for the transaction under way to end, all tenants together. Past it the
    tenant that holds the most is refused, retryable."""
    queued_bytes: int = 64 * 1024 * 1024
    """The same in bytes of their rows."""
    group_points: int = 40_000
    """Points that one transaction writes together; a larger request has one to itself."""
    group_bytes: int = 16 * 1024 * 1024
    """The same in bytes of their rows."""
    retry_after: float = 1.0
    """Seconds that a refused client is told to wait."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One collector."""

    database: str
    """What requests are written with."""
    owner_database: str | None = None
    """The same database as the schema's owner, for what keeps it in order; None where `database` is the owner, or
    nothing needs one."""
    host: str = "127.0.0.1"
    """Loopback: without credentials nobody else may write."""
    port: int = DEFAULT_PORT
    refresh_interval: float = 1.0
    """Seconds between looks for hours that have to be recomputed. Views are right in between, only slower."""
    drain_seconds: float = 10.0
    """How long requests under way may take to finish when the collector is told to stop."""
    limits: Limits = field(default_factory=Limits)
    retention: Retention = field(default_factory=Retention)
