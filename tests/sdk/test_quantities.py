import decimal
import enum
import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tallymark.conventions import MAX_DECIMALS
from tallymark.quantities import (
    INT64_MAX,
    RefusedQuantityError,
    add,
    exact,
    from_attribute,
    places_of,
    shortest,
    to_attribute,
    to_wire,
    wire_parts,
)
from tallymark_collector.processors.validation import check_quantity
from tallymark_collector.wire import shortest_decimal

decimals = st.decimals(min_value=0, max_value=10**18, places=30) | st.decimals(min_value=0, max_value=10, places=12)
amounts = (
    st.integers(0, INT64_MAX)
    | decimals
    | st.floats(0, 1e18, allow_subnormal=False).filter(lambda x: places_of(Decimal(repr(x))) <= MAX_DECIMALS)
)
fine = st.integers(1, 10**24).map(lambda units: exact(Decimal(units).scaleb(-MAX_DECIMALS)))


class Count(enum.IntEnum):
    THREE = 3


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (0, 0),
        (INT64_MAX, INT64_MAX),
        (2.0, 2),
        (-0.0, 0),
        (0.1, Decimal("0.1")),
        (1e18, 10**18),
        (Decimal("2.50"), Decimal("2.5")),
        (Decimal("1E+3"), 1000),
        (Decimal("1E-30"), Decimal("1E-30")),
        (Decimal("7." + 40 * "0"), 7),
        (Decimal("0.5" + 40 * "0"), Decimal("0.5")),
        (Count.THREE, 3),
    ],
)
def test_what_a_quantity_becomes(value: object, want: object) -> None:
    got = exact(value)
    assert got == want
    assert type(got) is type(want)


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        Decimal("NaN"),
        Decimal("sNaN"),
        Decimal("Infinity"),
        Decimal("1E+999999"),
        Decimal("-1E+999999999999999999"),
        Decimal("-1E-999999"),
        Decimal("1E-999999"),
        Decimal("1E-31"),
        pytest.param(10**100_000, id="int of 100,001 digits"),
        pytest.param(-(10**100_000), id="negative int of 100,001 digits"),
        Decimal("1.0000000000000000000000000000001"),
        Decimal((0, (1, 5), -2000)),
        1.2345678901234567e-15,
        5e-324,
        -1,
        -0.5,
        Decimal("-1"),
        2**63,
        1e19,
        True,
        False,
        None,
        "1",
        b"1",
        1j,
        Fraction(1, 2),
        [],
        object(),
    ],
)
def test_what_is_refused(value: object) -> None:
    with pytest.raises(RefusedQuantityError):
        exact(value)


class NeverWhole(Decimal):
    """As an int it would be a million digits, and the process stand still until they are there."""

    def __int__(self) -> int:
        raise AssertionError(f"{self:.1E} was made an int")


@pytest.mark.parametrize(
    ("digits", "reason"),
    [
        ("1E+999999", "over"),
        ("-1E+500000", "negative"),
        ("-1E+999999", "negative"),
        ("-" + "9" * 10_000, "negative"),
        ("9" * 10_000, "over"),
        ("0." + "1" * 10_000, "decimal places"),
        ("-0." + "1" * 10_000, "negative"),
    ],
)
def test_what_is_out_of_range_is_refused_before_it_is_made_an_int(digits: str, reason: str) -> None:
    with pytest.raises(RefusedQuantityError, match=reason):
        exact(NeverWhole(digits))


def test_a_tenth_ten_times_is_one() -> None:
    total = exact(0)
    for _ in range(10):
        total = add(total, exact(0.1))
    assert total == 1
    assert type(total) is int


def test_the_decimal_context_of_the_host_does_not_round_usage() -> None:
    with decimal.localcontext() as host:
        host.prec = 3
        host.rounding = decimal.ROUND_UP
        host.traps[decimal.Inexact] = True
        total = add(exact(Decimal("123456789.123456789")), exact(0.1))
        assert str(total) == "123456789.223456789"
        value, remainder = to_wire(total)
        assert value == 123456789.22345679 or shortest(value) <= total
        assert add(shortest(value), remainder) == total


@given(amounts)
def test_wire_value_and_remainder_are_the_amount(amount: object) -> None:
    total = exact(amount)
    value, remainder = to_wire(total)
    assert value >= 0
    assert remainder >= 0
    assert add(shortest(value), remainder) == total
    assert isinstance(value, float) or value <= INT64_MAX


@given(fine | amounts)
@example(Decimal("0.00000000000000" + "9999999999999999"))
@example(Decimal("0.0000000000000" + "93206534790699863"))
def test_the_collector_takes_every_part(amount: object) -> None:
    """Both sides have one limit, and what the SDK makes of a quantity within it stays within it."""
    total = exact(amount)
    parts = wire_parts(total)
    assert [check_quantity(shortest_decimal(float(part))) for part in parts if isinstance(part, float)] == [None] * sum(
        isinstance(part, float) for part in parts
    )
    sent = exact(0)
    for part in parts:
        sent = add(sent, shortest(part))
    assert sent == total


@given(st.lists(amounts, max_size=20))
def test_remainders_run_out(given_amounts: list[object]) -> None:
    total = exact(0)
    for amount in given_amounts:
        total = add(total, exact(amount))
    sent: int | Decimal = 0
    left = total
    for _ in range(64):
        if not left:
            break
        value, left = to_wire(left)
        assert value > 0
        sent = add(sent, shortest(value))
    assert left == 0
    assert sent == total


def test_a_decimal_that_no_double_denotes_goes_out_in_parts() -> None:
    total = exact(Decimal("0.12345678901234567890123456789"))
    value, remainder = to_wire(total)
    assert shortest(value) < total
    assert 0 < remainder < Decimal("1e-15")


def test_a_double_that_would_round_up_is_rounded_down() -> None:
    total = Decimal("0.99999999999999999999")  # the nearest double is 1.0
    value, remainder = to_wire(total)
    assert value == math.nextafter(1.0, 0.0)
    assert remainder == total - Decimal(repr(value))


@given(amounts)
def test_span_attributes_are_read_back_exactly(amount: object) -> None:
    total = exact(amount)
    assert from_attribute(to_attribute(total)) == total


@pytest.mark.parametrize("value", [None, True, "many", "NaN", "-1", "1e999999", math.nan, [1]])
def test_what_is_no_quantity_on_a_span(value: object) -> None:
    assert from_attribute(value) is None
