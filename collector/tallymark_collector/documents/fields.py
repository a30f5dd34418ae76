"""Field types that every file has, and how one entry is checked, and how several are checked together.

A check raises `wrong(message)`. The message reads after the field's name and says what to do.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

MAX_TEXT = 255
"""Characters of an id or a name. OpenTelemetry's limit for a metric name too."""

MAX_UNIT = 63
"""Characters of a unit: OpenTelemetry's limit for an instrument's unit."""

TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
"""A tenant's name; `A_TENANT` says so."""
A_TENANT = "1 to 63 of a-z, 0-9, '.', '_' and '-', with a letter or digit first"

Where = tuple[int | str, ...]
"""Path from a value to the part of it that is wrong, e.g. `(1, "up_to")`."""


class Value(BaseModel):
    """A frozen value without fields that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def wrong(message: str) -> PydanticCustomError:
    """The error that a check raises."""
    return PydanticCustomError("catalog", message)


def listed(check: Callable[[Sequence[object]], Iterable[tuple[Where, str]]]) -> WrapValidator:
    """A check across the entries of a list, which reports beside the errors of the entries themselves.

    `check` gets the entries as they came, valid or not, and gives places and messages.
    """

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        found = check(value) if isinstance(value, list | tuple) else ()
        details = [InitErrorDetails(type=wrong(text), loc=where, input=None) for where, text in found]
        try:
            result = handler(value)
        except ValidationError as error:
            details = [*_details(error), *details]
        if details:
            # Pydantic takes these errors over one by one and puts the list's own place before theirs.
            raise ValidationError.from_exception_data("list", details)
        return result

    return WrapValidator(validate)


def _details(error: ValidationError) -> list[InitErrorDetails]:
    return [
        InitErrorDetails(
            type=PydanticCustomError(each["type"], each["msg"]),
            loc=each["loc"],
            input=each["input"],
        )
        for each in error.errors(include_url=False)
    ]


def part(entry: object, name: str) -> object:
    """A field of an entry that may be a mapping from a file or a value already; None where it is not there."""
    return entry.get(name) if isinstance(entry, dict) else getattr(entry, name, None)


def near(name: str, known: Iterable[str], prefix: str) -> str:
    """`prefix` and the known name that looks most like `name`, or "" where none does."""
    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"{prefix}{found[0]}" if found else ""


def one_of(known: tuple[str, ...]) -> BeforeValidator:
    """Text that is one of these words."""

    def check(value: object) -> str:
        if not isinstance(value, str) or value not in known:
            hint = near(str(value).lower(), known, "; did you mean ")
            raise wrong(f"expected one of {', '.join(known)}, got {value!r}{hint and hint + '?'}")
        return value

    return BeforeValidator(check)


def _storable(text: str) -> str:
    if "\0" in text:
        raise wrong("must not contain the character NUL")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise wrong("must not contain half of a surrogate pair")
    return text


def _text(text: str) -> str:
    if not text.strip():
        raise wrong("must not be empty")
    if len(text) > MAX_TEXT:
        raise wrong(f"at most {MAX_TEXT} characters, got {len(text)}")
    return _storable(text)


def _unit(text: str) -> str:
    if len(text) > MAX_UNIT:
        raise wrong(f"at most {MAX_UNIT} characters, got {len(text)}")
    return _storable(text)


def _tenant(name: str) -> str:
    if TENANT.fullmatch(name) is None:
        raise wrong(f"{name!r} is no name of a tenant: {A_TENANT}")
    return name


Text = Annotated[str, AfterValidator(_text)]
Unit = Annotated[str, AfterValidator(_unit)]
TenantName = Annotated[str, AfterValidator(_tenant)]
