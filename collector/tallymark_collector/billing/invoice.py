"""The invoice: one account's usage of one period, in money."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from tallymark_collector.billing.errors import BillingError
from tallymark_collector.billing.money import plain
from tallymark_collector.billing.periods import Period, billing_period
from tallymark_collector.billing.plans import Plan, Subscription
from tallymark_collector.billing.pricing import Line, Unpriced, price


@dataclass(frozen=True)
class Invoice:
    """Lines and total in `currency`. `plan_version` tells exactly which prices were used (`Plan.version`).

    `unpriced` is usage that no line contains. An invoice with such entries is not the whole truth yet.
    """

    account: str
    plan: str
    plan_name: str
    plan_version: str
    period: Period
    cycle: str
    time_zone: str
    currency: str
    lines: tuple[Line, ...]
    total: Decimal
    unpriced: tuple[Unpriced, ...]
    remarks: tuple[str, ...] = ()
    """What somebody should know of the quantities."""

    def to_document(self) -> dict[str, Any]:
        """JSON-able. Numbers are text in plain digits, instants ISO 8601 in UTC ending in Z."""
        return {
            "account": self.account,
            "plan": self.plan,
            "plan_name": self.plan_name,
            "plan_version": self.plan_version,
            "period": {
                "index": self.period.index,
                "start": _iso(self.period.start),
                "end": _iso(self.period.end),
                "cycle": self.cycle,
                "time_zone": self.time_zone,
            },
            "currency": self.currency,
            "lines": lines_document(self.lines),
            "total": plain(self.total),
            "unpriced": unpriced_document(self.unpriced),
            "remarks": list(self.remarks),
        }


def build_invoice(
    subscription: Subscription,
    plan: Plan,
    period: Period,
    usage: Mapping[tuple[str, str], Decimal],
    remarks: tuple[str, ...] = (),
) -> Invoice:
    """The invoice for a period's usage, (meter, unit) → quantity, with remarks on that.

    Usage of a meter in another unit than the catalogue's is in `unpriced`, with its unit. Flat fees are whole,
    also in a shortened period (see `periods`).

    Raises `BillingError` where plan or period are not the subscription's, `UsageError` for a quantity that
    can't be priced (see `pricing.price`).
    """
    if plan.id != subscription.plan:
        raise BillingError(f"{subscription.account} is on the plan {subscription.plan}, not on {plan.id}")
    if period != billing_period(subscription, period.index):
        raise BillingError(f"{period} is not a period of {subscription.account} on {subscription.plan}")
    priced = price(plan, usage)
    return Invoice(
        account=subscription.account,
        plan=plan.id,
        plan_name=plan.name or plan.id,
        plan_version=plan.version,
        period=period,
        cycle=subscription.cycle,
        time_zone=subscription.time_zone,
        currency=plan.currency,
        lines=priced.lines,
        total=priced.total,
        unpriced=priced.unpriced,
        remarks=remarks,
    )


def lines_document(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """JSON-able."""
    return [
        {
            "description": line.description,
            "meter": line.meter,
            "unit": line.unit,
            "aggregation": line.aggregation,
            "quantity": plain(line.quantity),
            "unit_price": plain(line.unit_price),
            "amount": plain(line.amount),
        }
        for line in lines
    ]


def unpriced_document(unpriced: Iterable[Unpriced]) -> list[dict[str, Any]]:
    """JSON-able."""
    return [
        {"meter": entry.meter, "unit": entry.unit, "quantity": plain(entry.quantity), "reason": entry.reason}
        for entry in unpriced
    ]


def _iso(instant: datetime) -> str:
    return instant.isoformat().replace("+00:00", "Z")
