"""What the collector is told: options of the command line over `TALLYMARK_*` variables over these defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from tallymark_collector.processors.validation import TimeLimits

DEFAULT_TENANT: Final = "default"
"""Whose usage it is while no credentials are configured."""

DEFAULT_PORT: Final = 4317
"""OTLP over gRPC."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Everything that is bounded has a name here."""

    times: TimeLimits = field(default_factory=TimeLimits)
    request_bytes: int = 64 * 1024 * 1024
    """One request after decompression: what OTLP's specification recommends."""
    in_flight_bytes: int = 256 * 1024 * 1024
    """All requests between arrival and answer. Past it a request is refused, retryable; decoded points take about
    ten times their bytes."""
    retry_after: float = 1.0
    """Seconds that a refused client is told to wait."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One collector."""

    database: str
    host: str = "127.0.0.1"
    """Loopback: without credentials nobody else may write."""
    port: int = DEFAULT_PORT
    refresh_interval: float = 1.0
    """Seconds between looks for hours that have to be recomputed. Views are right in between, only slower."""
    drain_seconds: float = 10.0
    """How long requests under way may take to finish when the collector is told to stop."""
    limits: Limits = field(default_factory=Limits)
