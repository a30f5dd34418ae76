"""`tallymark meters`: what a file of meters says, and what captured telemetry would bill by it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from tallymark_collector.access.records import check_name
from tallymark_collector.cli import output
from tallymark_collector.cli.arguments import JsonOption, TenantOption, read_meters
from tallymark_collector.errors import UserError
from tallymark_collector.metering.captured import Reading, read_captured
from tallymark_collector.metering.conditions import Condition
from tallymark_collector.metering.explain import Explained, explain
from tallymark_collector.metering.rules import Meter, MetricSource, Number, Rules, Source
from tallymark_collector.quarantine.reading import time_text
from tallymark_collector.settings import DEFAULT_TENANT

commands = typer.Typer(
    no_args_is_help=True, help="Check the file that says which telemetry is usage, on telemetry that was captured."
)

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The file of meters, in YAML.")]
CapturedArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="CAPTURED...",
        help="OTLP as the OpenTelemetry Collector's file exporter writes it, JSON or protobuf; - is stdin.",
    ),
]

STDIN: Final = Path("-")
MAX_GROUPS: Final = 50
"""Lines of the table of what did not count; --json has every item."""


@commands.command(name="list")
def list_(file: FileArgument, as_json: JsonOption = False) -> None:
    """Show what a file says: each meter, and each source of it. Exit status 1 if anything is wrong with the file."""
    rules = read_meters(file)
    if as_json:
        output.write_json({"file": str(file), "meters": {name: _document(one) for name, one in rules.meters.items()}})
        return
    rows = [
        [*((name, meter.unit, meter.aggregation) if place == 0 else ("", "", "")), *_row(source)]
        for name, meter in rules.meters.items()
        for place, source in enumerate(meter.sources)
    ]
    output.write_table(["meter", "unit", "aggregation", "source", "quantity", "where", "account", "dimensions"], rows)


@commands.command()
def check(
    file: FileArgument,
    captured: CapturedArgument,
    tenant: TenantOption = DEFAULT_TENANT,
    as_json: JsonOption = False,
) -> None:
    """Say what captured telemetry of a tenant would bill, and why each point and span would or would not count.

    Nothing is stored. Exit status 1 if the file is wrong, or anything would go to quarantine.
    """
    rules = read_meters(file)
    check_name(tenant)
    with output.progress("reading"):
        files = [_read(path) for path in captured]
        requests = [one for file in files for one in file.requests]
        explained = explain(rules, requests, tenant)
    torn = [file.torn for file in files if file.torn is not None]
    for sentence in torn:
        output.warn(sentence)
    if as_json:
        _write_json(tenant, explained, torn)
    else:
        _write(rules, tenant, explained, len(requests))
    if explained.quarantined:
        raise typer.Exit(1)


def _read(path: Path) -> Reading:
    if path == STDIN:
        return read_captured(sys.stdin.buffer.read(), "stdin")
    try:
        return read_captured(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _write(rules: Rules, tenant: str, explained: Explained, requests: int) -> None:
    if explained.usage:
        columns = ["meter", "unit", "account", "quantity", "points"]
        output.write_table(columns, explained.usage, numbers=["quantity", "points"])
    if explained.levels:
        columns = ["meter", "unit", "account", "level", "streams", "points"]
        output.write_table(columns, explained.levels, numbers=["level", "streams", "points"])
    silent = [name for name in rules.meters if name not in {item.meter for item in explained.items}]
    rest = Counter(
        (item.outcome, item.signal, item.name, item.why)
        for item in explained.items
        if item.outcome not in ("counted", "level")
    )
    if rest:
        columns = ["outcome", "signal", "name", "items", "why"]
        shown = list(rest.items())[:MAX_GROUPS]
        rows = [[outcome, signal, name, number, why] for (outcome, signal, name, why), number in shown]
        output.write_table(columns, rows, numbers=["items"])
        if len(rest) > len(shown):
            output.say(f"and {len(rest) - len(shown):,} more reasons; --json has every item")
    for meter, streams, quantity, oldest in explained.whole:
        output.say(
            f"meter {meter}: {streams:,} running totals are billed whole, {output.json_value(quantity)}, all since"
            f" {time_text(oldest)}; where that was counted before you bill it, say `since`"
        )
    own = rules.of(tenant).meters
    for name in silent:
        why = "nothing here fits any of its sources" if name in own else f"none of its sources is tenant {tenant}'s"
        output.say(f"meter {name}: {why}")
    counts = Counter(item.outcome for item in explained.items)
    counted, levels, base, quarantined = (counts[each] for each in ("counted", "level", "base", "quarantined"))
    output.say(
        f"tenant {tenant}: requests {requests:,}, counted {counted:,}, {f'levels {levels:,}, ' if levels else ''}"
        f"duplicates {explained.duplicates:,}, quarantined {quarantined:,}, {f'base {base:,}, ' if base else ''}"
        f"passed over {counts.total() - counted - levels - base - quarantined:,}"
    )


def _write_json(tenant: str, explained: Explained, torn: list[str]) -> None:
    output.write_json(
        {
            "tenant": tenant,
            "usage": [line._asdict() for line in explained.usage],
            "levels": [line._asdict() for line in explained.levels],
            "duplicates": explained.duplicates,
            "whole": [{**one._asdict(), "oldest": time_text(one.oldest)} for one in explained.whole],
            "quarantined": len(explained.quarantined),
            "torn": torn,
            "items": [item._asdict() for item in explained.items],
        }
    )


def _row(source: Source) -> list[str]:
    name = source.metric.text if isinstance(source, MetricSource) else source.span.text
    asked = [
        *([f"tenant {' or '.join(source.tenants)}"] if source.tenants else []),
        *([f"scope {_globs(source.scope)}"] if source.scope else []),
        *(_asked(source.resource, "resource's ")),
        *(_asked(source.where, "")),
    ]
    if not isinstance(source, MetricSource):
        asked += [f"kind {' or '.join(source.kind)}"] if source.kind else []
        asked += [f"status {' or '.join(source.status)}"] if source.status else []
        asked += ["also sampled"] if source.sampled else []
    quantity = source.quantity.attribute if isinstance(source.quantity, Number) else source.quantity
    by = f" * {output.json_value(source.factor)}" if source.factor is not None else ""
    return [
        f"{'metric' if isinstance(source, MetricSource) else 'span'} {name}",
        f"{quantity}{by}",
        ", ".join(asked),
        " or ".join(map(str, source.account)),
        ", ".join(new if new == str(old) else f"{new} from {old}" for new, old in source.dimensions.items()),
    ]


def _asked(conditions: dict[str, Condition], prefix: str) -> list[str]:
    return [f"{prefix}{name}: {one.written}" for name, one in conditions.items()]


def _globs(globs: tuple[Any, ...]) -> str:
    return " or ".join(glob.text for glob in globs)


def _document(meter: Meter) -> dict[str, object]:
    names = ("source", "quantity", "where", "account", "dimensions")
    return {
        "unit": meter.unit,
        "aggregation": meter.aggregation,
        "sources": [dict(zip(names, _row(source), strict=True)) for source in meter.sources],
    }
