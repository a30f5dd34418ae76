"""`serve`'s options of how requests come in and where they are sent on to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import unquote

import typer

from tallymark_collector.errors import UserError
from tallymark_collector.forwarding.hops import endpoint_of
from tallymark_collector.settings import (
    DEFAULT_HTTP_PORT,
    DEFAULT_TENANT,
    Compression,
    Connections,
    Forwarding,
    Settings,
)

HEADERS_VARIABLE: Final = "TALLYMARK_FORWARD_HEADERS"
MEBIBYTE: Final = 1024 * 1024
DEFAULTS: Final = Connections()

HttpPortOption = Annotated[
    int | None,
    typer.Option(
        envvar="TALLYMARK_HTTP_PORT",
        min=0,
        max=65535,
        show_default=f"{DEFAULT_HTTP_PORT}; where --port is 0, a free one",
        help="Port of OTLP over HTTP; 0 takes a free one.",
    ),
]
NoHttpOption = Annotated[bool, typer.Option("--no-http", envvar="TALLYMARK_NO_HTTP", help="No OTLP over HTTP.")]
NoApiOption = Annotated[
    bool,
    typer.Option("--no-api", envvar="TALLYMARK_NO_API", help="Answer no questions over gRPC, whoever asks."),
]
ReflectionOption = Annotated[
    bool, typer.Option("--reflection", envvar="TALLYMARK_REFLECTION", help="Offer gRPC's server reflection.")
]
MaxAgeOption = Annotated[
    float,
    typer.Option(
        envvar="TALLYMARK_MAX_CONNECTION_AGE",
        min=1,
        metavar="SECONDS",
        help="Close a connection of that age, so that behind a balancer clients move on.",
    ),
]
MaxAgeGraceOption = Annotated[
    float,
    typer.Option(
        envvar="TALLYMARK_MAX_CONNECTION_AGE_GRACE",
        min=1,
        metavar="SECONDS",
        help="What calls under way on it get to finish.",
    ),
]
KeepaliveOption = Annotated[
    float,
    typer.Option(
        envvar="TALLYMARK_KEEPALIVE",
        min=1,
        metavar="SECONDS",
        help="Ask a silent gRPC client after so long whether it is there.",
    ),
]
ForwardToOption = Annotated[
    str | None,
    typer.Option(
        envvar="TALLYMARK_FORWARD_TO",
        metavar="ENDPOINT",
        show_default="nowhere",
        help="Send what was acknowledged on to grpc://host:port, grpcs://…, http://… or https://…"
        f" {HEADERS_VARIABLE} (k=v,k=v) is sent along.",
    ),
]
ForwardDirOption = Annotated[
    Path | None,
    typer.Option(
        envvar="TALLYMARK_FORWARD_DIR",
        metavar="FOLDER",
        show_default=False,
        help="Keeps what is to be sent on until it is acknowledged there.",
    ),
]
ForwardCompressionOption = Annotated[
    Compression,
    typer.Option(envvar="TALLYMARK_FORWARD_COMPRESSION", help="How requests are sent on."),
]
ForwardTenantOption = Annotated[
    str,
    typer.Option(
        envvar="TALLYMARK_FORWARD_TENANT",
        metavar="TENANT",
        help="Whose requests are sent on: there they are one tenant's, whoever's they were here.",
    ),
]
ForwardLimitOption = Annotated[
    int,
    typer.Option(
        envvar="TALLYMARK_FORWARD_LIMIT",
        min=1,
        metavar="MIB",
        help="What that folder may hold; past it the oldest requests are dropped and counted.",
    ),
]


def http_port(given: int | None, *, off: bool, grpc_port: int) -> int | None:
    """The port of OTLP over HTTP; None for none. Raises UserError."""
    if off:
        if given is not None:
            raise UserError("--no-http and --http-port contradict each other: leave one out")
        return None
    if given is None:
        return 0 if grpc_port == 0 else DEFAULT_HTTP_PORT
    if given == grpc_port != 0:
        raise UserError(f"--http-port {given} is the port of gRPC, too: give it another one")
    return given


def connections(max_age: float, grace: float, keepalive: float) -> Connections:
    """How long gRPC connections live."""
    return Connections(max_age=max_age, max_age_grace=grace, keepalive=keepalive)


def forwarding(
    endpoint: str | None,
    folder: Path | None,
    limit_mib: int,
    environ: Mapping[str, str] = os.environ,
    *,
    tenant: str = DEFAULT_TENANT,
    compression: Compression = Compression.GZIP,
) -> Forwarding | None:
    """Where acknowledged requests are sent on to. Raises UserError."""
    if endpoint is None:
        if folder is not None:
            raise UserError("--forward-dir without --forward-to: say where to send it")
        return None
    if folder is None:
        raise UserError("--forward-to needs --forward-dir, a folder that keeps what was not taken there yet")
    endpoint_of(endpoint)
    headers = _headers(environ.get(HEADERS_VARIABLE, ""))
    return Forwarding(endpoint, folder, headers, max_bytes=limit_mib * MEBIBYTE, compression=compression, tenant=tenant)


def check_loop(settings: Settings) -> None:
    """Raises UserError where a collector would forward to itself, each request for ever."""
    if settings.forwarding is None:
        return
    address = endpoint_of(settings.forwarding.endpoint)
    own = {settings.host.strip("[]"), "localhost", "127.0.0.1", "::1"}
    if address.hostname in own and address.port in (settings.port, settings.http_port):
        raise UserError(f"--forward-to port {address.port} of {address.hostname} is this collector itself")


def _headers(text: str) -> tuple[tuple[str, str], ...]:
    """As OTEL_EXPORTER_OTLP_HEADERS has it. What is wrong is told without the values: they may be credentials."""
    found = []
    for number, item in enumerate(text.split(","), 1):
        if not item.strip():
            continue
        key, is_there, value = (part.strip() for part in item.partition("="))
        name, decoded = key.lower(), unquote(value)
        valid_name = name and name.isascii() and all(c.isalnum() or c in "-_." for c in name)
        if not is_there or not valid_name or not (decoded.isascii() and decoded.isprintable()):
            raise UserError(f"item {number} of {HEADERS_VARIABLE} is not key=value in printable ASCII")
        found.append((name, decoded))
    return tuple(found)
