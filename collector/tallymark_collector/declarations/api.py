"""The SDK as code that uses it sees it: what its functions are called, and which unit each quantity means.

The one place to change when the SDK's interface does. The collector does not import the SDK: the code that is read may
use another version of it than the one that is installed here.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

PACKAGE: Final = "tallymark"


class Function(enum.Enum):
    """What a call does."""

    TRACK = "declares"
    RECORD = "records"
    ADD = "adds"
    MAP = "maps"
    """Not a call: a file of meters takes it from other people's telemetry."""


@dataclass(frozen=True)
class Signature:
    """Where a function's arguments stand: positions count from 0, None means by keyword alone."""

    function: Function
    meter: int | None
    quantity: int | None
    takes_unit: bool


_TRACK = Signature(Function.TRACK, meter=0, quantity=1, takes_unit=True)
_RECORD = Signature(Function.RECORD, meter=0, quantity=1, takes_unit=True)

FUNCTIONS: Final[Mapping[str, Signature]] = {
    "tallymark.track_usage": _TRACK,
    "tallymark.decorators.track_usage": _TRACK,
    "tallymark.record": _RECORD,
    "tallymark.usage.record": _RECORD,
    # Adds to a meter that is declared elsewhere.
    "tallymark.usage.add": Signature(Function.ADD, meter=None, quantity=0, takes_unit=False),
}

EXPORTED: Final = frozenset({"measure", "record", "track_usage", "usage"})
"""What `from tallymark import *` brings, of what matters here."""

METER_ARGUMENT: Final = "meter"
QUANTITY_ARGUMENT: Final = "quantity"
UNIT_ARGUMENT: Final = "unit"

NUMBER_UNIT: Final = "{request}"
"""Of a declaration whose quantity is left out or a number: it counts calls."""

FUNCTION_UNIT: Final = "1"
"""Of one whose quantity is a function."""

UNDECLARED_UNIT: Final = "1"
"""Of a recording without a unit, of a meter that no declaration names."""


@dataclass(frozen=True)
class Measure:
    """A measure's unit: a fixed one, or an argument with a default. `position` None means by keyword alone."""

    unit: str
    from_argument: bool = False
    position: int | None = None


MEASURES: Final[Mapping[str, Measure]] = {
    "tallymark.measure.argument": Measure("1"),
    "tallymark.measure.duration": Measure("s", from_argument=True, position=0),
    "tallymark.measure.inside": Measure("1"),
    "tallymark.measure.items": Measure("{item}"),
    "tallymark.measure.of": Measure("1", from_argument=True, position=1),
    "tallymark.measure.request_bytes": Measure("By"),
    "tallymark.measure.response_bytes": Measure("By"),
    "tallymark.measure.tokens": Measure("{token}"),
}

NUMBERS: Final = frozenset({"builtins.int", "builtins.float", "builtins.len", "decimal.Decimal"})
"""What returns a number when it is called."""

FUNCTION_MAKERS: Final = frozenset(
    {"functools.partial", "operator.attrgetter", "operator.itemgetter", "operator.methodcaller"}
)
"""What returns a function when it is called."""
