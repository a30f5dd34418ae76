"""Exact factors between what is measured and what is billed."""

from __future__ import annotations

import decimal
import re
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Final

from pydantic import PlainValidator

from tallymark import conventions
from tallymark_collector.documents.fields import wrong

MAX_WHOLE_DIGITS: Final = 18
"""Digits before the point of a factor. Behind it are at most `conventions.MAX_DECIMALS`, as of a quantity."""

# Doubles lie between 1e309 and 1e-340; the rest is the factor's.
_EXACT: Final = decimal.Context(prec=1000, traps=[decimal.Inexact, decimal.InvalidOperation, decimal.DivisionByZero])
_FACTOR: Final = re.compile(r"([0-9]{1,40}(?:\.[0-9]{1,40})?)(?:\s*/\s*([0-9]{1,40}(?:\.[0-9]{1,40})?))?", re.ASCII)


def scaled(value: Decimal, factor: Decimal) -> Decimal:
    """The product, exactly. Zeros at its end that no quantity has room for are left out."""
    product = _EXACT.multiply(value, factor)
    exponent = product.as_tuple().exponent
    assert isinstance(exponent, int), "only finite values come here"
    return product if exponent >= -conventions.MAX_DECIMALS else product.normalize(_EXACT)


def read_factor(value: object) -> Decimal:
    """A factor as it is written: "1000", "0.001", "1/1000". Raises pydantic's error where it is not exact."""
    if isinstance(value, Decimal):
        return value
    found = _FACTOR.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise wrong(f"expected an exact factor, e.g. 1000, 0.001 or 1/1000, got {str(value)[:40]!r}")
    above, below = Fraction(found[1]), Fraction(found[2] or 1)
    if not above or not below:
        raise wrong(f"{value} is no factor: it must be above 0")
    ratio = above / below
    rest = ratio.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        raise wrong(
            f"{value} is no finite decimal, so no quantity times it would be exact; bill in the measured unit, and put"
            " the ratio into the price"
        )
    factor = _EXACT.divide(Decimal(ratio.numerator), Decimal(ratio.denominator))
    exponent = factor.as_tuple().exponent
    assert isinstance(exponent, int), "a quotient of integers is finite"
    if exponent < -conventions.MAX_DECIMALS or factor.adjusted() >= MAX_WHOLE_DIGITS:
        raise wrong(
            f"{value} has more than {MAX_WHOLE_DIGITS} digits before or {conventions.MAX_DECIMALS} after the point"
        )
    return factor


Factor = Annotated[Decimal, PlainValidator(read_factor)]
