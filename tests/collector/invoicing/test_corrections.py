"""Differences of bills: added to what was billed they are the other bill, line by line, exactly."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from tallymark_collector.billing.plans import Plan
from tallymark_collector.billing.pricing import Line, price
from tallymark_collector.invoicing.corrections import difference, total

CHARGES = [
    {"flat": "3.50"},
    {"flat": "3.50"},
    {"meter": "a", "included": "7.5", "unit_price": "0.012345678901234567"},
    {
        "meter": "b",
        "graduated": [
            {"up_to": "10", "unit_price": "0.333", "flat": "1.00"},
            {"up_to": "20", "unit_price": "0.333"},
            {"unit_price": "0.1"},
        ],
    },
    {"meter": "c", "volume": [{"up_to": "100", "unit_price": "0.05"}, {"unit_price": "0.049", "flat": "0.10"}]},
]
PLAN = Plan.from_document({"id": "p", "currency": "EUR", "charges": CHARGES, "units": {"a": "1", "b": "By", "c": ""}})
QUANTITIES = st.decimals(0, 500, allow_nan=False, allow_infinity=False, places=9)
USAGE = st.fixed_dictionaries({("a", "1"): QUANTITIES, ("b", "By"): QUANTITIES, ("c", ""): QUANTITIES})


def added(*bills: tuple[Line, ...]) -> tuple[Counter[tuple[object, ...]], Counter[tuple[object, ...]]]:
    """Quantities and amounts by all else that lines say, by fractions."""
    quantities: Counter[tuple[object, ...]] = Counter()
    amounts: Counter[tuple[object, ...]] = Counter()
    for line in (line for bill in bills for line in bill):
        key = (line.description, line.meter, line.unit, line.aggregation, Fraction(line.unit_price))
        quantities[key] += Fraction(line.quantity)  # type: ignore[assignment]
        amounts[key] += Fraction(line.amount)  # type: ignore[assignment]
    zeros = {key for key in quantities if not (quantities[key] or amounts[key])}
    return tuple(Counter({k: v for k, v in one.items() if k not in zeros}) for one in (quantities, amounts))  # type: ignore[return-value]


@given(st.lists(USAGE, min_size=2, max_size=5))
def test_a_bill_and_its_corrections_are_the_last_bill(states: list[dict[tuple[str, str], Decimal]]) -> None:
    bills = [price(PLAN, usage) for usage in states]
    documents = [bills[0].lines]
    for bill in bills[1:]:
        lines = difference(bill.lines, [line for document in documents for line in document])
        assert all(line.quantity or line.amount for line in lines)
        documents.append(lines)
        assert added(*documents) == added(bill.lines)
        assert sum(Fraction(total(each, 2)) for each in documents) == Fraction(bill.total)
        assert difference(bill.lines, [line for document in documents for line in document]) == ()


def test_a_price_written_with_more_zeros_is_the_same_line() -> None:
    one = Line("x", "a", "1", Decimal(2), Decimal("0.10"), Decimal("0.20"), "sum")
    assert difference([one], [Line("x", "a", "1", Decimal("2.0"), Decimal("0.1"), Decimal("0.20"), "sum")]) == ()


def test_a_line_that_is_no_more_is_taken_back() -> None:
    fee = Line("tier fee", None, None, Decimal(1), Decimal("2.00"), Decimal("2.00"))
    [back] = difference([], [fee])
    assert (back.description, back.quantity, back.unit_price, back.amount) == ("tier fee", -1, 2, Decimal("-2.00"))
    assert str(total([back], 2)) == "-2.00"
    assert str(total([], 3)) == "0.000"
