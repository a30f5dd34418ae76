"""What the collector is told: options of the command line over `TALLYMARK_*` variables over these defaults."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final

from tallymark_collector.metering import Rules
from tallymark_collector.processors.redaction import STANDARD, Redaction
from tallymark_collector.processors.validation import TimeLimits

DEFAULT_TENANT: Final = "default"
"""Whose usage it is while no credential has been made."""

DEFAULT_PORT: Final = 4317
"""OTLP over gRPC."""

DEFAULT_HTTP_PORT: Final = 4318
"""OTLP over HTTP."""

DEFAULT_ADMIN_PORT: Final = 4319
"""Health and metrics, for operators."""

DATABASE_TIMEOUT: Final = 30.0
"""Seconds that the database may take to write before the connection to it counts as lost. A network that has forgotten
a connection says nothing, ever: whoever waits for it would wait for good, and hold up whoever waits for its locks."""

SETTLED: Final = timedelta(seconds=60)
"""So long after a moment all that was recorded until then is there: a point is dated by the beginning of its
transaction, and one that takes `DATABASE_TIMEOUT` is given up."""

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
    keep_unfinalized: bool = True
    """Where a tenant finalises invoices, its points are kept until the periods that they belong to are finalised."""
    keep_unsettled: bool = True
    """Points are kept while the quarantine has open items of their time that could still be billed."""
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
    """All requests between arrival and answer. Past it the tenant that has the most under way gives way or is refused,
    retryable; decoded points take about ten times their bytes."""
    queued_points: int = 250_000
    """Points of decoded requests that wait for the transaction under way to end, all tenants together. Past it the
    tenant that holds the most is refused, retryable."""
    queued_bytes: int = 128 * 1024 * 1024
    """The same in bytes of memory, whatever the requests hold (`store.weighing`)."""
    group_points: int = 40_000
    """Points that one transaction writes together; a larger request has one to itself."""
    group_bytes: int = 32 * 1024 * 1024
    """The same in bytes of memory."""
    retry_after: float = 1.0
    """Seconds that a refused client is told to wait."""
    json_values: int = 4_000_000
    """Values in one request in JSON; each takes about 100 bytes while it is converted."""
    http_connections: int = 1000
    """HTTP connections, from their TLS handshakes on; for each that comes then an idle one is closed, or the one with
    the slowest body. Each may hold 128 KiB that are not counted yet. `serve` takes fewer where the process may not open
    so many files (`processes.descriptors`)."""
    head_seconds: float = 10.0
    """How long an HTTP client may take from connecting to the end of its first request's head, handshake included."""
    body_seconds: float = 30.0
    """How long a request's body may take to arrive, over either protocol: exporters wait 10 s for the whole
    exchange."""
    idle_seconds: float = 75.0
    """After so long without a request an HTTP connection is closed: longer than the minute between most exports."""
    points_per_second: float | None = None
    """Of each tenant that has no limit of its own, in each collector; None is without limit. More is refused,
    retryable."""
    new_streams_per_hour: float | None = None
    """The same for streams that the database does not know yet. What exceeds it is kept in quarantine."""


@dataclass(frozen=True, slots=True)
class Connections:
    """How long connections live, in seconds; but for `max_age` those of gRPC."""

    max_age: float = 600.0
    """A connection this old is closed once its calls have ended, and the client makes another: behind a balancer, to
    another collector. It is varied by a tenth. Over HTTP the next answer is its last, and says so."""
    max_age_grace: float = 30.0
    """What calls under way get then; longer than any export should take."""
    keepalive: float = 60.0
    """After so long without a word the client is asked whether it is there; a silent one is gone."""
    keepalive_timeout: float = 20.0
    """How long it has to answer."""
    least_ping_interval: float = 10.0
    """Clients may ask as often, also between calls; more often and they are disconnected."""
    most: int | None = None
    """Connections at a time, from their handshakes on; further ones are closed. None is without a bound; `serve` sets
    what the open files that the process may have leave room for (`processes.descriptors`)."""
    max_streams: int = 100
    """Calls at once on one connection; further ones wait at the client."""
    window: int = 64 * 1024
    """Bytes of a call that gRPC takes before somebody reads them, which nobody does before it is known whose call it
    is."""
    arriving: int = 8
    """Messages of one tenant that arrive at the same time, on all connections; each is counted when it is whole.
    Further ones wait with their `window`."""
    handshake: float = 10.0
    """How long a client may take from connecting to its first word of HTTP/2, behind TLS where there is TLS."""


class Compression(str, enum.Enum):
    """Of what is sent, as OTEL_EXPORTER_OTLP_COMPRESSION names it."""

    GZIP = "gzip"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Forwarding:
    """Where acknowledged requests are sent on to."""

    endpoint: str
    """grpc://host:port, grpcs://host:port, http://… or https://…"""
    folder: Path
    """Keeps what has not been acknowledged there yet; one collector's alone."""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Of each request to the next hop; they may hold a credential."""
    max_bytes: int = 1024 * 1024 * 1024
    """What the folder may hold. Past it the oldest requests are dropped, counted and told."""
    max_files: int = 100_000
    """Likewise: each request is a file."""
    compression: Compression = Compression.GZIP
    """Every receiver of OTLP takes both."""
    tenant: str = DEFAULT_TENANT
    """Whose requests. Where they go to they are one credential's, so those of several tenants would become one's."""


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Where the collector's own metrics are sent, over OTLP."""

    protocol: str
    """"grpc" or "http"."""
    endpoint: str | None = None
    """As the exporter takes it; None where OTEL_EXPORTER_OTLP_* say it."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files that a server shows itself by; they are read again when they change."""

    certificate: Path
    """The server's certificate, then those between it and its authority."""
    key: Path
    client_authority: Path | None = None
    """Authorities of clients: nobody gets in without a certificate from one of them."""


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
    http_port: int | None = None
    """The port of OTLP over HTTP; None takes none."""
    reflection: bool = False
    """Whether gRPC's server reflection tells which services there are."""
    shares_ports: bool = False
    """Whether other processes listen at the same ports, and somebody sees to it that they are of one collector."""
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None
    """The port of health and metrics; None takes none."""
    telemetry: Telemetry | None = None
    tls: TlsFiles | None = None
    """None is without TLS."""
    api: bool = True
    """Whether what is stored can be asked for over gRPC, with a credential (`api`)."""
    allow_anonymous: bool = False
    """Requests without a credential are taken as the default tenant's, wherever they come from."""
    refresh_interval: float = 1.0
    """Seconds between looks for hours that have to be recomputed. Views are right in between, only slower."""
    database_timeout: float = DATABASE_TIMEOUT
    drain_seconds: float = 10.0
    """How long requests under way may take to finish when the collector is told to stop."""
    limits: Limits = field(default_factory=Limits)
    connections: Connections = field(default_factory=Connections)
    retention: Retention = field(default_factory=Retention)
    forwarding: Forwarding | None = None
    meters: Rules | None = None
    """What of other people's telemetry is usage."""
    redaction: Redaction = STANDARD
    """What is stored of credentials in what clients send."""
