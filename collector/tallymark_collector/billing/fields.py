"""Field types of the catalogue's values: how one entry is checked, and how several are checked together.

A check raises `wrong(message)`. The message reads after the field's name and says what to do.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from tallymark_collector.billing.errors import CurrencyError
from tallymark_collector.billing.local_days import FIRST_DAY, LAST_DAY, known_zone
from tallymark_collector.billing.money import minor_digits, plain, read_number

MAX_TEXT = 255
"""Characters of an id or a name. OpenTelemetry's limit for a metric name too."""

MAX_UNIT = 63
"""Characters of a unit: OpenTelemetry's limit for an instrument's unit."""

AGGREGATIONS: Final = ("sum", "count", "max", "latest", "unique")
OF_SINGLE_POINTS: Final = frozenset({"count", "max", "latest"})
"""Aggregations that need points which stand for one event each: no running totals, no sums over an interval."""
CYCLES: Final = ("monthly", "yearly", "weekly")
WEEKDAYS: Final = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
"""In the order of ISO 8601, which counts them from 1."""

Where = tuple[int | str, ...]
"""Path from a value to the part of it that is wrong, e.g. `(1, "up_to")`."""


class Value(BaseModel):
    """A frozen value without fields that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Declared:
    """What the rest of the file declares, given as pydantic's validation context; None where unknown.

    It lets a reference be refused at its own place while other parts of the file are wrong too.
    """

    meters: frozenset[str] | None = None
    plans: frozenset[str] | None = None
    digits: int | None = None


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


def maybe_number(value: object) -> Decimal | None:
    """The number, or None where the field's own check has already said what is wrong with it."""
    try:
        return read_number(value)
    except ValueError:
        return None


def maybe_day(value: object) -> date | None:
    """The day, or None where the field's own check has already said what is wrong with it."""
    try:
        return _day(value)
    except PydanticCustomError:
        return None


def _number(value: object) -> Decimal:
    try:
        return read_number(value)
    except ValueError as error:
        raise wrong(str(error)) from None


def _fits_currency(value: Decimal, info: ValidationInfo) -> Decimal:
    if isinstance(info.context, Declared) and info.context.digits is not None:
        check_decimals(value, info.context.digits)
    return value


def check_decimals(fee: Decimal, digits: int) -> None:
    """Refuses a fee that could not be paid as it is written."""
    decimals = len(plain(fee).partition(".")[2])
    if decimals > digits:
        raise wrong(f"{plain(fee)} has {decimals} decimals, the currency has {digits}; round the fee yourself")


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


def _declared_meter(name: str, info: ValidationInfo) -> str:
    meters = info.context.meters if isinstance(info.context, Declared) else None
    if meters is not None and name not in meters:
        raise wrong(f"the meter {name!r} is not declared; add it under `meters`{near(name, meters, ' or use ')}")
    return name


def _declared_plan(name: str, info: ValidationInfo) -> str:
    plans = info.context.plans if isinstance(info.context, Declared) else None
    if plans is not None and name not in plans:
        raise wrong(f"there is no plan {name!r}; add it under `plans`{near(name, plans, ' or use ')}")
    return name


def near(name: str, known: Iterable[str], prefix: str) -> str:
    """`prefix` and the known name that looks most like `name`, or "" where none does."""
    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"{prefix}{found[0]}" if found else ""


def _currency(code: str) -> str:
    try:
        minor_digits(code)
    except CurrencyError as error:
        raise wrong(str(error)) from None
    return code


def _zone(name: str) -> str:
    try:
        return known_zone(name)
    except ValueError as error:
        raise wrong(str(error)) from None


def _up_to(last: int, what: str) -> BeforeValidator:
    def check(value: object) -> int:
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(text, str) or not re.fullmatch("[0-9]{1,2}", text) or not 1 <= int(text) <= last:
            raise wrong(f"expected {what} from 1 to {last}, got {value!r}")
        return int(text)

    return BeforeValidator(check)


def _one_of(known: tuple[str, ...]) -> BeforeValidator:
    def check(value: object) -> str:
        if not isinstance(value, str) or value not in known:
            hint = near(str(value).lower(), known, "; did you mean ")
            raise wrong(f"expected one of {', '.join(known)}, got {value!r}{hint and hint + '?'}")
        return value

    return BeforeValidator(check)


def _day(value: object) -> date:
    if isinstance(value, str) and re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        try:
            value = date.fromisoformat(value)
        except ValueError:
            raise wrong(f"{value} is not a day of the calendar") from None
    if not isinstance(value, date) or isinstance(value, datetime):
        raise wrong(f"expected a day as YYYY-MM-DD, got {value!r}")
    if not FIRST_DAY <= value <= LAST_DAY:
        raise wrong(f"expected a day from {FIRST_DAY} to {LAST_DAY}, got {value}")
    return value


_as_text = PlainSerializer(plain, return_type=str, when_used="json")

Number = Annotated[Decimal, BeforeValidator(_number), _as_text]
"""A quantity or a price per unit: not negative, see the limits in `money`."""

Fee = Annotated[Decimal, BeforeValidator(_number), AfterValidator(_fits_currency), _as_text]
"""An amount of money that a person pays as it is."""

Text = Annotated[str, AfterValidator(_text)]
Unit = Annotated[str, AfterValidator(_unit)]
MeterName = Annotated[Text, AfterValidator(_declared_meter)]
PlanId = Annotated[Text, AfterValidator(_declared_plan)]
CurrencyCode = Annotated[str, AfterValidator(_currency)]
ZoneName = Annotated[str, AfterValidator(_zone)]
AggregationName = Annotated[Literal["sum", "count", "max", "latest", "unique"], _one_of(AGGREGATIONS)]
Cycle = Annotated[Literal["monthly", "yearly", "weekly"], _one_of(CYCLES)]
AnchorDay = Annotated[int, _up_to(31, "a day of the month")]
AnchorMonth = Annotated[int, _up_to(12, "a month")]
AnchorWeekday = Annotated[str, _one_of(WEEKDAYS)]
Day = Annotated[date, BeforeValidator(_day)]
