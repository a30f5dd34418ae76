import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import tallymark_collector.billing as billing
from tallymark_collector.billing.plans import Graduated, Plan, Subscription


def document(**changes: Any) -> dict[str, Any]:
    return {
        "id": "pro",
        "name": "Pro",
        "currency": "EUR",
        "units": {"calls": "{call}", "bytes": "By"},
        "charges": [
            {"name": "Base fee", "flat": "29.00"},
            {"meter": "calls", "included": "1000", "unit_price": "0.0000001"},
            {
                "meter": "bytes",
                "graduated": [{"up_to": "10", "unit_price": "2", "flat": "1.50"}, {"unit_price": "1"}],
            },
        ],
        **changes,
    }


def test_a_document_comes_back_as_it_was():
    plan = Plan.from_document(document())
    assert isinstance(plan.charges[2], Graduated)
    assert plan.to_document() == document()
    assert Plan.from_document(json.loads(json.dumps(plan.to_document()))) == plan


@given(st.decimals(0, 10**6, places=18), st.integers(1, 10**18 - 1), st.sampled_from(["graduated", "volume"]))
def test_every_number_survives_the_document(price: Any, bound: int, kind: str):
    charge = {"meter": "calls", "included": price, kind: [{"up_to": bound, "unit_price": price}, {"unit_price": 0}]}
    plan = Plan.from_document(document(charges=[charge], units={"calls": ""}))
    text = json.dumps(plan.to_document())
    assert Plan.from_document(json.loads(text)) == plan
    assert Plan.from_document(json.loads(text)).version == plan.version


@pytest.mark.parametrize(
    "terms",
    [
        {"anchor_day": 31},
        {"cycle": "yearly", "anchor_day": 29, "anchor_month": 2},
        {"cycle": "yearly", "anchor_day": 1, "anchor_month": 1},
        {"cycle": "weekly", "anchor_weekday": "sunday"},
    ],
)
def test_subscriptions_come_back_too(terms: dict[str, Any]):
    written = {
        "account": "acme",
        "plan": "pro",
        "time_zone": "Asia/Tokyo",
        **terms,
        "since": "2026-01-31",
        "until": "2027-01-31",
    }
    assert Subscription.from_document(written).to_document() == written


def test_the_version_follows_the_content():
    version = Plan.from_document(document()).version
    reordered = document(units={"bytes": "By", "calls": "{call}"})
    rewritten = document()
    rewritten["charges"][0]["flat"] = "29.0"
    assert {Plan.from_document(each).version for each in (reordered, rewritten)} == {version}
    dearer = document()
    dearer["charges"][1]["unit_price"] = "0.0000002"
    others = [dearer, document(name="Max"), document(charges=document()["charges"][::-1]), document(currency="USD")]
    versions = {Plan.from_document(each).version for each in others}
    assert len(versions - {version}) == len(others)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"currency": "XAU"}, "no minor unit"),
        ({"currency": "JPY"}, "29.00 has 2 decimals, the currency has 0"),
        ({"currency": "KRW", "charges": document()["charges"][1:]}, "1.50 has 2 decimals"),
        ({"units": {"calls": "{call}"}}, "units are needed"),
        ({"units": {"calls": "", "bytes": "", "more": ""}}, "units are needed"),
        ({"charges": [{"flat": 1.5}], "units": {}}, "plain digits"),
        ({"charges": [{"flat": "1", "unit_price": "1"}], "units": {}}, "exactly one of"),
        ({"nmae": "x"}, "Extra inputs"),
    ],
)
def test_what_breaks_a_rule_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        Plan.from_document(document(**changes))


def test_plans_are_frozen():
    plan = Plan.from_document(document())
    with pytest.raises(ValidationError, match="frozen"):
        plan.currency = "USD"


def test_public_names():
    assert billing.__all__ == sorted(billing.__all__)
    assert set(billing.__all__) == {
        "Catalog",
        "CatalogError",
        "Invoice",
        "Period",
        "Plan",
        "Subscription",
        "build_invoice",
        "period_containing",
        "periods_between",
        "read_catalog",
    }
