"""What a point must be to be billed. Each function returns None or the refusal; none of them raises."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Final

from tallymark import conventions
from tallymark_collector.model import Attributes, AttributeValue, Reason, Refusal, Temporality
from tallymark_collector.wire import shortest_decimal
from tallymark_collector.wire.tallymark_metrics_view_pb2 import NumberDataPoint

MAX_METER_LENGTH: Final = 255
"""Characters; the longest instrument name that OpenTelemetry allows."""
MAX_UNIT_LENGTH: Final = 63
"""Characters; the longest instrument unit that OpenTelemetry allows."""
MAX_ACCOUNT_LENGTH: Final = 256
MAX_ATTRIBUTES: Final = 64
MAX_ATTRIBUTE_TEXT: Final = 4096
"""Characters of one attribute's name and value. A unique key's entry must stay below a third of an 8 KiB page."""

MAX_WHOLE_DIGITS: Final = 25
"""With `conventions.MAX_DECIMALS` behind the point, sums stay within what `billing.money` prices exactly: 60 digits."""

_NANOSECONDS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """How far a point's time may lie from the collector's clock."""

    ahead: timedelta = timedelta(minutes=10)
    """Clock skew that is tolerated."""
    retention: timedelta = timedelta(days=400)
    """How long raw points are kept. Older ones cannot be told from replays, so they are kept aside."""

    def window(self, now_ns: int) -> tuple[int, int]:
        """Earliest and latest acceptable time, in nanoseconds since the Unix epoch."""
        seconds = now_ns // _NANOSECONDS
        oldest = (seconds - int(self.retention.total_seconds())) * _NANOSECONDS
        return max(oldest, 1), (seconds + int(self.ahead.total_seconds())) * _NANOSECONDS


OVERFLOWED: Final = Refusal(
    Reason.ATTRIBUTE_OVERFLOW,
    "the producer passed its cardinality limit: this point holds usage of accounts it no longer names;"
    " raise the limit there",
)

CHANGES_OF_A_LEVEL: Final = Refusal(
    Reason.TYPE_UNSUPPORTED,
    "a sum that can fall (UpDownCounter) came as changes, which tell no level unless all are there: have it"
    " sent with cumulative temporality",
)


def check_metric(name: str, unit: str, temporality: int, monotonic: bool, *, gauge: bool = False) -> Refusal | None:
    """What is wrong with a sum or a gauge as a whole."""
    if refusal := check_meter(name):
        return refusal
    if len(unit) > MAX_UNIT_LENGTH or "\0" in unit:
        return Refusal(Reason.METER_INVALID, f"a meter's unit has at most {MAX_UNIT_LENGTH} characters, none NUL")
    if gauge:
        return None
    if temporality not in (Temporality.DELTA, Temporality.CUMULATIVE):
        return Refusal(
            Reason.TEMPORALITY_MISSING,
            f"aggregation temporality {temporality} is neither delta nor cumulative",
        )
    if not monotonic and temporality == Temporality.DELTA:
        return CHANGES_OF_A_LEVEL
    return None


def check_meter(name: str) -> Refusal | None:
    """What is wrong with a meter's name."""
    if not name or len(name) > MAX_METER_LENGTH or "\0" in name:
        return Refusal(Reason.METER_INVALID, f"a meter's name has 1 to {MAX_METER_LENGTH} characters, none NUL")
    return None


def check_attributes(attributes: Attributes) -> Refusal | None:
    """What is wrong with a stream's attributes, the account among them."""
    if attributes.get(conventions.OVERFLOW) is True:
        return OVERFLOWED
    return check_texts(attributes) or check_account(attributes.get(conventions.ACCOUNT))


def check_texts(attributes: Attributes) -> Refusal | None:
    """What is wrong with attributes that are to be stored."""
    if refusal := check_number(len(attributes)):
        return refusal
    for name, value in attributes:
        if problem := _text_problem(name) or _text_problem(value):
            return Refusal(Reason.ATTRIBUTES_INVALID, f"attribute {name[:64]!r} {problem}")
    return None


def check_number(attributes: int) -> Refusal | None:
    """What is wrong with so many attributes; to be asked before they are decoded."""
    if attributes <= MAX_ATTRIBUTES:
        return None
    return Refusal(Reason.ATTRIBUTES_INVALID, f"{attributes} attributes, at most {MAX_ATTRIBUTES} are taken")


def check_account(account: AttributeValue) -> Refusal | None:
    """What is wrong with the attribute that names the account."""
    if account is None or account == "":
        return Refusal(Reason.ACCOUNT_MISSING, f"no {conventions.ACCOUNT}")
    if account_name(account) is None:
        return Refusal(
            Reason.ATTRIBUTES_INVALID,
            f"{conventions.ACCOUNT} must be a string or an integer of at most {MAX_ACCOUNT_LENGTH} characters",
        )
    return None


def account_name(value: AttributeValue) -> str | None:
    """An account's name from the attribute's value (integers are taken as their digits), or None if it is no name."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    name = str(value)
    return name if 0 < len(name) <= MAX_ACCOUNT_LENGTH and "\0" not in name else None


def shortened(attributes: Attributes) -> Attributes:
    """Attributes of evidence as they are kept: the first `MAX_ATTRIBUTES`, texts cut to `MAX_ATTRIBUTE_TEXT`. What a
    host puts on its spans beside the usage (prompts, statements) is no reason to refuse the evidence."""
    return Attributes(
        (name, _shortened(value)) for name, value in attributes[:MAX_ATTRIBUTES] if not _text_problem(name)
    )


def _shortened(value: AttributeValue) -> AttributeValue:
    match value:
        case str() | bytes():
            return value[:MAX_ATTRIBUTE_TEXT]
        case Attributes() | tuple() if _text_problem(value):
            return f"({type(value).__name__.lower()} left out: too large)"
        case _:
            return value


def _text_problem(value: AttributeValue) -> str | None:
    """PostgreSQL's text and jsonb cannot hold NUL; everything else that is wrong here is size."""
    match value:
        case str():
            if "\0" in value:
                return "holds a NUL character"
            return "is too long" if len(value) > MAX_ATTRIBUTE_TEXT else None
        case bytes():
            return "is too long" if len(value) > MAX_ATTRIBUTE_TEXT else None
        case Attributes():
            return next(filter(None, (_text_problem(k) or _text_problem(v) for k, v in value)), None)
        case tuple():
            if len(value) > MAX_ATTRIBUTE_TEXT:
                return "is too long"
            return next(filter(None, map(_text_problem, value)), None)
        case _:
            return None


def read_value(point: NumberDataPoint) -> Decimal | Refusal:
    """The point's value as an exact decimal: an integer as it is, a double as its shortest decimal."""
    value = read_number(point)
    return value if isinstance(value, Refusal) else check_quantity(value) or value


def read_level(point: NumberDataPoint) -> Decimal | Refusal:
    """A level as an exact decimal. It may be negative: one process may count up what another one counts down."""
    value = read_number(point)
    return value if isinstance(value, Refusal) else check_quantity(abs(value)) or value


def read_number(point: NumberDataPoint) -> Decimal | Refusal:
    """The same, of any size."""
    match point.WhichOneof("value"):
        case "as_int":
            return Decimal(point.as_int)
        case "as_double" if math.isfinite(point.as_double):
            return shortest_decimal(point.as_double)
        case "as_double":
            return Refusal(Reason.VALUE_NOT_FINITE, f"the value is {point.as_double}")
        case _:
            return Refusal(Reason.VALUE_MISSING, "the point has neither an integer nor a double")


def check_quantity(value: Decimal) -> Refusal | None:
    """What is wrong with a finite quantity."""
    if value < 0:
        return Refusal(Reason.VALUE_NEGATIVE, f"a quantity used cannot be {value:.6G}")
    exponent = value.as_tuple().exponent
    assert isinstance(exponent, int), "only finite values come here"
    if value.adjusted() >= MAX_WHOLE_DIGITS or exponent < -conventions.MAX_DECIMALS:
        limits = f"{MAX_WHOLE_DIGITS} digits before or {conventions.MAX_DECIMALS} after the point"
        detail = f"{value:.6E} has more than {limits}"
        return Refusal(Reason.VALUE_OUT_OF_RANGE, detail)
    return None


def check_times(start_ns: int, time_ns: int, oldest_ns: int, latest_ns: int) -> Refusal | None:
    """What is wrong with a point's or span's times; 0 is OTLP's "not given"."""
    if oldest_ns <= time_ns <= latest_ns and start_ns <= time_ns:
        return None
    if time_ns == 0:
        return Refusal(Reason.TIME_MISSING, "the point has no time")
    if start_ns > time_ns:
        return Refusal(Reason.TIME_REVERSED, f"it starts {start_ns - time_ns} ns after it ends")
    if time_ns > latest_ns:
        return Refusal(Reason.TIME_AHEAD, f"it lies {(time_ns - latest_ns) // _NANOSECONDS} s past the allowed skew")
    return Refusal(
        Reason.TIME_TOO_OLD,
        f"it lies {(oldest_ns - time_ns) // _NANOSECONDS} s before the oldest point that is kept",
    )
