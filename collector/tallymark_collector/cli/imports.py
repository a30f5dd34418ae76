"""`tallymark import`: access logs and events out of files, each line billed once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tallymark_collector.access import records
from tallymark_collector.cli import opening, output
from tallymark_collector.cli.arguments import (
    DatabaseOption,
    JsonOption,
    NoRedactionOption,
    RedactOption,
    TenantOption,
    day_or_instant,
    redaction_of,
)
from tallymark_collector.errors import TransientError, UserError
from tallymark_collector.imports.importer import Request, Watching, run
from tallymark_collector.imports.lines import Input
from tallymark_collector.imports.mapping import Mapping, mapping_of, read_mapping
from tallymark_collector.imports.rehearsal import rehearse
from tallymark_collector.imports.summary import Summary
from tallymark_collector.model import Series, attributes_json
from tallymark_collector.settings import DEFAULT_TENANT
from tallymark_collector.store import rows

_LOG_EVERY: Final = 500_000
"""Lines between two messages where no terminal shows a bar."""

_METER: Final = re.compile(r"(?P<meter>[^:=]+)(?::(?P<unit>[^=]+))?(?:=(?P<field>.+))?")

FilesArgument = Annotated[
    list[str], typer.Argument(metavar="FILE...", help="Files, also compressed by gzip; - is stdin.")
]
SourceOption = Annotated[
    str,
    typer.Option("--source", metavar="NAME", help="Where the lines come from, e.g. web-1: lines are told apart in it."),
]
MappingOption = Annotated[
    Path | None,
    typer.Option("--mapping", metavar="FILE", help="What a line bills, in YAML; instead of the options below."),
]
FormatOption = Annotated[str | None, typer.Option("--format", metavar="FORMAT", help="combined, common, json or csv.")]
AccountOption = Annotated[str | None, typer.Option("--account", metavar="FIELD", help="The field with the account.")]
MeterOption = Annotated[
    list[str] | None,
    typer.Option("--meter", metavar="NAME[:UNIT][=FIELD]", help="A meter: 1 a line, or a field's number."),
]
OldestOption = Annotated[
    str | None, typer.Option("--oldest", metavar="TIME", help="Take lines from this day or time on, however old.")
]


def import_(
    files: FilesArgument,
    source: SourceOption,
    database: DatabaseOption = None,
    tenant: TenantOption = DEFAULT_TENANT,
    mapping: MappingOption = None,
    format_: FormatOption = None,
    account: AccountOption = None,
    meter: MeterOption = None,
    time_field: Annotated[str | None, typer.Option("--time", metavar="FIELD", help="The field with the time.")] = None,
    time_format: Annotated[
        str | None, typer.Option("--time-format", metavar="FORMAT", help="iso8601, unix_s, unix_ms, clf or a pattern.")
    ] = None,
    time_zone: Annotated[
        str | None, typer.Option("--time-zone", metavar="ZONE", help="Of times that name none, e.g. Europe/Zurich.")
    ] = None,
    id_: Annotated[str | None, typer.Option("--id", metavar="FIELD", help="The field with the event's id.")] = None,
    oldest: OldestOption = None,
    redact: RedactOption = None,
    no_redaction: NoRedactionOption = False,
    final: Annotated[bool, typer.Option("--final", help="Take a last line that has no line end.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Bill a file for this source that another source has billed, too.")
    ] = False,
    rejects: Annotated[bool, typer.Option("--rejects", help="The files are reject files, mended.")] = False,
    rejects_file: Annotated[
        Path | None,
        typer.Option("--rejects-file", metavar="PATH", show_default="FILE.rejects", help="Where rejects go."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what the first lines would bill; no database.")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", min=1, help="How many lines of each file --dry-run reads.")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Import usage from access logs and files of events; the same file again, or a grown one, bills once.

    Exit status 1 if lines were rejected, contradict what is there, or wait behind a quote that is never closed.
    """
    request = Request(
        source,
        _mapping(mapping, format_, account, meter, time_field, time_format, time_zone, id_),
        final=final,
        oldest=None if oldest is None else _instant(oldest),
        again=again,
        of_rejects=rejects,
        rejects_file=rejects_file,
        tenant=records.check_name(tenant),
        redaction=redaction_of(redact, off=no_redaction),
    )
    if dry_run:
        _rehearse(request, files, lines, as_json)
        return
    try:
        summary = asyncio.run(_import(opening.named(database), request, files))
    except TransientError as error:
        output.fail(f"{error}; what was read before is kept, run the same command again")
        raise typer.Exit(3) from None
    _write(request, summary, as_json)
    if summary.rejected or summary.conflicts or summary.quarantined or summary.unclosed:
        raise typer.Exit(1)


def _mapping(
    file: Path | None,
    format_: str | None,
    account: str | None,
    meters: list[str] | None,
    time_field: str | None,
    time_format: str | None,
    time_zone: str | None,
    id_: str | None,
) -> Mapping:
    options = {"--format": format_, "--account": account, "--meter": meters, "--time": time_field}
    options |= {"--time-format": time_format, "--time-zone": time_zone, "--id": id_}
    given = [name for name, value in options.items() if value]
    if file is not None:
        if given:
            raise UserError(f"--mapping says all that a line bills: leave out {', '.join(given)}")
        try:
            return read_mapping(file)
        except OSError as error:
            raise UserError(f"the mapping {file} cannot be read: {error.strerror or error}") from None
    if format_ is None:
        raise UserError("say what a line bills: --mapping FILE, or --format and --account; see docs/import.md")
    time = {"field": time_field or ("time" if format_ in ("combined", "common") else None)}
    time |= {"format": time_format or ("clf" if format_ in ("combined", "common") else None), "time_zone": time_zone}
    data: dict[str, Any] = {"format": format_, "account": account, "id": id_}
    data["time"] = (
        {name: value for name, value in time.items() if value} if any((time_field, time_format, time_zone)) else None
    )
    data["meters"] = [_meter(text) for text in meters or ()] or None
    return mapping_of({name: value for name, value in data.items() if value is not None})


def _meter(text: str) -> dict[str, str]:
    found = _METER.fullmatch(text)
    if found is None:
        raise UserError(f"--meter {text!r} is not like api.requests, egress:By=bytes or llm.tokens:{{token}}=tokens")
    return {name: value for name, value in found.groupdict().items() if value is not None}


def _instant(text: str) -> datetime:
    found = day_or_instant(text, "--oldest")
    if isinstance(found, datetime):
        return found
    assert isinstance(found, date), "the only other one"
    return datetime(found.year, found.month, found.day, tzinfo=timezone.utc)


async def _import(database: str, request: Request, files: list[str]) -> Summary:
    async with opening.opened(database) as store:
        async with store.reading() as connection:
            # What was billed stays billed: a name that nobody has made is a slip, until somebody makes it.
            await records.check_tenant(connection, request.tenant, f"`tallymark tenants set {request.tenant}` makes it")
        with _watching() as watching:
            return await run(store, request, files, watching)


@contextmanager
def _watching() -> Iterator[Watching]:
    """A bar on a terminal, a line now and then elsewhere."""
    if not output.interactive():
        logged = 0

        def log(source: Input, lines: int) -> None:
            nonlocal logged
            if lines // _LOG_EVERY > logged:
                output.tell(f"{source.name}: {lines:,} lines")
            logged = lines // _LOG_EVERY

        yield Watching(note=output.tell, went_on=log)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[lines]:,} lines"), console=Console(stderr=True)) as bar:
        tasks = {}

        def opened(source: Input) -> None:
            tasks[source.name] = bar.add_task(
                output.visible(Path(source.name).name), total=source.size or None, lines=0
            )

        def went_on(source: Input, lines: int) -> None:
            bar.update(tasks[source.name], completed=source.position(), lines=lines)

        yield Watching(note=output.tell, opened=opened, went_on=went_on)


def _write(request: Request, summary: Summary, as_json: bool) -> None:
    if as_json:
        output.write_json({**request.origin._asdict(), **summary.told()})
    else:
        _write_summary(request, summary)
    _warn_of_left(summary)
    if summary.rejected and not as_json:
        where = request.rejects_file or "the file's name with .rejects behind it"
        output.tell(f"rejected lines are in {where}: mend their `text` and import that with --rejects")


def _warn_of_left(summary: Summary) -> None:
    for each in summary.unclosed:
        output.warn(
            f"{each.file}:{each.line}: a quote opens a field and is never closed, so {each.lines:,} whole lines from"
            " there on were left. Where nothing more is written, close it or take it out and import again; --final"
            f" rejects line {each.line} and takes the others. Where quotes mean nothing, the mapping says `quote: none`"
        )
    if summary.left > sum(each.lines for each in summary.unclosed):
        output.warn("the last line has no line end, it may still be being written: it was left, --final takes it")


def _write_summary(request: Request, summary: Summary) -> None:
    if summary.totals:
        output.write_table(["account", "meter", "unit", "quantity"], summary.rows(), numbers=("quantity",))
    counts = ", ".join(f"{name} {count:,}" for name, count in summary.counts().items())
    output.say(f"tenant {request.tenant}, source {request.source}: {counts}")
    for reason, count in summary.reasons.most_common():
        output.say(f"rejected {count:,}: {reason}")


def _rehearse(request: Request, files: list[str], limit: int, as_json: bool) -> None:
    found = rehearse(request, files, limit)
    billed = [
        (file, number, line.account, rows.timestamp(line.time_ns), stream.series.meter, value, _shown(stream.series))
        for file, number, line in found.lines
        for stream, value in line.amounts
    ]
    columns = ("file", "line", "account", "time", "meter", "quantity", "dimensions")
    if as_json:
        told = [dict(zip(columns, map(output.json_value, row), strict=True)) for row in billed]
        faults = [{"file": file, "line": number, "reason": reason} for file, number, reason in found.faults]
        output.write_json({**request.origin._asdict(), **found.summary.told(), "first": told, "faults": faults})
    else:
        output.write_table(columns, billed, numbers=("line", "quantity"))
        _write_summary(request, found.summary)
        for file, number, reason in found.faults:
            output.say(f"{file}:{number}: {reason}")
    _warn_of_left(found.summary)
    if found.summary.rejected or found.summary.conflicts or found.summary.unclosed:
        raise typer.Exit(1)


def _shown(series: Series) -> str:
    return attributes_json(series.attributes)
