"""Field types of the catalogue's values: how one entry is checked, and how several are checked together.

A check raises `wrong(message)`. The message reads after the field's name and says what to do.
"""

import re
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, ValidationInfo
from pydantic_core import PydanticCustomError

from tallymark_collector.billing.errors import CurrencyError
from tallymark_collector.billing.local_days import FIRST_DAY, LAST_DAY, known_zone
from tallymark_collector.billing.money import minor_digits, plain, read_number
from tallymark_collector.documents.fields import Text, near, one_of, wrong

AGGREGATIONS: Final = ("sum", "count", "max", "latest", "unique", "average", "integral")
OF_ANY_SUM: Final = frozenset({"sum", "unique"})
"""Aggregations of sums over an interval. The others need points of single events, or levels."""
OF_LEVELS: Final = frozenset({"max", "latest", "average", "integral"})
"""Aggregations that levels have."""
ACROSS: Final = ("sum", "latest")
MAX_STALE: Final = 31 * 86_400
"""Seconds for which a level may hold without another sample."""
CYCLES: Final = ("monthly", "yearly", "weekly")
WEEKDAYS: Final = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
"""In the order of ISO 8601, which counts them from 1."""


@dataclass(frozen=True)
class Declared:
    """What the rest of the file declares, given as pydantic's validation context; None where unknown.

    It lets a reference be refused at its own place while other parts of the file are wrong too.
    """

    meters: frozenset[str] | None = None
    plans: frozenset[str] | None = None
    digits: int | None = None


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


def _seconds(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_STALE:
        return value  # from a document
    found = re.fullmatch("([1-9][0-9]{0,6})([smhd])", value) if isinstance(value, str) else None
    seconds = int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]] if found else 0
    if not 0 < seconds <= MAX_STALE:
        raise wrong(f"expected a time of at most 31 days, e.g. 90s, 5m, 26h or 2d, got {value!r}")
    return seconds


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

MeterName = Annotated[Text, AfterValidator(_declared_meter)]
PlanId = Annotated[Text, AfterValidator(_declared_plan)]
CurrencyCode = Annotated[str, AfterValidator(_currency)]
ZoneName = Annotated[str, AfterValidator(_zone)]
AggregationName = Annotated[
    Literal["sum", "count", "max", "latest", "unique", "average", "integral"], one_of(AGGREGATIONS)
]
Across = Annotated[Literal["sum", "latest"], one_of(ACROSS)]
Seconds = Annotated[int, BeforeValidator(_seconds)]
"""A length of time, written as `90s`, `5m`, `26h`, `31d`."""
Cycle = Annotated[Literal["monthly", "yearly", "weekly"], one_of(CYCLES)]
AnchorDay = Annotated[int, _up_to(31, "a day of the month")]
AnchorMonth = Annotated[int, _up_to(12, "a month")]
AnchorWeekday = Annotated[str, one_of(WEEKDAYS)]
Day = Annotated[date, BeforeValidator(_day)]
