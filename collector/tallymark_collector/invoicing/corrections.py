"""The difference between a period's bill as it would be now and what was billed of it, as lines.

Lines are told apart by all that they say but quantity and amount. A line of the difference has the quantities' and the
amounts' difference: both bills were rounded at the line, so its amount may be a minor unit beside its own quantity
times its price, and what was billed and its corrections always add up to the bill as it would be made now.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from decimal import Decimal

from tallymark_collector.billing.money import exact
from tallymark_collector.billing.pricing import Line


def difference(now: Iterable[Line], billed: Iterable[Line]) -> tuple[Line, ...]:
    """What has to be billed (or, where amounts are negative, credited) beside `billed` so that it is `now`.

    In the order of `now`, then of what is not on it any more. What is on both alike is left out."""
    with exact():
        wanted, given = _added(now), _added(billed)
        return tuple(_changed(wanted, given))


def total(lines: Iterable[Line], digits: int) -> Decimal:
    """The sum of the lines' amounts, with the currency's decimals."""
    with exact():
        return sum((line.amount for line in lines), start=Decimal((0, (0,), -digits)))


def _added(lines: Iterable[Line]) -> dict[Line, Line]:
    found: dict[Line, Line] = {}
    for line in lines:
        key = replace(line, quantity=Decimal(0), unit_price=line.unit_price.normalize(), amount=Decimal(0))
        before = found.get(key)
        found[key] = (
            line
            if before is None
            else replace(line, quantity=before.quantity + line.quantity, amount=before.amount + line.amount)
        )
    return found


def _changed(wanted: dict[Line, Line], given: dict[Line, Line]) -> Iterator[Line]:
    for key in [*wanted, *(key for key in given if key not in wanted)]:
        line = wanted.get(key) or given[key]
        quantity = _of(wanted, key).quantity - _of(given, key).quantity
        amount = _of(wanted, key).amount - _of(given, key).amount
        if quantity or amount:
            yield replace(line, quantity=quantity, amount=amount)


def _of(lines: dict[Line, Line], key: Line) -> Line:
    return lines.get(key, key)
