"""Quantities: exact from the handler to the wire.

Inside the process a quantity is an `int`, or a `Decimal` where it has a fraction; a float becomes the shortest
decimal that denotes it, so that 0.1 recorded ten times is 1. On the wire a point is an int64 or a double, and the
collector reads a double as its shortest decimal again. What one value on the wire cannot carry exactly goes out in
several: `wire_parts`. In a segment a quantity is an integer in units of a power of ten.
"""

import math
import operator
from decimal import Clamped, Context, Decimal, DivisionByZero, Inexact, InvalidOperation, Overflow, Underflow
from typing import Final

from tallymark.conventions import MAX_DECIMALS

Exact = int | Decimal
Wire = int | float

INT64_MAX: Final = 2**63 - 1

MAX_QUANTITY: Final = INT64_MAX
"""The most that one recording may add."""

EXACT: Final = Context(prec=1024, traps=[Inexact, InvalidOperation, Overflow, Underflow, Clamped, DivisionByZero])
"""Arithmetic that raises instead of rounding, whatever the host did to its thread's own decimal context."""


class RefusedQuantityError(ValueError):
    """A quantity that cannot be counted; the message is the reason."""


def exact(value: object) -> Exact:
    """The quantity as an int, or as a Decimal where it has a fraction.

    Takes int, float, Decimal and whatever has `__index__` (NumPy's integers). Raises RefusedQuantityError for NaN,
    infinities, negative values, values over `MAX_QUANTITY` or of more than `MAX_DECIMALS` decimal places, for bool
    (write `int(...)` when a truth is to count as 1) and for anything that is not a number.
    """
    if type(value) is int:
        number: Exact = value
    elif isinstance(value, bool):
        raise RefusedQuantityError("it is a bool")
    elif isinstance(value, float):
        number = _exact_decimal(Decimal(float.__repr__(value)))
    elif isinstance(value, Decimal):
        number = _exact_decimal(value)
    else:
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except Exception:
            raise RefusedQuantityError(f"it is a {type(value).__name__}, not a number") from None
    _check_range(number)
    return number


def _exact_decimal(value: Decimal) -> Exact:
    if not value.is_finite():
        raise RefusedQuantityError("it is NaN or infinite")
    # Before int(): a million digits of 1E+999999, or -1E+999999, would hold up every thread for half a minute.
    _check_range(value)
    if value == value.to_integral_value():
        return int(value)
    if places_of(value) > MAX_DECIMALS:
        raise RefusedQuantityError(f"it has more than {MAX_DECIMALS} decimal places; round it first")
    return value


def _check_range(number: Exact) -> None:
    if number < 0:
        raise RefusedQuantityError("it is negative")
    if number > MAX_QUANTITY:
        raise RefusedQuantityError("it is over 2^63 - 1")


def places_of(value: Decimal) -> int:
    """Decimal places that a finite number needs: 1.50 has one."""
    _, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int)
    places = -exponent
    for digit in reversed(digits):
        if digit or places <= 0:
            break
        places -= 1
    return max(places, 0)


def add(a: Exact, b: Exact) -> Exact:
    """The exact sum, an int where it is integral."""
    if type(a) is int and type(b) is int:
        return a + b
    total = EXACT.add(Decimal(a), Decimal(b))
    return int(total) if total == total.to_integral_value() else total


def shortest(value: Wire) -> Exact:
    """What a value on the wire denotes: an int64 itself, a double its shortest decimal."""
    return value if isinstance(value, int) else Decimal(repr(value))


def units_of(quantity: Exact) -> tuple[int, int]:
    """(units, decimal places): the quantity is units * 10^-places, with the fewest places."""
    if isinstance(quantity, int):
        return quantity, 0
    shortest = EXACT.normalize(quantity)
    exponent = shortest.as_tuple().exponent
    assert isinstance(exponent, int)
    places = max(-exponent, 0)
    units = int(shortest if exponent >= 0 else EXACT.scaleb(shortest, places))
    return units, places


def scaled(quantity: Exact, places: int) -> int:
    """The quantity in units of 10^-places; it must not have more decimal places than these."""
    units, own = units_of(quantity)
    return int(units * 10 ** (places - own))


def unscaled(units: int, places: int) -> Exact:
    """The quantity of so many units of 10^-places, an int where it is integral."""
    whole, rest = divmod(units, 10**places)
    return whole if not rest else EXACT.scaleb(Decimal(units), -places)


def wire_parts(total: Exact) -> list[Wire]:
    """Values on the wire, all above 0, that denote `total` (> 0) together: one, but for sums over int64 and for
    fractions of more than about 17 digits. The same ones for the same total."""
    parts: list[Wire] = []
    while total:
        value, total = to_wire(total)
        parts.append(value)
    return parts


def to_wire(total: Exact) -> tuple[Wire, Exact]:
    """The largest value on the wire that denotes no more than `total` (>= 0), and the remainder (>= 0).

    Rounded down, never to nearest: a remainder below zero would have to go out as a negative increment of a
    monotonic sum. Neither has more decimal places than `total`, unless these are over `MAX_DECIMALS`.
    """
    if isinstance(total, int):
        whole = min(total, INT64_MAX)
        return whole, total - whole
    value = float(total)
    if shortest(value) > total:
        # The shortest decimal of the next double below lies under the midpoint of the two, hence under `total`.
        value = math.nextafter(value, 0.0)
    return value, EXACT.subtract(total, Decimal(repr(value)))


def few_wire_parts(total: Exact) -> list[Wire]:
    """As `wire_parts`, in few values however large the total is: about one for each 15 digits over int64."""
    parts: list[Wire] = []
    while total:
        whole = type(total) is int and total <= INT64_MAX
        value, rest = to_wire(total if whole else Decimal(total))
        parts.append(value)
        total = int(rest) if rest == int(rest) else rest
    return parts


def to_attribute(total: Exact) -> int | float | str:
    """A quantity as a span attribute: int64, else a double that denotes it exactly, else a decimal string."""
    if isinstance(total, int):
        return total if total <= INT64_MAX else str(total)
    value = float(total)
    return value if shortest(value) == total else text(total)


def from_attribute(value: object) -> Exact | None:
    """The quantity in a span attribute that `to_attribute` made; None when it is something else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return exact(value) if not isinstance(value, str) else _from_text(value)
    except (RefusedQuantityError, ArithmeticError):
        return None


def _from_text(digits: str) -> Exact:
    number = Decimal(digits)
    if not number.is_finite() or number < 0 or number.adjusted() > EXACT.prec // 2:
        raise RefusedQuantityError("it is not a quantity")
    return of_text(digits)


def text(amount: Exact) -> str:
    """The quantity in plain decimal digits."""
    return format(amount, "f") if isinstance(amount, Decimal) else str(amount)


def of_text(digits: str) -> Exact:
    """The inverse of `text`. Raises ArithmeticError for what is no number."""
    number = Decimal(digits)
    return int(number) if number == number.to_integral_value() else number
