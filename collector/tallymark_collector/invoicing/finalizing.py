"""A period becomes a document, and what came later another one.

Both are one transaction that sees one moment, alone for the account: whoever comes second, from whichever process,
finds the first one's document and makes none.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, Final

from tallymark_collector.billing import records
from tallymark_collector.billing.errors import BillingError
from tallymark_collector.billing.invoice import build_invoice, lines_document, unpriced_document
from tallymark_collector.billing.metered import Metered, metered
from tallymark_collector.billing.money import minor_digits, plain
from tallymark_collector.billing.periods import Period
from tallymark_collector.billing.plans import FlatFee, Plan
from tallymark_collector.billing.pricing import Line, price
from tallymark_collector.errors import UserError
from tallymark_collector.invoicing import corrections, documents
from tallymark_collector.invoicing.basis import basis
from tallymark_collector.invoicing.checks import ACCEPTABLE, Obstacle, Proofs, ended, examine, refuse
from tallymark_collector.invoicing.documents import Document
from tallymark_collector.invoicing.later import later
from tallymark_collector.settings import SETTLED
from tallymark_collector.store import Store
from tallymark_collector.store.database import Connection

GRACE: Final = timedelta(hours=24)
"""How long after a period's end usage may be late."""

_INVOICES: Final = "tallymark.invoices"
"""With tenant and account behind it: whoever makes documents of that account."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Who finalises, and how."""

    by: str
    now: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    grace: timedelta = GRACE
    despite: frozenset[str] = frozenset()
    """Of `ACCEPTABLE`: what is accepted."""
    because: str = ""
    """Why; needed where something is accepted."""
    settled: timedelta = SETTLED
    proofs: Proofs = field(default_factory=dict)
    """What producers said, for all accounts of one run."""

    def __post_init__(self) -> None:
        """Raises UserError."""
        if unknown := sorted(self.despite - {*ACCEPTABLE}):
            raise UserError(f"{', '.join(unknown)} cannot be accepted; what can is {', '.join(ACCEPTABLE)}")
        if self.despite and not self.because.strip():
            raise UserError("what is accepted needs a reason, which goes into the document: say it with --because")
        if self.grace < timedelta(0):
            raise UserError("the grace is negative: a period can only be finalised after its end")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A period's documents, in their order, and whether the last of them is new."""

    documents: tuple[Document, ...]
    new: bool


async def finalize(store: Store, tenant: str, account: str, at: datetime, asked: Asked) -> Outcome:
    """The documents of the account's period that contains `at`; its invoice is made where there is none yet.

    Raises RefusedError where something is in the way that was not accepted, BillingError where there is no period or
    it cannot be priced. Again is fine: a document is never made twice. Billing periods must have been extended.
    """
    async with _alone(store, tenant, account) as connection:
        found = await documents.chain(connection, tenant, account, at)
        if found:
            return Outcome(tuple(found), new=False)
        subscription, period = await records.period_at(connection, tenant, account, at)
        refuse(account, ended(period, asked.now, asked.grace), ())
        version = await records.version_for(connection, tenant, subscription.plan, period)
        used = await metered(connection, tenant, account, period, version.plan)
        invoice = build_invoice(subscription, version.plan, period, used.quantities, used.remarks)
        prices = {
            "version": version.number,
            "applied_at": version.applied_at.isoformat().replace("+00:00", "Z"),
            "document": version.plan.to_document(),
        }
        content = {**invoice.to_document(), "prices": prices}
        document = await _add(
            connection, tenant, account, period, version.plan, used, content, invoice.lines, (), asked
        )
        return Outcome((document,), new=True)


async def correct(store: Store, tenant: str, account: str, at: datetime, asked: Asked) -> Outcome:
    """The documents of the account's finalised period; a correction is added where it would be billed otherwise now.

    It is the difference, priced as the period was. Raises BillingError where the period is not finalised, or what came
    later cannot be told; RefusedError as `finalize` does.
    """
    async with _alone(store, tenant, account) as connection:
        found = await documents.chain(connection, tenant, account, at)
        if not found:
            raise BillingError(
                f"account {account!r} has no finalised period at {at.isoformat()}: there is nothing to correct,"
                " `tallymark invoice --finalize` makes its invoice"
            )
        came = await later(connection, found)
        if came.used is None:
            raise BillingError(f"account {account!r} cannot be corrected: {came.problem}")
        plan = found[0].prices
        priced = price(plan, came.used.quantities)
        lines = corrections.difference(priced.lines, [line for one in found for line in one.lines])
        if not lines:
            return Outcome(tuple(found), new=False)
        content = {
            **{name: found[0].content[name] for name in _OF_THE_PERIOD},
            "lines": lines_document(lines),
            "total": plain(corrections.total(lines, minor_digits(plan.currency))),
            "period_total": plain(priced.total),
            "unpriced": unpriced_document(priced.unpriced),
            "remarks": list(came.used.remarks),
        }
        document = await _add(
            connection, tenant, account, found[0].period, plan, came.used, content, lines, found, asked
        )
        return Outcome((*found, document), new=True)


_OF_THE_PERIOD: Final = ("account", "plan", "plan_name", "plan_version", "period", "currency", "prices")
"""Of a document's content: the same in a correction."""


def _alone(store: Store, tenant: str, account: str) -> AbstractAsyncContextManager[Connection]:
    """A transaction that sees one moment and may write, begun once nobody else makes documents of the account."""
    return store.auditing(alone=f"{_INVOICES}.{len(tenant)}.{tenant}.{account}")


async def _add(
    connection: Connection,
    tenant: str,
    account: str,
    period: Period,
    plan: Plan,
    used: Metered,
    content: dict[str, Any],
    lines: Sequence[Line],
    before: Sequence[Document],
    asked: Asked,
) -> Document:
    stored = await basis(connection, tenant, account, period, plan, asked.settled)
    findings = await examine(connection, tenant, account, period, plan, stored, asked.proofs)
    accepted = refuse(account, findings.obstacles, asked.despite)
    number = len(before)
    name = documents.named(tenant, account, period.start, number)
    previous = before[-1].invoice if before else None
    total = Decimal(content["total"])
    kind = "invoice" if not before else "credit_note" if total < 0 else "debit_note"
    for line, shown in zip(lines, content["lines"], strict=True):
        shown["points"] = _points(line, plan, used, before)
        shown["charge"] = _charge(line, plan)
    return await documents.add(
        connection,
        Document(
            tenant=tenant,
            account=account,
            period_start=period.start,
            period_end=period.end,
            number=number,
            invoice=name,
            kind=kind,
            corrects=previous,
            finalized_at=asked.now,
            database_user="",
            finalized_by=asked.by,
            because=asked.because if accepted else "",
            plan=plan.id,
            currency=plan.currency,
            total=total,
            content={
                "tenant": tenant,
                "invoice": name,
                "number": number,
                "kind": kind,
                "corrects": previous,
                **content,
                "usage": _usage(plan, used),
                "stands_on": {**stored.document, **findings.document, "accepted": _accepted(accepted)},
            },
        ),
    )


def _usage(plan: Plan, used: Metered) -> list[dict[str, Any]]:
    """All that was used in the period, also what is on no line."""
    return [
        {
            "meter": meter,
            "unit": unit,
            "aggregation": str(plan.aggregations.get(meter) or "sum") if plan.units.get(meter) == unit else "sum",
            "quantity": plain(quantity),
            "points": used.points.get((meter, unit), 0),
        }
        for (meter, unit), quantity in sorted(used.quantities.items())
    ]


def _points(line: Line, plan: Plan, used: Metered, before: Sequence[Document]) -> int | None:
    """How many points or levels are behind the line's meter; of a correction, how many more than before."""
    if line.meter is None:
        return None
    key = (line.meter, plan.units[line.meter])
    return used.points.get(key, 0) - (before[-1].points.get(key, 0) if before else 0)


def _charge(line: Line, plan: Plan) -> dict[str, Any] | None:
    """The charge behind a line of usage, with its tiers."""
    for charge in plan.charges:
        if not isinstance(charge, FlatFee) and charge.meter == line.meter:
            return charge.model_dump(mode="json", exclude_defaults=True)
    return None


def _accepted(obstacles: Sequence[Obstacle]) -> list[dict[str, str]]:
    return [{"kind": one.kind, "found": one.sentence} for one in obstacles]
