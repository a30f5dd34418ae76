"""What is stored now beside what a finalised period bills, and whether what it bills is still as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from tallymark_collector.billing.errors import BillingError
from tallymark_collector.billing.metered import Key, Metered, metered
from tallymark_collector.billing.money import exact
from tallymark_collector.invoicing.basis import digest_of
from tallymark_collector.invoicing.documents import Document
from tallymark_collector.store.database import Connection
from tallymark_collector.store.keeping import dropped_before, levels_dropped_before


class Difference(NamedTuple):
    """Of one meter and unit: what is there now less what the documents stand on."""

    meter: str
    unit: str
    quantity: Decimal
    points: int


@dataclass(frozen=True, slots=True)
class Later:
    """What came after a period's last document."""

    differences: tuple[Difference, ...] = ()
    problem: str | None = None
    """Why it cannot be told."""
    used: Metered | None = None
    """All that is there now; None where there is a problem."""


async def later(connection: Connection, documents: Sequence[Document]) -> Later:
    """What came after the last of a period's documents. The connection sees one moment."""
    last = documents[-1]
    try:
        used = await metered(connection, last.tenant, last.account, last.period, last.prices)
    except BillingError as error:
        return Later(problem=str(error))
    if lost := [key for key, points in last.points.items() if points > used.points.get(key, 0)]:
        names = ", ".join(meter for meter, _ in lost)
        why = "it was dropped or removed, and only the document has it"
        return Later(problem=f"less is stored of {names} than was billed: {why}")
    return Later(tuple(_differences(last, used)), None, used)


def _differences(last: Document, used: Metered) -> list[Difference]:
    found = []
    for key in sorted({*last.quantities, *used.quantities}):
        points = used.points.get(key, 0) - last.points.get(key, 0)
        quantity = _less(used.quantities, last.quantities, key)
        if quantity or points:
            found.append(Difference(*key, quantity, points))
    return found


def _less(now: Mapping[Key, Decimal], then: Mapping[Key, Decimal], key: Key) -> Decimal:
    with exact():
        return now.get(key, Decimal(0)) - then.get(key, Decimal(0))


async def unchanged(connection: Connection, document: Document) -> str | None:
    """None where the points and levels that a document stands on are what they were; else what is not.

    Raises BillingError where that cannot be told any more.
    """
    basis = document.stands_on
    if basis["digest"] is None:
        raise BillingError(f"the points of {document.invoice} had been dropped before it was finalised")
    dropped = await dropped_before(connection, [document.period_start])
    if dropped is not None:
        raise BillingError(
            f"points before {dropped.isoformat()} have been dropped: {document.invoice} stands by itself"
        )
    levels_from = _instant(basis["levels_from"])
    if basis["levels"]:
        # What had been dropped before the document was made is not in its digest.
        known = basis.get("levels_dropped_before")
        dropped = await levels_dropped_before(connection, levels_from if known is None else _instant(known))
        if dropped is not None:
            raise BillingError(
                f"levels before {dropped.isoformat()} have been dropped: {document.invoice} stands by itself"
            )
    until = _instant(basis["recorded_until"])
    for what, start, count, digest in (
        ("points", document.period_start, basis["points"], basis["digest"]),
        ("levels", levels_from, basis["levels"], basis["levels_digest"]),
    ):
        found, now = await digest_of(
            connection, what, document.tenant, document.account, start, document.period_end, until
        )
        if (found, now) != (count, digest):
            return f"{what} were {count:,} with the digest {digest} and are {found:,} with {now}"
    return None


def _instant(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
