"""From usage to invoices: plans, periods, prices. Values in, values out; nothing here knows of a database.

    catalog = read_catalog("plans.yaml")                      # everything wrong with the file, at once
    for subscription in catalog.subscriptions:
        plan = catalog.plans[subscription.plan]
        for period in periods_between(subscription, start, end):
            usage = {("api.requests", "{request}"): Decimal(12_345)}   # of [period.start, period.end)
            invoice = build_invoice(subscription, plan, period, usage)

The rounding rule is in `money`, the calendar's rules in `periods`, the kinds of charge in `plans`.
"""

from tallymark_collector.billing.catalog_file import read_catalog
from tallymark_collector.billing.errors import CatalogError
from tallymark_collector.billing.invoice import Invoice, build_invoice
from tallymark_collector.billing.periods import Period, period_containing, periods_between
from tallymark_collector.billing.plans import Catalog, Plan, Subscription

__all__ = [
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
]
