"""`serve`'s options of what an operator sees: the admin port, and where the collector's own metrics are sent."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Annotated, Final
from urllib.parse import SplitResult, urlsplit

import typer

from tallymark_collector.errors import UserError
from tallymark_collector.settings import DEFAULT_ADMIN_PORT, DEFAULT_PORT, Settings, Telemetry

ENDPOINT_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOL_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PATH: Final = "/v1/metrics"
_PORTS: Final = {"http": 80, "https": 443}
_PROTOCOLS: Final = {"grpc": "grpc", "http/protobuf": "http"}

AdminHostOption = Annotated[
    str, typer.Option("--admin-host", envvar="TALLYMARK_ADMIN_HOST", help="Address of health and metrics.")
]
AdminPortOption = Annotated[
    int | None,
    typer.Option(
        "--admin-port",
        envvar="TALLYMARK_ADMIN_PORT",
        min=0,
        max=65535,
        show_default=f"{DEFAULT_ADMIN_PORT}; where --port is not {DEFAULT_PORT}, a free one",
        help="Port of /livez, /readyz and /metrics; 0 takes a free one.",
    ),
]
NoAdminOption = Annotated[bool, typer.Option("--no-admin", envvar="TALLYMARK_NO_ADMIN", help="No such port.")]
TelemetryOption = Annotated[
    str | None,
    typer.Option(
        "--telemetry-endpoint",
        envvar="TALLYMARK_TELEMETRY_ENDPOINT",
        metavar="ENDPOINT",
        show_default="OTEL_EXPORTER_OTLP_ENDPOINT, else nowhere",
        help="Send the collector's own metrics to grpc://host:port, grpcs://…, http://… or https://…",
    ),
]


def admin_port(given: int | None, *, off: bool, port: int, http_port: int | None) -> int | None:
    """The port of health and metrics; None for none. Raises UserError."""
    if off:
        if given is not None:
            raise UserError("--no-admin and --admin-port contradict each other: leave one out")
        return None
    if given is None:
        # A second collector on this machine must not fail for a port that nobody asked for.
        return DEFAULT_ADMIN_PORT if port == DEFAULT_PORT else 0
    if given and given in (port, http_port):
        raise UserError(f"--admin-port {given} is a port of OTLP, too: give it another one")
    return given


def telemetry(endpoint: str | None, environ: Mapping[str, str] = os.environ) -> Telemetry | None:
    """Where the collector's own metrics are sent; None for nowhere. Raises UserError."""
    if endpoint is not None:
        address = _address("--telemetry-endpoint", endpoint, ("grpc", "grpcs", "http", "https"))
        if address.scheme.startswith("grpc"):
            if address.port is None:
                raise UserError("--telemetry-endpoint has no port: write grpc://host:port")
            scheme = "https" if address.scheme == "grpcs" else "http"
            return Telemetry("grpc", f"{scheme}://{address.netloc}")
        path = address.path.rstrip("/")
        return Telemetry("http", f"{address.scheme}://{address.netloc}{path if path.endswith(_PATH) else path + _PATH}")
    if environ.get("OTEL_METRICS_EXPORTER", "otlp").strip() == "none" or _named(environ) is None:
        return None
    protocol = next((environ[name] for name in PROTOCOL_VARIABLES if environ.get(name)), "grpc")
    if protocol not in _PROTOCOLS:
        raise UserError(
            f"{protocol[:40]!r} in {' or '.join(PROTOCOL_VARIABLES)} is not spoken here: set {', '.join(_PROTOCOLS)}"
        )
    return Telemetry(_PROTOCOLS[protocol])


def check_own(settings: Settings, environ: Mapping[str, str] = os.environ) -> None:
    """Raises UserError where the collector would send its own metrics to itself: each export would be a request that
    the next one counts, for ever."""
    if settings.telemetry is None:
        return
    name, text = _named(environ) or ("", "")
    if settings.telemetry.endpoint is not None:
        name, text = "--telemetry-endpoint", settings.telemetry.endpoint
    address = _address(name, text if "://" in text else f"http://{text}", ("http", "https"))
    port = address.port or _PORTS[address.scheme]
    if port in (settings.port, settings.http_port) and _is_here(address.hostname or "", port):
        raise UserError(
            f"{name} is this collector itself (port {port}), which would count its own metrics as requests for ever:"
            " name another collector, or unset it and read them at --admin-port"
        )


def _named(environ: Mapping[str, str]) -> tuple[str, str] | None:
    return next(((name, environ[name]) for name in ENDPOINT_VARIABLES if environ.get(name)), None)


def _address(name: str, text: str, schemes: tuple[str, ...]) -> SplitResult:
    found = urlsplit(text)
    try:
        valid = found.scheme in schemes and bool(found.hostname) and found.port != 0
    except ValueError:
        valid = False
    if not valid or found.username or found.query or found.fragment:
        # Not the text itself: a person may have put a password in it.
        raise UserError(
            f"{name} is no address: write {', '.join(f'{s}://host:port' for s in schemes)}; credentials belong into"
            " OTEL_EXPORTER_OTLP_HEADERS"
        )
    return found


def _is_here(host: str, port: int) -> bool:
    """Whether a name is this machine: only an address of its own can be bound."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return False  # who cannot be found is told by the exporter, again and again
    for family, kind, _, _, address in found:
        with socket.socket(family, kind) as probe:
            try:
                probe.bind((address[0], 0, *address[2:]))
            except OSError:
                continue
            return True
    return False
