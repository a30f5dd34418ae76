"""From a record's bytes to its fields, by name; every value is text, as it was written."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Final, NamedTuple

from tallymark_collector.errors import UserError
from tallymark_collector.imports import access_log
from tallymark_collector.imports.faults import LineFault

Fields = Callable[[str], "str | None"]
"""A field's text by its name, None where the line has none. Raises LineFault where it is no text or number."""

MAX_TEXT: Final = 4096
"""Characters of a field that is asked for: those of an attribute, see processors/validation."""


def text_of(content: bytes) -> str:
    """The record as text. Raises LineFault."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise LineFault(f"byte {error.start + 1} is not UTF-8") from None
    if "\0" in text:
        raise LineFault("it holds a NUL character")
    return text


def common(text: str) -> Fields:
    """The fields of an access log's line in the Common format. Raises LineFault."""
    return access_log.common(text).get


def combined(text: str) -> Fields:
    """The fields of an access log's line in the Combined format. Raises LineFault."""
    return access_log.combined(text).get


def json_line(text: str) -> Fields:
    """The fields of a JSON object; `a.b` is b inside a, unless a field is called so. Raises LineFault."""
    try:
        found = json.loads(text, parse_float=Decimal, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise LineFault(f"it is not JSON at character {error.pos + 1}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise LineFault(f"it cannot be read as JSON: {error}") from None
    except InvalidOperation:  # of about 19 digits, which no Decimal has
        raise LineFault("it cannot be read as JSON: a number has an exponent out of range") from None
    if not isinstance(found, dict):
        raise LineFault("it is JSON, but no object {…}")

    def field(name: str) -> str | None:
        value: object = found
        if name in found:
            value = found[name]
        else:
            for part in name.split("."):
                value = value.get(part) if isinstance(value, dict) else None
        return _written(name, value)

    return field


def _no_number(name: str) -> object:
    raise ValueError(f"{name} is no number")


def _written(name: str, value: object) -> str | None:
    match value:
        case None:
            return None
        case bool():
            return "true" if value else "false"
        case str():
            # JSON can write half of a surrogate pair, and NUL; nothing that stores text can hold these.
            if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
                raise LineFault(f"the field {name} holds a character that cannot be stored")
            return value
        case int() | Decimal():
            return str(value)
        case _:
            raise LineFault(f"the field {name} is a {'list' if isinstance(value, list) else 'nested object'}")


class Dialect(NamedTuple):
    """How CSV is written."""

    delimiter: str
    quotes: bool = True
    """False where a quote is a character like any other."""


def header(text: str, dialect: Dialect, needed: Sequence[str], file: str) -> list[str]:
    """The columns that a CSV file's first record names. Raises UserError where they are not those that are needed."""
    try:
        columns = [name.strip() for name in _row(text, dialect)]
    except LineFault as error:
        raise UserError(f"the header of {file} cannot be read: {error}") from None
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise UserError(f"the header of {file} names {', '.join(map(repr, twice))} twice")
    if lacks := [name for name in needed if name not in columns]:
        raise UserError(
            f"the header of {file} has no {', '.join(map(repr, lacks))}, which the mapping names: it has"
            f" {', '.join(map(repr, columns[:20]))}; a file without a header line needs `columns` in the mapping"
        )
    return columns


def csv_row(columns: Sequence[str], dialect: Dialect) -> Callable[[str], Fields]:
    """How a CSV record is read. What is returned raises LineFault."""
    places = {name: place for place, name in enumerate(columns)}

    def read(text: str) -> Fields:
        row = _row(text, dialect)
        if len(row) != len(places):
            raise LineFault(f"it has {len(row)} fields where the header has {len(places)}")

        def field(name: str) -> str | None:
            place = places.get(name)
            return None if place is None else row[place] or None

        return field

    return read


def _row(text: str, dialect: Dialect) -> list[str]:
    try:
        if dialect.quotes:
            rows = list(csv.reader([text], delimiter=dialect.delimiter, strict=True))
        else:
            rows = list(csv.reader([text], delimiter=dialect.delimiter, quoting=csv.QUOTE_NONE, strict=True))
    except csv.Error as error:
        raise LineFault(f"it is not CSV: {error}") from None
    return rows[0] if rows else []


READERS: Final[Mapping[str, Callable[[str], Fields]]] = {
    "common": common,
    "combined": combined,
    "json": json_line,
}
"""How a record is read, but for CSV, whose columns only the file knows."""
