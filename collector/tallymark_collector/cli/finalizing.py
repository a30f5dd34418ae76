"""Options of `tallymark invoice` that make documents, and what they mean for an account."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Final

import typer

from tallymark_collector.billing import Subscription, periods_between
from tallymark_collector.billing.errors import BillingError
from tallymark_collector.cli.finalized import Finalized
from tallymark_collector.cli.settle import signed
from tallymark_collector.errors import UserError
from tallymark_collector.invoicing import ACCEPTABLE, GRACE, Asked, RefusedError, correct, finalize, later
from tallymark_collector.store import Store

MAX_GRACE: Final = 366 * 24.0
"""Hours: longer than any cycle there is nothing to wait for."""

FinalizeOption = Annotated[
    bool, typer.Option("--finalize", help="Make the period's invoice, for good. Again is fine: it is made once.")
]
CorrectOption = Annotated[
    bool, typer.Option("--correct", help="Bill or credit what came after a period was finalised, as a document.")
]
VerifyOption = Annotated[
    bool, typer.Option("--verify", help="Compare the points behind finalised invoices with their digests.")
]
GraceOption = Annotated[
    float,
    typer.Option(
        "--grace",
        envvar="TALLYMARK_INVOICE_GRACE",
        min=0,
        max=MAX_GRACE,
        metavar="HOURS",
        help="How long after a period's end late usage has time before it is finalised.",
    ),
]
DespiteOption = Annotated[
    list[str] | None,
    typer.Option(
        "--despite",
        metavar="WHAT",
        help=f"Finalise although this was found; again for more: {', '.join(ACCEPTABLE)}. Needs --because.",
    ),
]
BecauseOption = Annotated[str, typer.Option("--because", metavar="TEXT", help="Why, for the document.")]
DEFAULT_GRACE: Final = GRACE / timedelta(hours=1)
_LONGEST_CYCLE: Final = timedelta(days=367)


@dataclass(frozen=True, slots=True)
class Making:
    """That documents are to be made."""

    asked: Asked
    correcting: bool
    """Corrections of what is finalised; else invoices of what is not."""


def hours(grace: float) -> timedelta:
    """The grace. Raises UserError."""
    if math.isnan(grace):
        raise UserError("--grace is not a number: write hours, such as 24")
    return timedelta(hours=grace)


def asked(by: str | None, now: datetime, grace: timedelta, despite: Sequence[str], because: str) -> Asked:
    """Who finalises, and how. Raises UserError."""
    person = signed(by, because)
    if "\0" in person.name + person.because:
        raise UserError("--by or --because holds a NUL: leave it out")
    return Asked(person.name, now, grace, frozenset(despite), person.because.strip())


def last_closed(terms: Sequence[Subscription], now: datetime, grace: timedelta) -> datetime | None:
    """An instant in the account's latest period that ended at least `grace` ago; None where there is none."""
    found = None
    for subscription in terms:
        for period in periods_between(subscription, now - 2 * _LONGEST_CYCLE - grace, now):
            if period.end + grace <= now:
                found = period.start
    return found


async def made(store: Store, tenant: str, account: str, at: datetime, how: Making) -> Finalized:
    """The account's period, finalised or corrected where that can be done."""
    work = correct if how.correcting else finalize
    try:
        outcome = await work(store, tenant, account, at, how.asked)
    except RefusedError as refused:
        return Finalized(account, obstacles=refused.obstacles, error=str(refused))
    except BillingError as error:
        return Finalized(account, error=str(error))
    async with store.reading() as connection:
        return Finalized(account, outcome.documents, outcome.new, await later(connection, outcome.documents))
