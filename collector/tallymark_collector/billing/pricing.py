"""Usage and a plan make lines. Value in, value out; rounding is `money.line_amount`, once per line.

What holds for every result:

- a line's amount is its quantity times its unit price, rounded to the currency's minor unit;
- the total is the sum of the lines' amounts;
- over the lines of a priced meter the quantities add up to what was metered, included units among them
  (a line of their own, at the price 0);
- what the plan has no price for is in `unpriced`, never dropped.

A line with a meter counts usage. A line without one is a fee, of quantity 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from tallymark_collector.billing.errors import UsageError
from tallymark_collector.billing.money import MAX_QUANTITY_DIGITS, exact, grouped, line_amount, minor_digits
from tallymark_collector.billing.plans import (
    ZERO,
    FlatFee,
    Graduated,
    MeteredCharge,
    PerUnit,
    Plan,
    Tier,
)

ONE = Decimal(1)


@dataclass(frozen=True)
class Line:
    """One line of an invoice. `meter`, `unit` and `aggregation` are None for a fee; the amount has the currency's
    decimals. `unit` is what the quantity counts: of a count or of unique values that is not the meter's own."""

    description: str
    meter: str | None
    unit: str | None
    quantity: Decimal
    unit_price: Decimal
    amount: Decimal
    aggregation: str | None = None
    """`sum`, `max`, `unique user.id`, …"""


@dataclass(frozen=True)
class Unpriced:
    """Usage that the plan has no price for, and why."""

    meter: str
    unit: str
    quantity: Decimal
    reason: str


@dataclass(frozen=True)
class Priced:
    """The lines in the order of the plan's charges, their total, and what was not priced, by meter and unit."""

    lines: tuple[Line, ...]
    total: Decimal
    unpriced: tuple[Unpriced, ...]


_Part = tuple[str, Decimal, Decimal, bool]
"""Description, quantity, unit price, and whether it counts usage (else it is a fee)."""


def price(plan: Plan, usage: Mapping[tuple[str, str], Decimal]) -> Priced:
    """Prices a period's usage: (meter, unit) → quantity, by the plan's aggregation where it has one, the unit always
    as it is metered. A priced meter without usage gets a line of quantity 0.

    Raises `UsageError` for a quantity that is negative (a correction belongs into the usage that it corrects,
    before it is priced), not finite, or longer than `MAX_QUANTITY_DIGITS` on a side of its point.
    """
    quantities = {key: _checked(*key, quantity) for key, quantity in usage.items()}
    digits = minor_digits(plan.currency)
    lines: list[Line] = []
    for charge in plan.charges:
        if isinstance(charge, FlatFee):
            parts: Iterator[_Part] = iter([(charge.name or "Flat fee", ONE, charge.flat, False)])
            meter, unit, aggregation = None, None, None
        else:
            meter, metered = charge.meter, plan.units[charge.meter]
            aggregated = plan.aggregations.get(meter)
            unit = aggregated.unit(metered) if aggregated else metered
            aggregation = str(aggregated or "sum")
            parts = _parts(charge, quantities.get((meter, metered), ZERO))
        # Iterating runs the generators, so their arithmetic is in the exact context as well.
        with exact():
            lines += [
                Line(
                    description,
                    meter if counts else None,
                    unit if counts else None,
                    quantity,
                    unit_price,
                    line_amount(quantity, unit_price, digits),
                    aggregation if counts else None,
                )
                for description, quantity, unit_price, counts in parts
            ]
    with exact():
        total = sum((line.amount for line in lines), start=Decimal((0, (0,), -digits)))
    return Priced(tuple(lines), total, tuple(_unpriced(plan, quantities)))


def _checked(meter: str, unit: str, quantity: object) -> Decimal:
    if not isinstance(quantity, Decimal) or not quantity.is_finite():
        raise UsageError(f"{meter} ({unit}): expected a finite Decimal, got {quantity!r}")
    if not quantity:
        return ZERO
    if quantity < 0:
        raise UsageError(f"{meter} ({unit}): {quantity} is negative; correct the usage itself, then price it")
    exponent = quantity.as_tuple().exponent
    decimals = -exponent if isinstance(exponent, int) else 0
    if quantity.adjusted() >= MAX_QUANTITY_DIGITS or decimals > MAX_QUANTITY_DIGITS:
        raise UsageError(f"{meter} ({unit}): more than {MAX_QUANTITY_DIGITS} digits before or after the point")
    return quantity


def _parts(charge: MeteredCharge, quantity: Decimal) -> Iterator[_Part]:
    """The charge's lines before rounding. Included units come first; tiers see what is left."""
    name = charge.name or charge.meter
    free = min(quantity, charge.included)
    left = quantity - free
    if free:
        yield f"{name}, included ({grouped(charge.included)} per period)", free, ZERO, True
    if free and not left:
        return
    if isinstance(charge, PerUnit):
        yield name, left, charge.unit_price, True
    elif isinstance(charge, Graduated):
        yield from _graduated(name, charge.graduated, left)
    else:
        yield from _volume(name, charge.volume, left)


def _graduated(name: str, tiers: Sequence[Tier], quantity: Decimal) -> Iterator[_Part]:
    below = ZERO
    for tier in tiers:
        upper = quantity if tier.up_to is None else min(quantity, tier.up_to)
        # Without usage, the first tier's line says so with a quantity of 0.
        yield from _tier(f"{name}, {_range(below, tier)}", tier, upper - below)
        if upper == quantity:
            return
        below = upper


def _volume(name: str, tiers: Sequence[Tier], quantity: Decimal) -> Iterator[_Part]:
    below = ZERO
    for tier in tiers:
        if tier.up_to is None or quantity <= tier.up_to:
            yield from _tier(f"{name}, volume {_range(below, tier)}", tier, quantity)
            return
        below = tier.up_to


def _tier(description: str, tier: Tier, quantity: Decimal) -> Iterator[_Part]:
    yield description, quantity, tier.unit_price, True
    if tier.flat and quantity:
        yield f"{description}, tier fee", ONE, tier.flat, False


def _range(below: Decimal, tier: Tier) -> str:
    if tier.up_to is None:
        return f"above {grouped(below)}" if below else "any quantity"
    return f"above {grouped(below)} up to {grouped(tier.up_to)}" if below else f"up to {grouped(tier.up_to)}"


def _unpriced(plan: Plan, quantities: Mapping[tuple[str, str], Decimal]) -> Iterator[Unpriced]:
    for (meter, unit), quantity in sorted(quantities.items()):
        priced_in = plan.units.get(meter)
        if priced_in == unit or not quantity:
            continue
        reason = "the plan has no charge for it"
        if priced_in is not None:
            reason = f"metered in {unit or 'no unit'}, the plan's price is per {priced_in or 'unit'}"
        yield Unpriced(meter, unit, quantity, reason)
