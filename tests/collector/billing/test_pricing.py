"""Amounts are checked against integers and fractions, never against decimals."""

import decimal
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallymark_collector.billing.errors import CurrencyError, UsageError
from tallymark_collector.billing.money import line_amount, minor_digits, plain, read_number
from tallymark_collector.billing.plans import Plan
from tallymark_collector.billing.pricing import Priced, price

CALLS = ("calls", "{call}")


def plan_of(*charges: dict[str, object], currency: str = "EUR") -> Plan:
    meters = {str(charge["meter"]) for charge in charges if "meter" in charge}
    units = dict.fromkeys(meters, "{call}")
    return Plan.model_validate({"id": "p", "currency": currency, "units": units, "charges": charges})


def of_calls(priced: Priced) -> list[tuple[str, str, str]]:
    return [(plain(x.quantity), plain(x.unit_price), plain(x.amount)) for x in priced.lines if x.meter]


def half_up(exact: Fraction, digits: int) -> Fraction:
    minor_units = (exact * 10**digits * 2 + 1) // 2
    return Fraction(minor_units, 10**digits)


TIERS = [
    {"up_to": "1000", "unit_price": "0.05"},
    {"up_to": "5000", "unit_price": "0.03"},
    {"unit_price": "0.01"},
]


def test_an_invoice_by_hand():
    plan = plan_of(
        {"flat": "29.00", "name": "Base fee"},
        {"meter": "calls", "included": "10000", "unit_price": "0.0004", "name": "Calls"},
    )
    priced = price(plan, {CALLS: Decimal(12_345)})
    # In hundredths of a cent: 2,345 calls of 4 each are 9,380, so 93.80 cents, so 94 cents.
    assert (12_345 - 10_000) * 4 == 9_380
    assert [(x.description, plain(x.amount)) for x in priced.lines] == [
        ("Base fee", "29.00"),
        ("Calls, included (10,000 per period)", "0.00"),
        ("Calls", "0.94"),
    ]
    assert plain(priced.total) == "29.94"
    assert priced.lines[0].meter is None
    assert priced.lines[0].unit is None
    assert of_calls(priced) == [("10000", "0", "0.00"), ("2345", "0.0004", "0.94")]


@pytest.mark.parametrize(
    ("quantity", "quantities", "cents"),
    [
        (1, [1], 1 * 5),
        (999, [999], 999 * 5),
        (1_000, [1_000], 1_000 * 5),
        (1_001, [1_000, 1], 1_000 * 5 + 1 * 3),
        (4_999, [1_000, 3_999], 1_000 * 5 + 3_999 * 3),
        (5_000, [1_000, 4_000], 1_000 * 5 + 4_000 * 3),
        (5_001, [1_000, 4_000, 1], 1_000 * 5 + 4_000 * 3 + 1 * 1),
    ],
)
def test_graduated_at_and_beside_each_bound(quantity: int, quantities: list[int], cents: int):
    priced = price(plan_of({"meter": "calls", "graduated": TIERS}), {CALLS: Decimal(quantity)})
    assert [x.quantity for x in priced.lines] == quantities
    assert priced.total * 100 == cents


@pytest.mark.parametrize(
    ("quantity", "cents_each"),
    [(1, 5), (999, 5), (1_000, 5), (1_001, 3), (4_999, 3), (5_000, 3), (5_001, 1)],
)
def test_volume_at_and_beside_each_bound(quantity: int, cents_each: int):
    priced = price(plan_of({"meter": "calls", "volume": TIERS}), {CALLS: Decimal(quantity)})
    assert [x.quantity for x in priced.lines] == [quantity]
    assert priced.total * 100 == quantity * cents_each


def test_lines_say_which_tier_they_are():
    usage = {CALLS: Decimal(6_000)}
    graduated = price(plan_of({"meter": "calls", "graduated": TIERS}), usage)
    assert [x.description for x in graduated.lines] == [
        "calls, up to 1,000",
        "calls, above 1,000 up to 5,000",
        "calls, above 5,000",
    ]
    volume = price(plan_of({"meter": "calls", "volume": TIERS}), usage)
    assert [x.description for x in volume.lines] == ["calls, volume above 5,000"]


@pytest.mark.parametrize(
    ("quantity", "lines"),
    [
        (200, [(200, 0)]),
        (300, [(300, 0)]),
        (301, [(300, 0), (1, 5)]),
        (1_300, [(300, 0), (1_000, 5)]),
        (1_301, [(300, 0), (1_000, 5), (1, 3)]),
    ],
)
def test_tiers_count_from_the_first_unit_after_the_included_ones(quantity: int, lines: list[tuple[int, int]]):
    plan = plan_of({"meter": "calls", "included": 300, "graduated": TIERS})
    priced = price(plan, {CALLS: Decimal(quantity)})
    assert [(x.quantity, x.unit_price * 100) for x in priced.lines] == lines
    assert priced.total * 100 == sum(number * cents for number, cents in lines)


def test_included_units_do_not_count_towards_a_volume_tier():
    plan = plan_of({"meter": "calls", "included": 300, "volume": TIERS})
    assert price(plan, {CALLS: Decimal(1_300)}).total == 1_000 * 5 // 100
    assert price(plan, {CALLS: Decimal(1_301)}).total * 100 == 1_001 * 3


def test_a_tiers_own_fee_is_charged_once_for_each_tier_that_prices_something():
    tiers = [
        {"up_to": 10, "unit_price": "0", "flat": "5.00"},
        {"unit_price": "1", "flat": "7.00"},
    ]
    graduated, volume = ({"meter": "calls", kind: tiers} for kind in ("graduated", "volume"))
    totals = {
        quantity: [price(plan_of(charge), {CALLS: Decimal(quantity)}).total for charge in (graduated, volume)]
        for quantity in (0, 10, 12)
    }
    assert totals == {0: [0, 0], 10: [5, 5], 12: [5 + 7 + 2, 7 + 12]}
    fee = price(plan_of(volume), {CALLS: Decimal(12)}).lines[1]
    assert (fee.description, fee.meter, fee.quantity) == ("calls, volume above 10, tier fee", None, 1)


@pytest.mark.parametrize(
    "kind", [{"unit_price": "0.05"}, {"graduated": TIERS}, {"volume": TIERS}, {"unit_price": "0.05", "included": 9}]
)
def test_no_usage_is_a_line_that_says_so(kind: dict[str, object]):
    plan = plan_of({"flat": "1"}, {"meter": "calls", **kind})
    for usage in ({}, {CALLS: Decimal("-0.0")}):
        priced = price(plan, usage)
        assert of_calls(priced) == [("0", "0.05", "0.00")]
        assert plain(priced.total) == "1.00"


@pytest.mark.parametrize(("currency", "amount"), [("JPY", "2"), ("EUR", "1.50"), ("KWD", "1.500"), ("CLF", "1.5000")])
def test_amounts_have_the_decimals_of_iso_4217(currency: str, amount: str):
    priced = price(plan_of({"meter": "calls", "unit_price": "0.5"}, currency=currency), {CALLS: Decimal(3)})
    assert [plain(x.amount) for x in priced.lines] == [amount]
    assert plain(priced.total) == amount


def test_halves_round_up_whatever_the_digit_before_them():
    in_cents = {"0.005": "0.01", "0.015": "0.02", "0.025": "0.03", "0.0249999": "0.02", "1.0050": "1.01"}
    assert {text: plain(line_amount(Decimal(1), Decimal(text), 2)) for text in in_cents} == in_cents


def test_an_amount_is_exact_in_any_decimal_context():
    with decimal.localcontext(decimal.Context(prec=3, rounding=decimal.ROUND_UP)):
        amount = line_amount(Decimal("123456789"), Decimal("0.0100001"), 4)
    # In ten millionths; three of their digits are rounded away.
    assert 123_456_789 * 100_001 == 12_345_802_356_789
    assert plain(amount) == "1234580.2357"


def test_the_total_is_the_sum_of_rounded_lines():
    charges = [{"meter": name, "unit_price": "0.004"} for name in ("a", "b", "c")]
    priced = price(plan_of(*charges), {(name, "{call}"): Decimal(1) for name in "abc"})
    assert plain(priced.total) == "0.00"


@pytest.mark.parametrize("code", ["XAU", "XDR", "XXX", "eur", "EURO", ""])
def test_currencies_that_cannot_be_paid_are_refused(code: str):
    with pytest.raises(CurrencyError):
        minor_digits(code)


@pytest.mark.parametrize("text", ["-1", "-0.0000001", "NaN", "Infinity", "1E+60", "1E-61"])
def test_quantities_that_cannot_be_priced_are_refused(text: str):
    with pytest.raises(UsageError, match="calls"):
        price(plan_of({"meter": "calls", "graduated": TIERS}), {CALLS: Decimal(text)})


def test_refused_quantities_are_refused_also_where_the_plan_has_no_price():
    with pytest.raises(UsageError, match="negative"):
        price(plan_of({"flat": "1"}), {CALLS: Decimal(-1)})


def test_a_float_is_refused():
    with pytest.raises(UsageError, match="finite Decimal"):
        price(plan_of({"flat": "1"}), {CALLS: 0.1})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="plain digits"):
        read_number(0.1)


def test_what_the_plan_does_not_price_is_listed_with_its_unit():
    plan = plan_of({"meter": "calls", "unit_price": "1"})
    priced = price(plan, {CALLS: Decimal(2), ("calls", "ms"): Decimal(7), ("b", "By"): Decimal("1E+3")})
    assert plain(priced.total) == "2.00"
    assert [(x.meter, x.unit, plain(x.quantity), x.reason) for x in priced.unpriced] == [
        ("b", "By", "1000", "the plan has no charge for it"),
        ("calls", "ms", "7", "metered in ms, the plan's price is per {call}"),
    ]


quantities = st.builds(
    lambda digits, places: Decimal((0, tuple(map(int, str(digits))), -places)),
    st.integers(0, 10**40),
    st.integers(0, 30),
)
prices = st.decimals(0, 10_000, places=18).map(plain)


@st.composite
def tier_lists(draw: st.DrawFn) -> list[dict[str, str]]:
    bounds = sorted(draw(st.sets(st.integers(1, 10**18 - 1), max_size=4)))
    tiers = [{"up_to": str(bound), "unit_price": draw(prices)} for bound in bounds]
    return [*tiers, {"unit_price": draw(prices)}]


@given(quantity=st.integers(0, 60), bounds=st.sets(st.integers(1, 50), max_size=4), data=st.data())
def test_graduated_equals_pricing_unit_by_unit(quantity: int, bounds: set[int], data: st.DataObject):
    cents = data.draw(st.lists(st.integers(0, 99), min_size=len(bounds) + 1, max_size=len(bounds) + 1))
    tiers: list[dict[str, object]] = [
        {"up_to": bound, "unit_price": f"0.{each:02}"} for bound, each in zip(sorted(bounds), cents, strict=False)
    ]
    tiers.append({"unit_price": f"0.{cents[-1]:02}"})
    expected = sum(cents[sum(unit > bound for bound in bounds)] for unit in range(1, quantity + 1))
    priced = price(plan_of({"meter": "calls", "graduated": tiers}), {CALLS: Decimal(quantity)})
    assert priced.total * 100 == expected


@given(quantities, tier_lists(), st.integers(0, 10**6), st.sampled_from(["JPY", "EUR", "KWD", "CLF"]))
def test_graduated_equals_fractions(quantity: Decimal, tiers: list[dict[str, str]], included: int, currency: str):
    priced = price(
        plan_of({"meter": "calls", "graduated": tiers, "included": included}, currency=currency),
        {CALLS: quantity},
    )
    # Another formula: every bound that is passed changes the price of all that lies above it.
    left = max(Fraction(quantity) - included, Fraction(0))
    bounds = [0, *(int(tier["up_to"]) for tier in tiers[:-1])]
    steps = [Fraction(tier["unit_price"]) for tier in tiers]
    changes = [later - before for before, later in zip([0, *steps], steps, strict=False)]
    expected = sum(max(left - bound, 0) * change for bound, change in zip(bounds, changes, strict=True))
    assert sum(Fraction(x.quantity) * Fraction(x.unit_price) for x in priced.lines) == expected
    assert sum(Fraction(x.quantity) for x in priced.lines) == Fraction(quantity)
    digits = {"JPY": 0, "EUR": 2, "KWD": 3, "CLF": 4}[currency]
    for line in priced.lines:
        assert Fraction(line.amount) == half_up(Fraction(line.quantity) * Fraction(line.unit_price), digits)
    assert Fraction(priced.total) == sum(Fraction(x.amount) for x in priced.lines)
    assert priced.total.as_tuple().exponent == -digits


@given(quantities, tier_lists(), st.integers(0, 10**6))
def test_volume_equals_fractions(quantity: Decimal, tiers: list[dict[str, str]], included: int):
    priced = price(plan_of({"meter": "calls", "volume": tiers, "included": included}), {CALLS: quantity})
    left = max(Fraction(quantity) - included, Fraction(0))
    passed = sum(left > int(tier["up_to"]) for tier in tiers[:-1])
    assert Fraction(priced.total) == half_up(left * Fraction(tiers[passed]["unit_price"]), 2)
    assert sum(Fraction(x.quantity) for x in priced.lines) == Fraction(quantity)


@given(quantities, tier_lists())
def test_the_callers_decimal_context_changes_nothing(quantity: Decimal, tiers: list[dict[str, str]]):
    def result() -> tuple[str, object]:
        plan = plan_of({"meter": "calls", "included": 1234, "graduated": tiers})
        return plan.version, price(plan, {CALLS: quantity}), plain(quantity)

    usual = result()
    with decimal.localcontext(decimal.Context(prec=3, rounding=decimal.ROUND_UP, Emax=9, Emin=-9)):
        assert result() == usual
