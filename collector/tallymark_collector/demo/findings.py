"""What the database holds when the traffic is over: every number of the demo's report that does not come from the
driver, read at one moment."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from tallymark_collector.aggregates.audit import Report, audit
from tallymark_collector.aggregates.completeness import Proof, Status, prove
from tallymark_collector.aggregates.reconciliation import EvidenceBalance, reconcile
from tallymark_collector.billing import Invoice, records
from tallymark_collector.billing.money import plain
from tallymark_collector.demo.proof import REQUESTS, Kind, billed_counts
from tallymark_collector.query.status import Contents, contents
from tallymark_collector.query.usage import Usage, usage
from tallymark_collector.settings import DEFAULT_TENANT
from tallymark_collector.store import Store
from tallymark_collector.store.database import Connection

REFRESHED_WITHIN: Final = 15.0
"""Seconds that cached hours may take to be brought up to date; an audit of hours that are not cached says little."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Usage, money and the audit."""

    billed: dict[Kind, Decimal]
    usage: Usage
    """By account and endpoint, each meter a row."""
    invoices: list[Invoice]
    """One for each plan: its busiest account's, for the period that is still open."""
    audit: Report
    proof: Proof
    """What the service says that it recorded, against what is here."""
    evidence: list[EvidenceBalance]
    """What it says that it wrote on spans, against the spans."""
    contents: Contents

    def problems(self) -> list[str]:
        """What must not be there, in words."""
        found = []
        if not self.audit.clean:
            found.append(f"the audit is not clean: {audit_document(self.audit)}")
        not_complete = self.proof.of(Status.MISSING, Status.TOO_MANY, Status.OPEN)
        if not_complete or not self.proof.producers:
            found.append(f"not everything recorded is proved to be here: {not_complete or 'no control totals'}")
        found.extend(f"spans are missing: {one}" for one in self.evidence if one.missing)
        if self.contents.quarantine:
            found.append(f"points are in quarantine: {dict(self.contents.quarantine)}")
        if self.contents.waiting:
            found.append(f"{self.contents.waiting} account-hours have not been refreshed in time")
        found.extend(
            f"usage of {invoice.account} is not priced: {invoice.unpriced}"
            for invoice in self.invoices
            if invoice.unpriced
        )
        return found

    def usage_documents(self) -> list[dict[str, object]]:
        """The rows of usage, JSON-able."""
        return [
            {
                name: plain(value) if isinstance(value, Decimal) else value
                for name, value in zip(self.usage.columns, row, strict=True)
            }
            for row in self.usage.rows
        ]


async def look(store: Store, now: datetime) -> Findings:
    """Waits until the cached hours are up to date, then reads everything."""
    deadline = time.monotonic() + REFRESHED_WITHIN
    while time.monotonic() < deadline:
        async with store.reading() as connection:
            if not (await contents(connection)).waiting:
                break
        await asyncio.sleep(0.1)
    async with store.reading() as connection:
        return Findings(
            billed=await billed_counts(connection),
            usage=await usage(connection, tenant=DEFAULT_TENANT, by=("account", "route", "meter")),
            invoices=await _invoices(connection, now),
            audit=await audit(connection),
            # The service has ended: what has not come by now will not come.
            proof=await prove(connection, tolerance=timedelta(0)),
            evidence=await reconcile(connection, tolerance=timedelta(0)),
            contents=await contents(connection),
        )


async def _invoices(connection: Connection, at: datetime) -> list[Invoice]:
    used = await usage(connection, tenant=DEFAULT_TENANT, by=("account",), meter=REQUESTS)
    requests = {str(row[0]): Decimal(str(row[-2])) for row in used.rows}
    busiest: dict[str, str] = {}
    for account, terms in (await records.subscriptions(connection, DEFAULT_TENANT)).items():
        best = busiest.setdefault(terms[0].plan, account)
        if requests.get(account, 0) > requests.get(best, 0):
            busiest[terms[0].plan] = account
    return [await records.invoice(connection, DEFAULT_TENANT, account, at) for account in busiest.values()]


def audit_document(report: Report) -> dict[str, Any]:
    """JSON-able."""
    return {
        "clean": report.clean,
        "hours": report.hours,
        "points": report.points,
        "differences": len(report.differences),
        "drifts": len(report.drifts),
        "overlaps": len(report.overlaps),
    }


def completeness_document(findings: Findings) -> dict[str, Any]:
    """JSON-able: by meter what producers recorded and what is here, and the same of what is on spans."""
    meters: dict[str, dict[str, Any]] = {}
    for one in findings.proof.producers:
        known = meters.setdefault(one.meter, {"recorded": Decimal(0), "counted": Decimal(0), "status": set()})
        known["recorded"] += one.control
        known["counted"] += one.counted
        known["status"].add(one.status.value)
    for document in meters.values():
        document.update(recorded=plain(document["recorded"]), counted=plain(document["counted"]))
        document["status"] = sorted(document["status"])
    return {
        "meters": meters,
        "on_spans": plain(sum((one.counted for one in findings.evidence), Decimal(0))),
        "shown_by_spans": plain(sum((one.shown for one in findings.evidence), Decimal(0))),
    }
