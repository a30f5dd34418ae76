"""`tallymark serve`: the collector in the foreground."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final

import typer

from tallymark_collector import application
from tallymark_collector.access import Authenticator
from tallymark_collector.access.listening import is_loopback
from tallymark_collector.cli import logs, observing, opening, output, receiving, worker
from tallymark_collector.cli.arguments import (
    DatabaseOption,
    MetersOption,
    NoRedactionOption,
    RedactOption,
    read_meters,
    redaction_of,
)
from tallymark_collector.cli.redaction import shown
from tallymark_collector.errors import UserError
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.processes import collecting, descriptors, parent
from tallymark_collector.processes.workers import Worker
from tallymark_collector.receivers.server import Server
from tallymark_collector.settings import (
    DATABASE_TIMEOUT,
    DEFAULT_PORT,
    DEFAULT_TENANT,
    Compression,
    Limits,
    Retention,
    Settings,
    TlsFiles,
)

MAX_PROCESSES: Final = 64
MIN_KEPT_DAYS: Final = 7
"""Less would set aside what clients have kept over a weekend without the collector."""


def serve(
    database: DatabaseOption = None,
    host: Annotated[
        str,
        typer.Option(
            envvar="TALLYMARK_HOST", help="Address to listen on; beyond this machine only once a token has been made."
        ),
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
    keep_unfinalized: Annotated[
        bool,
        typer.Option(
            "--keep-unfinalized/--drop-unfinalized",
            envvar="TALLYMARK_KEEP_UNFINALIZED",
            help="Of tenants that finalise invoices: keep raw points until their period is finalised.",
        ),
    ] = True,
    keep_unsettled: Annotated[
        bool,
        typer.Option(
            "--keep-unsettled/--drop-unsettled",
            envvar="TALLYMARK_KEEP_UNSETTLED",
            help="Keep raw points while the quarantine has open items of their time that could still be billed.",
        ),
    ] = True,
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
    database_timeout: Annotated[
        float,
        typer.Option(
            envvar="TALLYMARK_DATABASE_TIMEOUT",
            min=1.0,
            metavar="SECONDS",
            help="A write that takes longer is given up and its client told to try again: the connection is lost.",
        ),
    ] = DATABASE_TIMEOUT,
    forward_to: receiving.ForwardToOption = None,
    forward_dir: receiving.ForwardDirOption = None,
    forward_limit: receiving.ForwardLimitOption = 1024,
    forward_compression: receiving.ForwardCompressionOption = Compression.GZIP,
    forward_tenant: receiving.ForwardTenantOption = DEFAULT_TENANT,
    max_connection_age: receiving.MaxAgeOption = receiving.DEFAULTS.max_age,
    max_connection_age_grace: receiving.MaxAgeGraceOption = receiving.DEFAULTS.max_age_grace,
    keepalive: receiving.KeepaliveOption = receiving.DEFAULTS.keepalive,
    no_api: receiving.NoApiOption = False,
    reflection: receiving.ReflectionOption = False,
    admin_host: observing.AdminHostOption = "127.0.0.1",
    admin_port: observing.AdminPortOption = None,
    no_admin: observing.NoAdminOption = False,
    telemetry_endpoint: observing.TelemetryOption = None,
    log_format: logs.FormatOption = logs.LogFormat.TEXT,
    log_level: logs.LevelOption = logs.LogLevel.INFO,
    processes: Annotated[
        int,
        typer.Option(
            envvar="TALLYMARK_PROCESSES", min=1, max=MAX_PROCESSES, help="Processes that share the ports. Needs Linux."
        ),
    ] = 1,
    meters: MetersOption = None,
    redact: RedactOption = None,
    no_redaction: NoRedactionOption = False,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            envvar="TALLYMARK_TLS_CERT",
            metavar="FILE",
            show_default="no TLS",
            help="The server's certificate and its chain, PEM. Read again when it changes.",
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(envvar="TALLYMARK_TLS_KEY", metavar="FILE", show_default="none", help="Its key, PEM."),
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="TALLYMARK_TLS_CLIENT_CA",
            metavar="FILE",
            show_default="none",
            help="Clients need a certificate from these authorities, PEM.",
        ),
    ] = None,
    allow_anonymous: Annotated[
        bool,
        typer.Option(
            "--allow-anonymous",
            envvar="TALLYMARK_ALLOW_ANONYMOUS",
            help=f"Take requests without a credential, as the tenant {DEFAULT_TENANT!r}'s, from wherever they come.",
        ),
    ] = False,
    points_per_second: Annotated[
        float | None,
        typer.Option(
            envvar="TALLYMARK_POINTS_PER_SECOND",
            min=0.001,
            show_default="no limit",
            help="Of each tenant without a limit of its own; more is refused, to be sent again later.",
        ),
    ] = None,
    new_streams_per_hour: Annotated[
        float | None,
        typer.Option(
            envvar="TALLYMARK_NEW_STREAMS_PER_HOUR",
            min=1,
            show_default="no limit",
            help="The same for streams that were never seen; the points of more are set aside.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="When ready, write one line of JSON to stdout.")] = False,
) -> None:
    """Take OTLP over gRPC and HTTP, until SIGTERM or Ctrl-C; requests under way are finished first.

    Makes and migrates the database where that is needed and its user owns it.
    """
    how = logs.Logs(log_format, log_level, names_process=processes > 1)
    logs.start(how)
    retention = Retention(
        points=_days(keep_points),
        evidence=_days(keep_evidence),
        keep_unfinalized=keep_unfinalized,
        keep_unsettled=keep_unsettled,
        columnstore_after=_days(columnstore_after),
    )
    http = receiving.http_port(http_port, off=no_http, grpc_port=port)
    settings = Settings(
        database=opening.named(database),
        owner_database=None if owner_database is None else opening.named(owner_database, opening.OWNER_DATABASE),
        host=address(host),
        port=port,
        database_timeout=database_timeout,
        http_port=http,
        admin_host=admin_host,
        admin_port=observing.admin_port(admin_port, off=no_admin, port=port, http_port=http),
        telemetry=observing.telemetry(telemetry_endpoint),
        api=not no_api,
        reflection=reflection,
        tls=tls_files(tls_cert, tls_key, tls_client_ca),
        allow_anonymous=allow_anonymous,
        limits=Limits(
            times=retention.times(),
            points_per_second=points_per_second,
            new_streams_per_hour=new_streams_per_hour,
        ),
        connections=receiving.connections(max_connection_age, max_connection_age_grace, keepalive),
        retention=retention,
        forwarding=receiving.forwarding(
            forward_to, forward_dir, forward_limit, tenant=forward_tenant, compression=forward_compression
        ),
        meters=None if meters is None else read_meters(meters),
        redaction=redaction_of(redact, off=no_redaction),
    )
    receiving.check_loop(settings)
    observing.check_own(settings)
    settings, remark = descriptors.fitted(settings, descriptors.raised())
    if remark:
        output.warn(remark)
    if no_redaction:
        output.warn("--no-redaction: what clients send is stored as it comes, credentials in attributes and URLs too")
    if not is_loopback(host):
        if allow_anonymous:
            output.warn(
                f"listening on {host} with --allow-anonymous: whoever reaches this port can write usage of any account"
                f" of the tenant {DEFAULT_TENANT!r}"
            )
        if settings.tls is None:
            output.warn(
                f"listening on {host} without TLS: tokens travel in clear. Give --tls-cert and --tls-key, or let a"
                " proxy end TLS before this port"
            )

    starting = ExitStack()

    def tell(ports: Settings, guarded: bool, workers: Sequence[Worker] = ()) -> None:
        starting.close()
        if as_json:
            output.write_json_line(_ready_line(ports, guarded, workers))
            return
        output.tell(_ready_sentence(ports, workers))
        if not (guarded or allow_anonymous):
            output.tell(
                "no credential has been made: whoever is on this machine can write usage, and nobody else reaches it;"
                " `tallymark tokens create --tenant … --scope write` makes the first token"
            )

    async def ready(server: Server, _: Pipeline, authenticator: Authenticator) -> None:
        ports = replace(settings, port=server.port, http_port=server.http_port, admin_port=server.admin_port)
        tell(ports, await authenticator.needs_credentials())

    async def all_ready(ports: Settings, workers: Sequence[Worker], authenticator: Authenticator) -> None:
        tell(ports, await authenticator.needs_credentials(), workers)

    collecting.seldom()
    with starting:
        starting.enter_context(output.progress("starting"))
        if processes == 1:
            asyncio.run(application.serve(settings, ready))
        else:
            asyncio.run(
                parent.serve(settings, processes, worker.COMMAND, lambda told: worker.work(told, how), all_ready)
            )


def _ready_line(ports: Settings, guarded: bool, workers: Sequence[Worker]) -> dict[str, object]:
    line: dict[str, object] = {
        "host": ports.host,
        "port": ports.port,
        "http_port": ports.http_port,
        "admin_port": ports.admin_port,
        "pid": os.getpid(),
        "database": shown(ports.database),
        "tls": ports.tls is not None,
        "anonymous": not guarded,
    }
    if workers:
        line["processes"] = [{"pid": one.pid, "admin_port": one.admin_port} for one in workers]
    return line


def _ready_sentence(ports: Settings, workers: Sequence[Worker]) -> str:
    http = "" if ports.http_port is None else f" and, over HTTP, {ports.host}:{ports.http_port}"
    admin = "" if ports.admin_port is None else f", health and metrics on {ports.admin_host}:{ports.admin_port}"
    over = " with TLS" if ports.tls is not None else ""
    by = f" by {len(workers)} processes" if workers else ""
    return f"listening on {ports.host}:{ports.port}{http}{over}{by}{admin}, database {shown(ports.database)}"


def _days(number: int | None) -> timedelta | None:
    return None if number is None else timedelta(days=number)


def address(host: str) -> str:
    """The host as gRPC takes it: an IPv6 address in brackets. Raises UserError."""
    if not host.strip():
        raise UserError("--host is empty: give an address such as 127.0.0.1, or leave it out")
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def tls_files(certificate: Path | None, key: Path | None, client_authority: Path | None) -> TlsFiles | None:
    """The files that were named. Raises UserError where some are lacking."""
    if certificate is not None and key is not None:
        return TlsFiles(certificate, key, client_authority)
    given = {"--tls-cert": certificate, "--tls-key": key, "--tls-client-ca": client_authority}
    if any(given.values()):
        lacking = [name for name in ("--tls-cert", "--tls-key") if given[name] is None]
        named = next(name for name, path in given.items() if path is not None)
        raise UserError(f"{named} is given and {' and '.join(lacking)} not: TLS takes a certificate and its key")
    return None
