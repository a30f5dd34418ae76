"""Documents as they are kept: one row each, added once and never changed (store/sql, invoice_document)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple

import psycopg
from psycopg.types.json import Jsonb

from tallymark_collector.billing.errors import BillingError
from tallymark_collector.billing.metered import Key
from tallymark_collector.billing.periods import Period
from tallymark_collector.billing.plans import Plan
from tallymark_collector.billing.pricing import Line
from tallymark_collector.store.database import Connection

NAME_DIGITS: Final = 32
"""Hexadecimal digits that name a document: 128 bits over its key."""


class Document(NamedTuple):
    """An invoice (number 0) or a correction. `content` is the whole of it, JSON-able; see docs/invoices.md."""

    tenant: str
    account: str
    period_start: datetime
    period_end: datetime
    number: int
    invoice: str
    """Its name: the same for the same tenant, account, period and number."""
    kind: str
    """`invoice`, `credit_note` or `debit_note`."""
    corrects: str | None
    finalized_at: datetime
    database_user: str
    finalized_by: str
    because: str
    plan: str
    currency: str
    total: Decimal
    content: dict[str, Any]

    @property
    def period(self) -> Period:
        """What is billed."""
        return Period(self.content["period"]["index"], self.period_start, self.period_end)

    @property
    def prices(self) -> Plan:
        """The plan that the period was priced by, as it was then."""
        return Plan.from_document(self.content["prices"]["document"])

    @property
    def lines(self) -> tuple[Line, ...]:
        """Its lines; a correction's are differences."""
        return tuple(_line(line) for line in self.content["lines"])

    @property
    def quantities(self) -> dict[Key, Decimal]:
        """What was used in the period when the document was made, as the plan bills it. Of a correction that is all of
        the period, too."""
        return {(one["meter"], one["unit"]): Decimal(one["quantity"]) for one in self.content["usage"]}

    @property
    def points(self) -> dict[Key, int]:
        """How many points or levels those were."""
        return {(one["meter"], one["unit"]): one["points"] for one in self.content["usage"]}

    @property
    def stands_on(self) -> Mapping[str, Any]:
        """What was found when it was made."""
        found: Mapping[str, Any] = self.content["stands_on"]
        return found


_COLUMNS: Final = ", ".join(Document._fields[:-1])


def named(tenant: str, account: str, period_start: datetime, number: int) -> str:
    """A document's name. Names hold no control characters of ours: a length before each part keeps them apart."""
    parts = (tenant, account, period_start.isoformat(), str(number))
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:NAME_DIGITS]


async def chain(connection: Connection, tenant: str, account: str, at: datetime) -> list[Document]:
    """The invoice of the account's period that contains `at` and its corrections, in their order; none where the period
    is not finalised."""
    rows = await (
        await connection.execute(
            f"""SELECT {_COLUMNS}, document FROM invoice_document
                WHERE tenant = %s AND account = %s AND period_start <= %s AND period_end > %s
                ORDER BY period_start, number""",  # noqa: S608 - names of columns
            [tenant, account, at, at],
        )
    ).fetchall()
    return [Document(*row) for row in rows]


async def add(connection: Connection, document: Document) -> Document:
    """Adds a document; returns it as it is kept, with when and by which user of the database.

    Raises BillingError where the database finds that it does not add up, or bills what another one bills.
    """
    values: Sequence[object] = (*document[:-1], Jsonb(document.content))
    kept = [
        (name, value)
        for name, value in zip((*Document._fields[:-1], "document"), values, strict=True)
        if name not in ("finalized_at", "database_user")  # the database says these
    ]
    statement = f"""
        INSERT INTO invoice_document ({", ".join(name for name, _ in kept)})
        VALUES ({", ".join(["%s"] * len(kept))})
        RETURNING {_COLUMNS}, document"""  # noqa: S608 - names of columns
    try:
        row = await (await connection.execute(statement, [value for _, value in kept])).fetchone()
    except psycopg.errors.CheckViolation as error:
        raise BillingError(f"account {document.account!r} is not finalised: {error.diag.message_primary}") from None
    assert row is not None  # INSERT without ON CONFLICT returns its row or raises
    return Document(*row)


def _line(line: Mapping[str, Any]) -> Line:
    return Line(
        line["description"],
        line["meter"],
        line["unit"],
        Decimal(line["quantity"]),
        Decimal(line["unit_price"]),
        Decimal(line["amount"]),
        line["aggregation"],
    )
