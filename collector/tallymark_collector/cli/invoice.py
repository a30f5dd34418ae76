"""`tallymark invoice`: one period in money, shown only where the audit finds nothing wrong with it, or as finalised."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from typing import Annotated, Any, TypeAlias
from zoneinfo import ZoneInfo

import typer

from tallymark_collector.access.records import check_tenant
from tallymark_collector.aggregates.audit import Report
from tallymark_collector.aggregates.audit import audit as compare
from tallymark_collector.billing import Invoice, Subscription, period_containing, records
from tallymark_collector.billing.errors import BillingError
from tallymark_collector.billing.local_days import start_of_day
from tallymark_collector.billing.money import grouped
from tallymark_collector.billing.pricing import Line
from tallymark_collector.cli import finalized, opening, output
from tallymark_collector.cli.arguments import DatabaseOption, JsonOption, TenantOption, day_or_instant, hours_touched
from tallymark_collector.cli.audit import write_differences, write_drifts
from tallymark_collector.cli.finalized import Finalized, shown
from tallymark_collector.cli.finalizing import (
    DEFAULT_GRACE,
    BecauseOption,
    CorrectOption,
    DespiteOption,
    FinalizeOption,
    GraceOption,
    Making,
    VerifyOption,
    asked,
    hours,
    last_closed,
    made,
)
from tallymark_collector.cli.settle import ByOption
from tallymark_collector.errors import UserError
from tallymark_collector.quarantine.items import beside_invoice
from tallymark_collector.settings import DEFAULT_TENANT
from tallymark_collector.store import Store
from tallymark_collector.store.database import Connection

_NUMBERS = ("quantity", "unit price", "amount")


@dataclass(frozen=True, slots=True)
class _Outcome:
    """An account's invoice and the audit of its hours, or why there is none."""

    account: str
    invoice: Invoice | None = None
    report: Report | None = None
    error: str = ""
    finalized: Finalized | None = None
    """The period is finalised, was to be, or could not be; then there is nothing else."""
    preliminary: bool = False
    quarantined: int = 0
    """Open items of the account's usage in the period."""
    unattributed: int = 0
    """Those of no account: some may be this one's."""

    @property
    def differs(self) -> bool:
        return self.report is not None and bool(self.report.differences or self.report.drifts)

    @property
    def withheld(self) -> bool:
        """True if something was found that kept a period from being finalised, or contradicts what was."""
        return self.finalized is not None and bool(self.finalized.obstacles or self.finalized.changed)

    @property
    def failed(self) -> bool:
        """True if there is an error."""
        return bool(self.error or (self.finalized is not None and self.finalized.error))


def invoice(
    database: DatabaseOption = None,
    tenant: TenantOption = DEFAULT_TENANT,
    account: Annotated[
        str | None,
        typer.Option("--account", metavar="ACCOUNT", help="This account; else all that have a period then."),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="TIME",
            help="An instant in the period: a day (its start in the account's time zone), or a time with its zone.",
            show_default="now",
        ),
    ] = None,
    finalize: FinalizeOption = False,
    correct: CorrectOption = False,
    verify: VerifyOption = False,
    grace: GraceOption = DEFAULT_GRACE,
    despite: DespiteOption = None,
    because: BecauseOption = "",
    by: ByOption = None,
    as_json: JsonOption = False,
) -> None:
    """Price the billing period that contains an instant: a draft, from the usage that is stored now; or show its
    invoice as it was finalised, and apart what came later.

    A draft's hours are audited first. Where one differs from its points, the hours are shown instead of the
    invoice, and the exit status is 1. JSON is one invoice, or without --account a list, in which an account
    without an invoice has `differences` or `error` instead.

    --finalize makes the invoice of a period that has ended, --correct a credit or debit note of what came after that,
    --verify looks at what they stand on; without --at of the latest period that ended at least --grace ago. Where
    something is in the way it says what, and the exit status is 1.
    """
    if finalize + correct + verify > 1:
        raise UserError("--finalize, --correct and --verify are three things: give one of them")
    if (despite or because) and not (finalize or correct):
        raise UserError("--despite and --because are for --finalize and --correct: a draft records no decision")
    now = datetime.now(timezone.utc)
    moment = None if at is None else day_or_instant(at, "--at")
    patience, how = hours(grace), None
    if finalize or correct:
        how = Making(asked(by, now, patience, despite or (), because), correcting=correct)
    with output.progress("pricing") as saying:
        outcomes = asyncio.run(
            _outcomes(opening.named(database), tenant, account, _Wanted(moment, now, how, verify, patience), saying)
        )
    if as_json:
        documents = [_as_document(outcome) for outcome in outcomes]
        output.write_json(documents if account is None else documents[0])
    if not outcomes and output.interactive():
        output.tell("no account has a period then: apply a plans file with `tallymark plans apply`")
    for outcome in outcomes:
        _remark(outcome)
        if not as_json:
            _write(outcome)
    if nameless := max((outcome.unattributed for outcome in outcomes), default=0):
        output.warn(
            f"points in quarantine of the same time that name no account {nameless:,}, on no invoice:"
            " tallymark quarantine list --account ''"
        )
    if any(outcome.differs or outcome.withheld for outcome in outcomes):
        raise typer.Exit(1)
    if any(outcome.failed for outcome in outcomes):
        raise typer.Exit(2)


@dataclass(frozen=True, slots=True)
class _Wanted:
    at: date | datetime | None
    now: datetime
    making: Making | None
    verify: bool
    grace: timedelta

    def instant(self, terms: Sequence[Subscription]) -> datetime | None:
        """The instant that is meant of an account, if it has a period then."""
        if self.at is None and (self.making is not None or self.verify):
            return last_closed(terms, self.now, self.grace)
        return _instant(terms, self.at or self.now, self.now)


async def _outcomes(
    database: str, tenant: str, account: str | None, wanted: _Wanted, saying: output.Saying
) -> list[_Outcome]:
    async with opening.opened(database) as store:
        await _extend(store, tenant, wanted.now)
        async with store.reading() as connection:
            await check_tenant(connection, tenant)
            terms = await records.subscriptions(connection, tenant, account)
            if wanted.making is None:
                return await _drafts(connection, tenant, account, terms, wanted, saying)
        return await _made(store, tenant, account, terms, wanted, wanted.making, saying)


async def _drafts(
    connection: Connection,
    tenant: str,
    account: str | None,
    terms: Mapping[str, Sequence[Subscription]],
    wanted: _Wanted,
    saying: output.Saying,
) -> list[_Outcome]:
    """Drafts, and documents of what is finalised."""
    nameless: _Nameless = {}
    if account is not None:
        known = wanted.instant(terms.get(account, ())) or _utc(wanted.at or wanted.now)
        return [await _priced(connection, tenant, account, known, wanted, nameless)]
    found = []
    for number, (name, subscriptions) in enumerate(terms.items(), 1):
        saying(f"pricing {number:,} of {len(terms):,} accounts")
        instant = wanted.instant(subscriptions)
        if instant is None:
            continue
        if wanted.verify and await shown(connection, tenant, name, instant, verify=False) is None:
            continue
        try:
            found.append(await _priced(connection, tenant, name, instant, wanted, nameless))
        except BillingError as error:
            found.append(_Outcome(name, error=str(error)))
    return found


async def _made(
    store: Store,
    tenant: str,
    account: str | None,
    terms: Mapping[str, Sequence[Subscription]],
    wanted: _Wanted,
    making: Making,
    saying: output.Saying,
) -> list[_Outcome]:
    """Documents, one transaction each: what was finalised stays, whatever becomes of the next account."""
    found = []
    for number, name in enumerate([account] if account is not None else terms, 1):
        saying(f"finalising {number:,} of {len(terms):,} accounts")
        instant = wanted.instant(terms.get(name, ()))
        if instant is None and account is None:
            continue
        if instant is None and wanted.at is None:
            raise BillingError(f"account {name!r} has no period that ended {wanted.grace} ago or earlier")
        at = instant or _utc(wanted.at or wanted.now)
        if making.correcting and account is None:
            async with store.reading() as connection:
                if await shown(connection, tenant, name, at, verify=False) is None:
                    continue
        found.append(_Outcome(name, finalized=await made(store, tenant, name, at, making)))
    return found


async def _extend(store: Store, tenant: str, now: datetime) -> None:
    async with store.transaction() as connection:
        await records.extend_periods(connection, tenant, now)


_Nameless: TypeAlias = "dict[tuple[datetime, datetime], int]"
"""Open items that name no account, by period: many accounts share one."""


async def _priced(
    connection: Connection, tenant: str, account: str, at: datetime, wanted: _Wanted, nameless: _Nameless
) -> _Outcome:
    """Invoice and audit see the same moment of the database. What is finalised is shown as it is."""
    document = await shown(connection, tenant, account, at, verify=wanted.verify)
    if document is not None:
        return _Outcome(account, finalized=document)
    if wanted.verify:
        raise BillingError(f"account {account!r} is not finalised at {at.isoformat()}: there is nothing to verify")
    priced = await records.invoice(connection, tenant, account, at)
    start, end = hours_touched(priced.period.start, priced.period.end)
    report = await compare(connection, tenant=tenant, account=account, start=start, end=end)
    period = (priced.period.start, priced.period.end)
    if period not in nameless:
        nameless[period] = await beside_invoice(connection, tenant, "", *period)
    return _Outcome(
        account,
        None if report.differences or report.drifts else priced,
        report,
        preliminary=priced.period.end > wanted.now,
        quarantined=await beside_invoice(connection, tenant, account, *period),
        unattributed=nameless[period],
    )


def _instant(terms: Sequence[Subscription], at: date | datetime, now: datetime) -> datetime | None:
    """The instant that is meant, if the account has a period then. A day begins where the account is."""
    for subscription in terms:
        instant = at if isinstance(at, datetime) else start_of_day(at, ZoneInfo(subscription.time_zone))
        if instant > now + records.AHEAD:
            raise UserError(f"--at {at} is too far ahead: periods are known {records.AHEAD.days} days beyond now")
        if period_containing(subscription, instant) is not None:
            return instant
    return None


def _utc(at: date | datetime) -> datetime:
    return at if isinstance(at, datetime) else start_of_day(at, ZoneInfo("UTC"))


def _remark(outcome: _Outcome) -> None:
    """What a person has to know beside the invoice, whatever form it has."""
    if outcome.finalized is not None:
        finalized.remark(outcome.finalized)
    if outcome.error:
        output.fail(outcome.error)
    if outcome.differs:
        output.fail(
            f"no invoice for account {outcome.account!r}: what would be billed differs from what was received; see"
            " `tallymark audit`, and mend cached hours with `tallymark audit --repair`"
        )
    if outcome.invoice is not None:
        for entry in outcome.invoice.unpriced:
            output.warn(
                f"account {outcome.account!r}: {grouped(entry.quantity)} of meter {entry.meter!r}"
                f" (unit {entry.unit!r}) are on no line: {entry.reason}"
            )
        for text in outcome.invoice.remarks:
            output.warn(f"account {outcome.account!r}: {text}")
    if outcome.quarantined:
        name = shlex.quote(outcome.account)
        output.warn(
            f"account {outcome.account!r}: points in quarantine {outcome.quarantined:,}, not on this invoice:"
            f" tallymark quarantine list --account {name}"
        )
    if outcome.report is not None and (outcome.report.drifts or outcome.report.overlaps):
        output.warn(
            f"account {outcome.account!r}: the audit found streams to judge (drifts {len(outcome.report.drifts)},"
            f" overlaps {len(outcome.report.overlaps)}); run `tallymark audit` for this account"
        )


def _as_document(outcome: _Outcome) -> dict[str, Any]:
    if outcome.finalized is not None:
        return finalized.as_document(outcome.finalized)
    if outcome.invoice is not None:
        return {
            **outcome.invoice.to_document(),
            "status": "draft",
            "preliminary": outcome.preliminary,
            "in_quarantine": {"account": outcome.quarantined, "no_account": outcome.unattributed},
        }
    if outcome.report is not None:
        return {
            "account": outcome.account,
            "differences": [found._asdict() for found in outcome.report.differences],
            "drifts": [found._asdict() for found in outcome.report.drifts],
        }
    return {"account": outcome.account, "error": outcome.error}


def _described(line: Line) -> str:
    return line.description if line.aggregation in (None, "sum") else f"{line.description} ({line.aggregation})"


def _write(outcome: _Outcome) -> None:
    if outcome.finalized is not None and outcome.finalized.documents:
        finalized.write(outcome.finalized)
    if outcome.report is not None:
        if outcome.report.differences:
            write_differences(outcome.report.differences)
        if outcome.report.drifts:
            write_drifts(outcome.report.drifts)
    priced = outcome.invoice
    if priced is None:
        return
    zone = ZoneInfo(priced.time_zone)
    first, last = (
        instant.astimezone(zone).isoformat(" ", "minutes") for instant in (priced.period.start, priced.period.end)
    )
    output.write_facts(
        {
            "account": priced.account,
            "plan": f"{priced.plan_name} (version {priced.plan_version})",
            "period": f"{first} to {last} ({priced.cycle}, {priced.time_zone})",
        }
    )
    if outcome.preliminary:
        output.say("period still open: preliminary")
    output.write_table(
        ("description", "quantity", "unit", "unit price", "amount", "currency"),
        [
            (_described(line), line.quantity, line.unit, line.unit_price, line.amount, priced.currency)
            for line in priced.lines
        ],
        _NUMBERS,
        footer=("total", None, None, None, priced.total, priced.currency),
    )
    if priced.unpriced:
        output.say("NOT PRICED, on no line above:")
        output.write_table(
            ("meter", "quantity", "unit", "reason"),
            [(entry.meter, entry.quantity, entry.unit, entry.reason) for entry in priced.unpriced],
            _NUMBERS,
        )
    output.say("")
