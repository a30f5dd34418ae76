"""Exact numbers: how they are read, multiplied, rounded and written.

**The rounding rule, the only one.** The amount of an invoice line is its exact quantity times its exact unit
price, rounded half up (away from zero) to the currency's minor unit as ISO 4217 lists it: 2 decimals for EUR,
0 for JPY, 3 for KWD, 4 for CLF. A total is the sum of rounded lines and is not rounded again.

Everything else is exact, and provably so: arithmetic runs in `exact()`, which raises rather than rounds. The
caller's own decimal context never takes part.
"""

import decimal
import re
from contextlib import AbstractContextManager
from decimal import Decimal

from iso4217 import Currency

from tallymark_collector.billing.errors import CurrencyError

MAX_WHOLE_DIGITS = 18
"""Digits before the decimal point of a price, a fee, a tier's bound or an included quantity."""

MAX_DECIMALS = 18
"""Digits after the decimal point of the same: a price per byte is small."""

MAX_QUANTITY_DIGITS = 60
"""Digits of a metered quantity before its decimal point, and again as many after it."""

# A product has at most 2 * 60 + 18 + 18 digits. The rest is headroom for sums; were it ever too little, the
# trap on Inexact would turn the loss into an error.
_DIGITS = 250

_TRAPS = [decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow, decimal.Inexact]
# Every field is given: one that is left out would come from decimal.DefaultContext, which anyone may change.
_EXACT = decimal.Context(
    prec=_DIGITS,
    rounding=decimal.ROUND_HALF_UP,
    Emin=-999_999,
    Emax=999_999,
    capitals=1,
    clamp=0,
    flags=[],
    traps=_TRAPS,
)
_ROUNDING = _EXACT.copy()
_ROUNDING.traps[decimal.Inexact] = False

# One pass and no nested repetition: a long wrong text costs no more than a short one.
_NUMBER = re.compile(r"(-?)([0-9][0-9_]*)(?:\.([0-9]+))?")


def exact() -> AbstractContextManager[decimal.Context]:
    """A context for arithmetic that may not round: `decimal.Inexact` is raised instead."""
    return decimal.localcontext(_EXACT)


def minor_digits(currency: str) -> int:
    """Decimals of the currency's minor unit by ISO 4217 (EUR 2, JPY 0, KWD 3). Raises `CurrencyError`."""
    try:
        digits = Currency(currency).exponent
    except ValueError:
        upper = currency.upper()
        known = upper in {each.code for each in Currency}
        hint = f"did you mean {upper}?" if known else "write its three capital letters, e.g. EUR"
        raise CurrencyError(f"{currency!r} is not a currency of ISO 4217; {hint}") from None
    if digits is None:
        raise CurrencyError(f"{currency} has no minor unit in ISO 4217, so no amount can be paid in it")
    return digits


def line_amount(quantity: Decimal, unit_price: Decimal, digits: int) -> Decimal:
    """The rounding rule above. `digits` is the currency's `minor_digits`; the result has exactly so many."""
    with exact():
        product = quantity * unit_price
        minor_unit = Decimal((0, (1,), -digits))
    return product.quantize(minor_unit, rounding=decimal.ROUND_HALF_UP, context=_ROUNDING)


def plain(number: Decimal) -> str:
    """Digits and a point, all decimals kept, never an exponent: `Decimal("1E-7")` is "0.0000001"."""
    return format(number, "f")


def canonical(number: Decimal) -> str:
    """`plain` without what does not change the value: "0.10" is "0.1", "29.00" is "29"."""
    text = plain(number)
    return text.rstrip("0").rstrip(".") if "." in text else text


def grouped(number: Decimal) -> str:
    """For people: `Decimal("1000000")` is "1,000,000"."""
    return format(number, ",f")


def read_number(value: object) -> Decimal:
    """A non-negative number of the catalogue: text such as "0.0005" or "1_000_000", an `int`, a `Decimal`.

    Raises `ValueError` on anything else, floats included: their decimals are not the ones that were written.
    """
    if isinstance(value, Decimal) and value.is_finite():
        # "-0" is the zero that it equals.
        text = plain(value) if value else plain(value.copy_abs())
    elif isinstance(value, int) and not isinstance(value, bool):
        text = str(value)
    elif isinstance(value, str):
        text = value
    else:
        raise ValueError(f"expected a number in plain digits, e.g. 0.0005, not {_named(value)}")
    found = _NUMBER.fullmatch(text)
    if not found:
        raise ValueError(f"{_shortened(text)!r} is not a number in plain digits; write it like 0.0005 or 1_000_000")
    sign, whole, decimals = found[1], found[2].replace("_", ""), found[3] or ""
    if sign:
        raise ValueError(f"must not be negative, got {_shortened(text)}")
    if len(whole) > MAX_WHOLE_DIGITS:
        raise ValueError(f"at most {MAX_WHOLE_DIGITS} digits before the point, got {len(whole)}")
    if len(decimals) > MAX_DECIMALS:
        raise ValueError(f"at most {MAX_DECIMALS} decimals, got {len(decimals)}")
    return Decimal(f"{whole}.{decimals}" if decimals else whole)


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def _named(value: object) -> str:
    names = {type(None): "nothing", dict: "a mapping", list: "a list", tuple: "a list"}
    return names.get(type(value), f"{value!r}")
