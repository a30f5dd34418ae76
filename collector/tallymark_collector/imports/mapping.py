"""The mapping: what a line of a file bills. A YAML file, checked as a whole like the file of plans.

format: combined
account: {field: target, pattern: "^/t/([^/]+)/"}
meters:
  - {meter: api.requests, unit: "{request}"}
  - {meter: egress, unit: By, field: bytes}
routes: ["/t/{tenant}/orders/{id}"]
"""

import re
from collections.abc import Mapping as MappingType
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from tallymark import conventions
from tallymark_collector.billing.fields import Number, ZoneName
from tallymark_collector.documents.fields import Text, Unit, Value, near, one_of, wrong
from tallymark_collector.documents.problems import DocumentError
from tallymark_collector.documents.reading import Shape, checked, parse, read_text
from tallymark_collector.documents.yaml_text import Document, Path
from tallymark_collector.imports import routes, times
from tallymark_collector.imports.access_log import COMBINED, COMMON

FORMATS: Final = ("combined", "common", "json", "csv")
_LOG_FIELDS: Final = {"combined": COMBINED, "common": COMMON}


@dataclass(frozen=True)
class _Known:
    """The fields that lines of the format have; None where only the file knows."""

    fields: tuple[str, ...] | None


def _field_name(name: str, info: ValidationInfo) -> str:
    known = info.context.fields if isinstance(info.context, _Known) else None
    if known is not None and name not in known:
        raise wrong(
            f"an access log has no field {name!r}{near(name, known, '; did you mean ')}; it has {', '.join(known)}"
        )
    return name


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise wrong(f"is no regular expression: {error}") from None
    return text


def _capture(text: str) -> str:
    if re.compile(_regex(text)).groups != 1:
        raise wrong("needs exactly one group (…), which captures the account; write (?:…) for the others")
    return text


def _template(text: str) -> str:
    try:
        routes.pattern(text)
    except ValueError as error:
        raise wrong(str(error)) from None
    return text


def _time_format(text: str) -> str:
    if text not in times.FORMATS and "%" not in text:
        known = ", ".join(times.FORMATS)
        hint = near(text, times.FORMATS, "; did you mean ")
        raise wrong(f"expected one of {known}, or a pattern such as %d.%m.%Y %H:%M:%S, got {text!r}{hint}")
    return text


_RANGE: Final = re.compile(r"(\d{1,9})-(\d{1,9})|([1-5])xx", re.ASCII)


def _wanted(text: str) -> str:
    if len(text) > 2 and text.startswith("~"):
        _regex(text[1:])
    return text


def as_field(value: object) -> object:
    """`account: user` is short for `account: {field: user}`."""
    return {"field": value} if isinstance(value, str) else value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


FieldName = Annotated[Text, AfterValidator(_field_name)]
_Form = Annotated[Literal["combined", "common", "json", "csv"], one_of(FORMATS)]
_Otherwise = Annotated[Literal["none", "other", "path"], one_of(("none", "other", "path"))]
_Quote = Annotated[Literal["double", "none"], one_of(("double", "none"))]
_Kind = Annotated[Literal["text", "integer"], one_of(("text", "integer"))]


class Time(Value):
    """Where a line's time stands."""

    field: FieldName
    format: Annotated[Text, AfterValidator(_time_format)] = "iso8601"
    time_zone: ZoneName | None = None
    """Of times that name none."""


class Account(Value):
    """Whom a line bills: a constant, or a field, what a pattern captures of it, and what a table makes of that."""

    field: FieldName | None = None
    value: Text | None = None
    pattern: Annotated[Text, AfterValidator(_capture)] | None = None
    lookup: dict[Text, Text] | None = None
    otherwise: Text | None = None
    """The account of lines without one; left out, these are rejected."""

    @model_validator(mode="after")
    def _one(self) -> "Account":
        if (self.field is None) == (self.value is None):
            raise wrong("needs either `field` or `value`")
        if self.value is not None and (self.pattern or self.lookup or self.otherwise):
            raise wrong("has a constant `value`; `pattern`, `lookup` and `otherwise` go with `field`")
        return self


class Dimension(Value):
    """An attribute of the usage: a field of the line, or a constant."""

    field: FieldName | None = None
    value: Text | None = None
    type: _Kind = "text"

    @model_validator(mode="after")
    def _one(self) -> "Dimension":
        if (self.field is None) == (self.value is None):
            raise wrong("needs either `field` or `value`")
        if self.value is not None and self.type == "integer" and not re.fullmatch("-?[0-9]{1,18}", self.value):
            raise wrong(f"is no integer: {self.value!r}")
        return self


def _own_name(name: str) -> str:
    if name == conventions.ACCOUNT:
        raise wrong(f"{name} is set by `account`")
    return name


Dimensions = dict[Annotated[Text, AfterValidator(_own_name)], Annotated[Dimension, BeforeValidator(as_field)]]


class Metered(Value):
    """What a line counts of one meter: 1, another constant, or a field's number."""

    meter: Text
    unit: Unit = "1"
    field: FieldName | None = None
    quantity: Number | None = None
    missing: Number | None = None
    """What counts where the field is absent; left out, such a line is rejected."""
    dimensions: Dimensions = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one(self) -> "Metered":
        if self.field is not None and self.quantity is not None:
            raise wrong("has both `field` and `quantity`: keep one")
        if self.field is None and self.missing is not None:
            raise wrong("has `missing`, which goes with `field`")
        return self


class Filter(Value):
    """Which lines count, by one field: `keep` only these, or `skip` these."""

    field: FieldName
    keep: tuple[Annotated[Text, AfterValidator(_wanted)], ...] | None = None
    skip: tuple[Annotated[Text, AfterValidator(_wanted)], ...] | None = None

    @model_validator(mode="after")
    def _one(self) -> "Filter":
        if (self.keep is None) == (self.skip is None):
            raise wrong("needs either `keep` or `skip`")
        return self


class Route(Value):
    """A pattern of paths and the route that it stands for."""

    match: Annotated[Text, AfterValidator(_template)]
    route: Text


def _as_route(value: object) -> object:
    return {"match": value, "route": value} if isinstance(value, str) else value


def _needs(what: str) -> AfterValidator:
    def check(value: Any, info: ValidationInfo) -> Any:
        form = info.data.get("format")
        if not value and form in ("json", "csv"):
            raise wrong(f"is required for the format {form}{what}")
        return value

    return AfterValidator(check)


def _of_csv(value: Any, info: ValidationInfo) -> Any:
    if value is not None and info.data.get("format") not in (None, "csv"):
        raise wrong("goes with the format csv alone")
    return value


def _delimiter(text: str) -> str:
    if len(text) != 1 or text in '"\r\n' or not text.isascii():
        raise wrong("must be one character, such as ; or a tab")
    return text


class Mapping(Value):
    """What a line of a file bills."""

    format: _Form
    time: Annotated[Time | None, _needs(", e.g. {field: timestamp, format: iso8601}"), BeforeValidator(as_field)] = (
        Field(default=None, validate_default=True)
    )
    id: FieldName | None = None
    """The field that tells an event from every other of its source."""
    account: Annotated[Account, BeforeValidator(as_field)]
    meters: Annotated[tuple[Metered, ...], _needs(", e.g. [{meter: api.requests}]")] = Field(
        default=(), validate_default=True
    )
    dimensions: Dimensions | None = None
    filters: tuple[Filter, ...] = ()
    routes: tuple[Annotated[Route, BeforeValidator(_as_route)], ...] = ()
    route_field: FieldName = Field(default="path", validate_default=False)
    unmatched_route: _Otherwise = "none"
    columns: Annotated[tuple[Text, ...] | None, AfterValidator(_of_csv)] = None
    """Of a CSV file without a header line."""
    delimiter: Annotated[str | None, AfterValidator(_of_csv), AfterValidator(lambda t: t and _delimiter(t))] = None
    quote: Annotated[_Quote, AfterValidator(_of_csv)] = "double"
    """`none`: a quote is a character like any other, as in most files with tabs."""

    def completed(self) -> "Mapping":
        """With what the format brings along where the file says nothing."""
        if self.format in ("json", "csv"):
            return self.model_copy(update={"dimensions": self.dimensions or {}})
        brought = {
            conventions.HTTP_METHOD: Dimension(field="method"),
            conventions.HTTP_STATUS: Dimension(field="status", type="integer"),
        }
        return self.model_copy(
            update={
                "time": self.time or Time(field="time", format="clf"),
                "meters": self.meters or (Metered(meter="api.requests", unit="{request}"),),
                "dimensions": brought if self.dimensions is None else self.dimensions,
            }
        )

    def told(self) -> dict[str, Any]:
        """What is not left out, as JSON has it and a mapping file may: it is kept with a source, to be
        compared with the next one. A field that a later version adds makes no other mapping of it."""
        found: dict[str, Any] = self.model_dump(mode="json", exclude_defaults=True)
        return found


def read_mapping(path: str | FilePath) -> Mapping:
    """The mapping in a file (UTF-8). Raises `DocumentError` with every problem, `OSError` if it can't be read."""
    return parse_mapping(read_text(path, DocumentError), str(path))


def parse_mapping(text: str, file: str = "mapping.yaml") -> Mapping:
    """The mapping in a text; `file` is the name in messages. Raises `DocumentError` with every problem."""
    content, _ = parse(text, file, _SHAPE)
    return content.completed()


def mapping_of(data: MappingType[str, Any]) -> Mapping:
    """The mapping that options say. Raises `DocumentError` with every problem, at the place "options"."""
    return checked(Document(data=data), "options", _SHAPE).completed()


def _known(data: object) -> _Known:
    form = data.get("format") if isinstance(data, dict) else None
    return _Known(_LOG_FIELDS.get(form) if isinstance(form, str) else None)


def _in_file(loc: Path, _: Document) -> Path:
    """Pydantic puts "[key]" behind the name of an entry whose name is wrong."""
    return loc[:-1] if loc[-1:] == ("[key]",) else loc


def _fields(loc: Path) -> list[str]:
    model: type[Value]
    match loc:
        case ():
            model = Mapping
        case ("time",):
            model = Time
        case ("account",):
            model = Account
        case ("filters", _):
            model = Filter
        case ("routes", _):
            model = Route
        case ("meters", _):
            model = Metered
        case _:
            model = Dimension
    return list(model.model_fields)


_SHAPE = Shape(
    model=Mapping,
    error=DocumentError,
    empty="is empty; a mapping needs `format` and `account`, and `time` and `meters` where it is csv or json",
    fields_at=_fields,
    in_file=_in_file,
    context=_known,
)


def wants(several: Sequence[str], text: str | None) -> bool:
    """Whether one of a filter's entries fits: a value, a range 200-299, a class 4xx, or ~ and a regular expression."""
    if text is None:
        return False
    for entry in several:
        found = _RANGE.fullmatch(entry)
        if entry == text:
            return True
        if found and text.isascii() and text.isdigit() and len(text) < 10:
            low, high = (int(found[3]) * 100, int(found[3]) * 100 + 99) if found[3] else (int(found[1]), int(found[2]))
            if low <= int(text) <= high:
                return True
        elif len(entry) > 2 and entry[0] == "~" and re.search(entry[1:], text):
            return True
    return False
