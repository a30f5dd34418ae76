"""A file in YAML as a checked value, with everything that is wrong with it told at once, each with its line.

What the files of Tallymark have in common. What a file holds is its `Shape`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tallymark_collector.billing.errors import CatalogError, Problem
from tallymark_collector.billing.fields import Value, near
from tallymark_collector.billing.yaml_text import Document, Path, read_yaml

MAX_FILE_BYTES = 16 * 1024 * 1024

Content = TypeVar("Content", bound=Value)


@dataclass(frozen=True)
class Shape(Generic[Content]):
    """What a kind of file holds, and how its places are told."""

    model: type[Content]
    empty: str
    """Said of a file that holds nothing."""
    context: Callable[[Any], object]
    """Pydantic's validation context, from the file's data as they came."""
    fields: Callable[[Path], list[str]]
    """The fields of the value at pydantic's location."""
    in_file: Callable[[Path, Document], Path] = lambda path, _: path
    """Pydantic's location without what it adds to the file's."""
    message: Callable[[ErrorDetails], str | None] = lambda _: None
    """A sentence of the shape's own for an error."""


def read_text(path: str | FilePath) -> str:
    """The text of a file (UTF-8). Raises `CatalogError` where it is none, `OSError` if it can't be read."""
    file = FilePath(path)
    with file.open("rb") as opened:
        content = opened.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise CatalogError([Problem(str(file), 1, 1, "", f"is larger than {MAX_FILE_BYTES:,} bytes; split it")])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CatalogError([Problem(str(file), line, 1, "", "is not UTF-8; save it as UTF-8")]) from None


def parse(text: str, file: str, shape: Shape[Content]) -> Content:
    """The value in a text; `file` is the name in messages. Raises `CatalogError` with every problem."""
    return checked(read_yaml(text), file, shape)


def checked(document: Document, file: str, shape: Shape[Content]) -> Content:
    """The value in a document. Raises `CatalogError` with every problem."""
    problems = [Problem(file, *place, _field(path), message) for place, path, message in document.faults]
    if document.data is None and not problems:
        problems.append(Problem(file, 1, 1, "", shape.empty))
    if document.data is None:
        raise CatalogError(problems)
    content = None
    try:
        content = shape.model.model_validate(document.data, context=shape.context(document.data))
    except ValidationError as error:
        problems += _problems(error.errors(include_url=False), document, file, shape)
    if content is None or problems:
        raise CatalogError(sorted(dict.fromkeys(problems), key=lambda problem: (problem.line, problem.column)))
    return content


def _problems(errors: Sequence[ErrorDetails], document: Document, file: str, shape: Shape[Content]) -> list[Problem]:
    # A misspelt field is one mistake, though it is an unknown field and a missing one too.
    unknown = [each["loc"] for each in errors if each["type"] == "extra_forbidden"]
    meant = {(*loc[:-1], _intended(loc, shape)) for loc in unknown}
    return [
        Problem(
            file,
            *_place(each, document, shape),
            _field(shape.in_file(each["loc"], document)),
            shape.message(each) or _message(each, shape),
        )
        for each in errors
        if not (each["type"] == "missing" and each["loc"] in meant)
    ]


def _place(error: ErrorDetails, document: Document, shape: Shape[Content]) -> tuple[int, int]:
    of_key = error["type"] == "extra_forbidden" or error["loc"][-1:] == ("[key]",)
    return document.place(shape.in_file(error["loc"], document), of_key=of_key)


def _field(path: Path) -> str:
    text = ""
    for part_ in path:
        if isinstance(part_, int):
            text += f"[{part_}]"
        elif re.fullmatch("[A-Za-z0-9_-]+", part_):
            text += f".{part_}" if text else part_
        else:
            # A meter's name has dots of its own.
            text += f"[{json.dumps(part_, ensure_ascii=False)}]"
    return text


def _message(error: ErrorDetails, shape: Shape[Content]) -> str:
    got = error.get("input")
    match error["type"]:
        case "missing":
            return "is required"
        case "extra_forbidden":
            intended = _intended(error["loc"], shape)
            known = ", ".join(shape.fields(error["loc"][:-1]))
            return f"unknown field; did you mean {intended}?" if intended else f"unknown field; known are {known}"
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"expected a mapping (name: value), got {named(got)}"
        case "tuple_type":
            return f"expected a list (- …), got {named(got)}"
        case "string_type" if isinstance(got, dict):
            return 'expected text, got a mapping; text with braces needs quotes, e.g. "{request}"'
        case "string_type":
            return f"expected text, got {named(got)}"
        case _:
            return error["msg"]


def named(value: object) -> str:
    """What a person would call it: "a mapping", "the text 'x'"."""
    names: Mapping[type[Any], str] = {type(None): "nothing", dict: "a mapping", list: "a list"}
    return names.get(type(value), f"the text {value!r}")


def _intended(loc: Path, shape: Shape[Content]) -> str:
    return near(str(loc[-1]), shape.fields(loc[:-1]), "")
