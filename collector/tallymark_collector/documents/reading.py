"""From a file's text to a value that has checked itself, or to everything that is wrong with it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tallymark_collector.documents.fields import Value, near
from tallymark_collector.documents.problems import DocumentError, Problem
from tallymark_collector.documents.yaml_text import Document, Path, read_yaml

MAX_FILE_BYTES = 16 * 1024 * 1024

Content = TypeVar("Content", bound=Value)


@dataclass(frozen=True)
class Shape(Generic[Content]):
    """One kind of file: the value that it holds, and how pydantic's locations are places of the file."""

    model: type[Content]
    error: type[DocumentError]
    empty: str
    """What to say of an empty file."""
    fields_at: Callable[[Path], Sequence[str]]
    """The fields that may stand at pydantic's location."""
    in_file: Callable[[Path, Document], Path]
    """Pydantic's location without what it adds to the file's."""
    message: Callable[[ErrorDetails], str | None] = lambda _: None
    """What to say of an error, where the general sentence would not do."""
    context: Callable[[object], object] = lambda _: None
    """Pydantic's validation context, from the file as it stands."""


def read_text(path: str | FilePath, error: type[DocumentError]) -> str:
    """A file's text (UTF-8). Raises `error`, and OSError where the file cannot be read."""
    file = FilePath(path)
    with file.open("rb") as opened:
        content = opened.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise error([Problem(str(file), 1, 1, "", f"is larger than {MAX_FILE_BYTES:,} bytes; split it")])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        line = content.count(b"\n", 0, wrong.start) + 1
        raise error([Problem(str(file), line, 1, "", "is not UTF-8; save it as UTF-8")]) from None


def parse(text: str, file: str, shape: Shape[Content]) -> tuple[Content, Document]:
    """The value in a text, and its places; `file` is the name in messages. Raises the shape's error with every
    problem."""
    document = read_yaml(text)
    return checked(document, file, shape), document


def checked(document: Document, file: str, shape: Shape[Content]) -> Content:
    """The value in a document. Raises the shape's error with every problem."""
    problems = [Problem(file, *place, field_name(path), message) for place, path, message in document.faults]
    if document.data is None and not problems:
        problems.append(Problem(file, 1, 1, "", shape.empty))
    if document.data is None:
        raise shape.error(problems)
    content = None
    try:
        content = shape.model.model_validate(document.data, context=shape.context(document.data))
    except ValidationError as error:
        problems += _problems(error.errors(include_url=False), document, file, shape)
    if content is None or problems:
        raise shape.error(sorted(dict.fromkeys(problems), key=lambda problem: (problem.line, problem.column)))
    return content


def field_name(path: Path) -> str:
    """A path as a person reads it: `plans.pro.charges[1].unit_price`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch("[A-Za-z0-9_-]+", part):
            text += f".{part}" if text else part
        else:
            # A meter's name has dots of its own.
            text += f"[{json.dumps(part, ensure_ascii=False)}]"
    return text


def _problems(errors: Sequence[ErrorDetails], document: Document, file: str, shape: Shape[Any]) -> list[Problem]:
    # A misspelt field is one mistake, though it is an unknown field and a missing one too.
    meant = {(*each["loc"][:-1], _intended(each["loc"], shape)) for each in errors if each["type"] == "extra_forbidden"}
    return [
        Problem(
            file,
            *_place(each, document, shape),
            field_name(shape.in_file(each["loc"], document)),
            shape.message(each) or _message(each, shape),
        )
        for each in errors
        if not (each["type"] == "missing" and each["loc"] in meant)
    ]


def _place(error: ErrorDetails, document: Document, shape: Shape[Any]) -> tuple[int, int]:
    of_key = error["type"] == "extra_forbidden" or error["loc"][-1:] == ("[key]",)
    return document.place(shape.in_file(error["loc"], document), of_key=of_key)


def _message(error: ErrorDetails, shape: Shape[Any]) -> str:
    got = error.get("input")
    match error["type"]:
        case "missing":
            return "is required"
        case "extra_forbidden":
            intended = _intended(error["loc"], shape)
            known = ", ".join(shape.fields_at(error["loc"][:-1]))
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
    """What stands in the file, for a message."""
    names: Mapping[type[Any], str] = {type(None): "nothing", dict: "a mapping", list: "a list"}
    return names.get(type(value), f"the text {value!r}")


def _intended(loc: Path, shape: Shape[Any]) -> str:
    return near(str(loc[-1]), shape.fields_at(loc[:-1]), "")
