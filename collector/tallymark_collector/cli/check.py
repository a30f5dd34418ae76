"""`tallymark check`: what a code base meters, and whether its plans price that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from tallymark_collector.billing import CatalogError, read_catalog
from tallymark_collector.cli import output
from tallymark_collector.cli.arguments import JsonOption, MetersOption, read_meters
from tallymark_collector.declarations import Finding, Meter, Severity, compare, meters_of, read_sources, uses_in
from tallymark_collector.declarations.comparison import PlansFile
from tallymark_collector.declarations.mapped import aggregations, uses_of
from tallymark_collector.documents.problems import DocumentError
from tallymark_collector.documents.yaml_text import read_yaml
from tallymark_collector.errors import UserError

_PLACES_SHOWN: Final = 3

PathsArgument = Annotated[
    list[Path] | None, typer.Argument(metavar="[PATH]...", help="Folders and files of Python code.", show_default=".")
]
PlansOption = Annotated[
    Path | None, typer.Option("--plans", metavar="FILE", help="Compare with this file of plans and prices.")
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")]


def check(
    paths: PathsArgument = None,
    plans: PlansOption = None,
    meters: MetersOption = None,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the meters of a code base and say what does not fit: between declarations, and with the file of plans.

    The code is read, not run. Exit status 1 if anything is wrong (with --strict also for a warning).
    """
    try:
        file = None if plans is None else read_plans(plans)
        rules = None if meters is None else read_meters(meters)
    except DocumentError as error:
        if not as_json:
            raise
        rule = "plans" if isinstance(error, CatalogError) else "meters"
        found = [Finding(p.file, p.line, Severity.ERROR, rule, f"{p.field}: {p.message}") for p in error.problems]
        _write_json(0, plans, [], found)
        raise typer.Exit(1) from None
    with output.progress("reading"):
        sources = read_sources(paths or [Path()])
        uses = [use for source in sources.files for use in uses_in(source, sources)]
        uses += [] if rules is None else uses_of(rules)
    recorded, findings = meters_of(uses, file), compare(uses, sources.unreadable, file)
    if rules is not None and file is not None:
        findings += aggregations(rules, file)
    count = len(sources.files) + len(sources.unreadable)
    if as_json:
        _write_json(count, plans, recorded, findings)
    else:
        _write(count, plans, recorded, findings)
    if any(strict or finding.severity is Severity.ERROR for finding in findings):
        raise typer.Exit(1)


def read_plans(path: Path) -> PlansFile:
    """The plans and where their meters stand. Raises CatalogError, UserError."""
    try:
        catalog = read_catalog(path)
        keys = read_yaml(path.read_text("utf-8-sig")).keys
    except OSError as error:
        raise UserError(f"the plans file {path} cannot be read: {error.strerror or error}") from None
    return PlansFile(str(path), catalog, {name: keys["meters", name][0] for name in catalog.meters})


def _write(count: int, plans: Path | None, meters: Sequence[Meter], findings: Sequence[Finding]) -> None:
    if meters:
        columns = ["meter", "unit", "where", *(["plans"] if plans is not None else [])]
        rows = [
            [meter.name, meter.unit or "?", _where(meter), *([", ".join(meter.plans)] if plans is not None else [])]
            for meter in meters
        ]
        output.write_table(columns, rows)
    for finding in findings:
        output.say(str(finding))
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    names = len({meter.name for meter in meters})
    compared = "" if plans is not None else "; compared with no plans, name them by --plans"
    output.say(f"files {count}, meters {names}, errors {errors}, warnings {len(findings) - errors}{compared}")


def _where(meter: Meter) -> str:
    shown = [f"{use.file}:{use.line}" for use in meter.uses[:_PLACES_SHOWN]]
    more = len(meter.uses) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _write_json(count: int, plans: Path | None, meters: Sequence[Meter], findings: Sequence[Finding]) -> None:
    output.write_json(
        {
            "files": count,
            "plans": None if plans is None else str(plans),
            "meters": [
                {
                    "meter": meter.name,
                    "unit": meter.unit,
                    "places": [{"file": use.file, "line": use.line, "call": use.function.value} for use in meter.uses],
                    "plans": list(meter.plans),
                }
                for meter in meters
            ],
            "problems": [asdict(finding) for finding in findings],
        }
    )
