"""What is written and where: results to stdout as a table, JSON or CSV; sentences and progress to stderr.

Names in usage are whatever some client sent. They are shown as they are: never read as markup, and without the
power to steer a terminal.
"""

from __future__ import annotations

import csv
import enum
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from decimal import Decimal
from typing import Final, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tallymark_collector.billing.money import grouped, plain
from tallymark_collector.cli import logs
from tallymark_collector.cli.redaction import redact

_PIPE_WIDTH: Final = 10_000
"""Columns where there is no terminal: a table is as wide as its content and no number is cut."""


Saying: TypeAlias = Callable[[str], None]
"""Changes the text beside a spinner."""


class Format(str, enum.Enum):
    """How rows are written."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would exit by itself; how a command ends is decided in one place."""
        raise  # noqa: PLE0704 - called while BrokenPipeError is handled


def say(text: str) -> None:
    """A line of the result, for people."""
    _print(text, style="", stderr=False)


def tell(text: str) -> None:
    """A sentence beside the result."""
    _remark(logging.INFO, text)


def warn(text: str) -> None:
    """Something that a person should know though the command went on."""
    _remark(logging.WARNING, text)


def fail(text: str) -> None:
    """Why a command ended, in one sentence."""
    _remark(logging.ERROR, text)


def interactive() -> bool:
    """True if a person watches; in a pipe, progress and remarks stay away."""
    return sys.stderr.isatty()


@contextmanager
def progress(text: str) -> Iterator[Saying]:
    """A spinner with a text that may change, on a terminal only."""
    if not interactive():
        yield lambda _: None
        return
    with Console(stderr=True).status(Text(visible(text))) as status:
        yield lambda now: status.update(Text(visible(now)))


def write_json(value: object) -> None:
    """One JSON document. Numbers that must stay exact are text in it."""
    sys.stdout.write(json.dumps(value, indent=2, default=json_value) + "\n")


def write_json_line(value: object) -> None:
    """One JSON document on one line, at once: a program waits for it."""
    sys.stdout.write(json.dumps(value, default=json_value) + "\n")
    sys.stdout.flush()


def write_rows(
    format_: Format, columns: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[str] = ()
) -> None:
    """Rows in any format; `numbers` are the columns that are aligned to the right in a table."""
    match format_:
        case Format.JSON:
            write_json([dict(zip(columns, row, strict=True)) for row in rows])
        case Format.CSV:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(["" if value is None else json_value(value) for value in row] for row in rows)
        case Format.TABLE:
            write_table(columns, rows, numbers)


def write_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    numbers: Sequence[str] = (),
    footer: Sequence[object] = (),
) -> None:
    """A table. Text folds where the terminal is too narrow; nothing is cut off."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, show_footer=bool(footer))
    for place, name in enumerate(columns):
        number = name in numbers
        table.add_column(
            Text(visible(name)),
            Text(_cell(footer[place])) if footer else "",
            justify="right" if number else "left",
            no_wrap=number,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    _console(stderr=False).print(table)


def write_facts(facts: Mapping[str, object]) -> None:
    """Names and values, one a line."""
    width = max(map(len, facts))
    for name, value in facts.items():
        say(f"{name.ljust(width)}  {_cell(value)}")


def json_value(value: object) -> object:
    """Decimals as text in plain digits, instants as ISO 8601 ending in Z."""
    match value:
        case Decimal():
            return plain(value)
        case datetime():
            return iso(value)
        case _:
            return value


def iso(instant: datetime) -> str:
    """ISO 8601 in UTC, ending in Z."""
    return instant.astimezone(timezone.utc).isoformat().replace("+00:00", "Z")


def visible(text: str) -> str:
    """The text with characters that are not seen, or that steer a terminal, written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case Decimal():
            return grouped(value)
        case datetime():
            return iso(value)
        case _:
            return visible(str(value))


_REMARKS: Final = {logging.INFO: ("", ""), logging.WARNING: ("warning: ", "yellow"), logging.ERROR: ("error: ", "red")}


def _remark(level: int, text: str) -> None:
    if logs.as_json():
        logs.write(level, text)
        return
    before, style = _REMARKS[level]
    _print(before + text, style=style, stderr=True)


def _print(text: str, *, style: str, stderr: bool) -> None:
    shown = visible(re.sub(r"\s*[\r\n]\s*", "; ", redact(text).strip()))
    _console(stderr=stderr).print(Text(shown, style=style), soft_wrap=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return _Console(stderr=stderr, width=None if stream.isatty() else _PIPE_WIDTH)
