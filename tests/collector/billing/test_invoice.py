import json
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import pytest

from tallymark_collector.billing import Catalog, Invoice, build_invoice, period_containing
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.billing.errors import BillingError
from tallymark_collector.billing.periods import Period, billing_period

FILE = """
currency: EUR
meters:
  api.requests: {unit: "{request}"}
  egress: {unit: By}
plans:
  pro:
    name: Pro
    charges:
      - {flat: 29.00, name: Base fee}
      - {meter: api.requests, included: 100, unit_price: 0.0004, name: Requests}
  free: {charges: []}
accounts:
  acme: {plan: pro, since: 2026-01-20, anchor_day: 15, time_zone: Europe/Zurich}
"""


@pytest.fixture
def catalog() -> Catalog:
    return parse_catalog(FILE)


def invoice(catalog: Catalog, usage: dict[tuple[str, str], Decimal]) -> Invoice:
    subscription = catalog.subscriptions[0]
    return build_invoice(subscription, catalog.plans["pro"], billing_period(subscription, 0), usage)


def test_the_document(catalog: Catalog):
    usage = {("api.requests", "{request}"): Decimal("1E+4"), ("egress", "By"): Decimal("1E-7")}
    document = invoice(catalog, usage).to_document()
    # 9,900 requests of 4 hundredths of a cent: 39,600 of them, so 396 cents.
    assert document == {
        "account": "acme",
        "plan": "pro",
        "plan_name": "Pro",
        "plan_version": catalog.plans["pro"].version,
        "period": {
            "index": 0,
            "start": "2026-01-19T23:00:00Z",
            "end": "2026-02-14T23:00:00Z",
            "cycle": "monthly",
            "time_zone": "Europe/Zurich",
        },
        "currency": "EUR",
        "lines": [
            {
                "description": "Base fee",
                "meter": None,
                "unit": None,
                "aggregation": None,
                "quantity": "1",
                "unit_price": "29.00",
                "amount": "29.00",
            },
            {
                "description": "Requests, included (100 per period)",
                "meter": "api.requests",
                "unit": "{request}",
                "aggregation": "sum",
                "quantity": "100",
                "unit_price": "0",
                "amount": "0.00",
            },
            {
                "description": "Requests",
                "meter": "api.requests",
                "unit": "{request}",
                "aggregation": "sum",
                "quantity": "9900",
                "unit_price": "0.0004",
                "amount": "3.96",
            },
        ],
        "total": "32.96",
        "unpriced": [
            {
                "meter": "egress",
                "unit": "By",
                "quantity": "0.0000001",
                "reason": "the plan has no charge for it",
            }
        ],
        "remarks": [],
    }
    assert json.loads(json.dumps(document)) == document


def test_another_unit_is_not_priced_and_not_lost(catalog: Catalog):
    result = invoice(catalog, {("api.requests", "By"): Decimal(5)})
    assert str(result.total) == "29.00"
    assert [(entry.unit, entry.quantity) for entry in result.unpriced] == [("By", 5)]


def test_another_plan_or_period_is_refused(catalog: Catalog):
    subscription = catalog.subscriptions[0]
    first = billing_period(subscription, 0)
    with pytest.raises(BillingError, match="is on the plan pro, not on free"):
        build_invoice(subscription, catalog.plans["free"], first, {})
    for other in (
        Period(0, first.start, first.end - timedelta(hours=1)),
        Period(1, first.start, first.end),
        Period(-1, first.start, first.end),
    ):
        with pytest.raises(BillingError, match=r"no period|not a period"):
            build_invoice(subscription, catalog.plans["pro"], other, {})


def test_a_plan_without_charges_costs_nothing_and_hides_nothing():
    free = parse_catalog(FILE.replace("acme: {plan: pro", "acme: {plan: free"))
    period = period_containing(free.subscriptions[0], datetime(2026, 3, 1, tzinfo=timezone.utc))
    assert period is not None
    result = build_invoice(free.subscriptions[0], free.plans["free"], period, {("egress", "By"): Decimal(1)})
    assert str(result.total) == "0.00"
    assert result.lines == ()
    assert len(result.unpriced) == 1
    assert result.plan_name == "free"
