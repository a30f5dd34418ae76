"""The file of meters, as a person writes it in YAML (docs/meters.md).

Everything wrong with a file is reported at once, each with its line and its field:

    meters.yaml:9: meters["api.requests"].sources[0].quantity: expected one of value, count, sum, got 'counts'; …
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Annotated

from pydantic import BeforeValidator
from pydantic_core import ErrorDetails

from tallymark_collector.documents.fields import Text, Value, wrong
from tallymark_collector.documents.problems import DocumentError
from tallymark_collector.documents.reading import Shape, named, parse, read_text
from tallymark_collector.documents.yaml_text import Document, Path
from tallymark_collector.metering.rules import SOURCES, AccountFrom, From, Meter, Number, Rules

_SOURCE = 3
"""Where a source's place stands in pydantic's location: ("meters", name, "sources", place, signal, field, …)."""


class MetersError(DocumentError):
    """A file of meters that cannot be used. `problems` has at least one entry, in the file's order."""


def _some(value: object) -> object:
    if not value:
        raise wrong("needs at least one meter")
    return value


class _File(Value):
    meters: Annotated[dict[Text, Meter], BeforeValidator(_some)]


def read_rules(path: str | FilePath) -> Rules:
    """The meters in a file (UTF-8). Raises `MetersError` with every problem, `OSError` if it cannot be read."""
    return parse_rules(read_text(path, MetersError), str(path))


def parse_rules(text: str, file: str = "meters.yaml") -> Rules:
    """The meters in a text; `file` is the name in messages. Raises `MetersError` with every problem."""
    content, document = parse(text, file, _SHAPE)
    return Rules(content.meters, file, {name: document.keys["meters", name][0] for name in content.meters})


def _in_file(loc: Path, document: Document) -> Path:
    """Without the signal after a source's place, and what a value that stands alone in the file has got around it."""
    if loc[2:3] == ("sources",) and len(loc) > _SOURCE + 1:
        loc = (*loc[: _SOURCE + 1], *loc[_SOURCE + 2 :])
        if loc[_SOURCE + 1 : _SOURCE + 2] == ("quantity",):
            loc = (*loc[: _SOURCE + 2], *loc[_SOURCE + 3 :])
        if loc[_SOURCE + 2 : _SOURCE + 3] == (0,) and loc[: _SOURCE + 3] not in document.values:
            loc = (*loc[: _SOURCE + 2], *loc[_SOURCE + 3 :])
    return loc[:-1] if loc[-1:] == ("[key]",) else loc


def _fields(loc: Path) -> Sequence[str]:
    model: type[Value]
    match loc:
        case ():
            model = _File
        case ("meters", _):
            model = Meter
        case ("meters", _, "sources", _, str(signal)):
            model = SOURCES[signal]
        case ("meters", _, "sources", _, _, "account", *_):
            model = AccountFrom
        case ("meters", _, "sources", _, _, "quantity", *_):
            model = Number
        case _:
            model = From
    return list(model.model_fields)


def _message(error: ErrorDetails) -> str | None:
    got = error.get("input")
    match error["type"], error["loc"][-1:]:
        case "literal_error", ("spans_are_complete",):
            return f"can only be true, got {named(got)}: leave it out and say `sampled: allow` if they are not"
        case "literal_error", ("sampled",):
            return f"can only be allow, got {named(got)}; leave it out and say `spans_are_complete: true` if they are"
        case _:
            return None


_SHAPE = Shape(
    _File,
    MetersError,
    empty="is empty; a file of meters needs `meters`",
    fields_at=_fields,
    in_file=_in_file,
    message=_message,
)
