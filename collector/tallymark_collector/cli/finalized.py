"""Finalised invoices as the command line shows them: documents, what came later, whether their points are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from tallymark_collector.billing.errors import BillingError
from tallymark_collector.billing.money import exact, grouped, plain
from tallymark_collector.cli import output
from tallymark_collector.invoicing import (
    Document,
    Later,
    Obstacle,
    chain,
    later,
    unchanged,
)
from tallymark_collector.store.database import Connection


@dataclass(frozen=True, slots=True)
class Finalized:
    """An account's finalised period, or why there is none."""

    account: str
    documents: tuple[Document, ...] = ()
    new: bool = False
    later: Later = field(default_factory=Later)
    obstacles: tuple[Obstacle, ...] = ()
    """What kept it from being finalised."""
    error: str = ""
    changed: tuple[str, ...] | None = None
    """Of --verify: which documents' points are not what they were."""


async def shown(connection: Connection, tenant: str, account: str, at: datetime, *, verify: bool) -> Finalized | None:
    """The account's period as it was finalised and what came later; None where it is not finalised."""
    documents = await chain(connection, tenant, account, at)
    if not documents:
        return None
    changed, error = None, ""
    if verify:
        try:
            results = [(one.invoice, await unchanged(connection, one)) for one in documents]
            changed = tuple(f"{name}: {what}" for name, what in results if what is not None)
        except BillingError as cannot:
            error = str(cannot)
    return Finalized(account, tuple(documents), later=await later(connection, documents), changed=changed, error=error)


def as_document(found: Finalized) -> dict[str, Any]:
    """JSON-able but for decimals and instants, which `output` writes."""
    if not found.documents:
        obstacles = [{"kind": one.kind, "found": one.sentence} for one in found.obstacles]
        return {"account": found.account, "error": found.error, **({"obstacles": obstacles} if obstacles else {})}
    first, *rest = (
        {**one.content, "finalized_at": one.finalized_at, "finalized_by": one.finalized_by, "because": one.because}
        for one in found.documents
    )
    document = {
        **first,
        "status": "finalized",
        "preliminary": False,
        "new": found.new,
        "corrections": rest,
        "total_with_corrections": _total(found.documents),
        "later": [one._asdict() for one in found.later.differences],
        "later_problem": found.later.problem,
    }
    if found.changed is not None:
        document["changed"] = list(found.changed)
    return document if not found.error else {**document, "error": found.error}


def remark(found: Finalized) -> None:
    """What a person has to know beside the documents, whatever form they have."""
    if found.error:
        output.fail(found.error)
    if acceptable := sorted({one.kind for one in found.obstacles if one.acceptable}):
        options = " ".join(f"--despite {kind}" for kind in acceptable)
        output.tell(f"to finalise it all the same, knowingly: {options} --because TEXT")
    if found.later.problem is not None:
        output.warn(f"account {found.account!r}: what came later cannot be told: {found.later.problem}")
    if found.later.differences:
        output.warn(
            f"account {found.account!r}: usage came after the period was finalised and is on no document; bill it:"
            " tallymark invoice --correct"
        )
    for text in found.changed or ():
        output.fail(f"what was billed is not what is stored: {text}")


def write(found: Finalized) -> None:
    """The documents and what came later, for people."""
    for document in found.documents:
        _write_document(document)
    if len(found.documents) > 1:
        output.say(f"total with corrections: {grouped(_total(found.documents))} {found.documents[0].currency}")
    if found.later.differences:
        output.say("CAME LATER, on no document above:")
        output.write_table(
            ("meter", "unit", "quantity", "points"),
            [tuple(one) for one in found.later.differences],
            ("quantity", "points"),
        )
    if found.changed == ():
        output.say("verified: the points are what they were when they were billed")
    output.say("")


def _write_document(document: Document) -> None:
    content = document.content
    zone = ZoneInfo(content["period"]["time_zone"])
    first, last = (
        instant.astimezone(zone).isoformat(" ", "minutes") for instant in (document.period_start, document.period_end)
    )
    basis = document.stands_on
    output.write_facts(
        {
            document.kind.replace("_", " "): document.invoice,
            "account": document.account,
            "plan": f"{content['plan_name']} (version {content['plan_version']})",
            "period": f"{first} to {last} ({content['period']['cycle']}, {content['period']['time_zone']})",
            "finalised": f"{output.iso(document.finalized_at)} by {document.finalized_by}",
            **({"corrects": document.corrects} if document.corrects else {}),
            **({"despite": "; ".join(one["found"] for one in basis["accepted"])} if basis["accepted"] else {}),
            **({"because": document.because} if document.because else {}),
            "stands on": f"{basis['points']:,} points, recorded until {basis['recorded_until']}",
            "digest": basis["digest"],
        }
    )
    output.write_table(
        ("description", "quantity", "unit", "unit price", "amount", "currency"),
        [
            (
                line.description if line.aggregation in (None, "sum") else f"{line.description} ({line.aggregation})",
                line.quantity,
                line.unit,
                line.unit_price,
                line.amount,
                document.currency,
            )
            for line in document.lines
        ],
        ("quantity", "unit price", "amount"),
        footer=("total", None, None, None, document.total, document.currency),
    )
    for entry in content["unpriced"]:
        output.say(
            f"NOT PRICED: {plain(Decimal(entry['quantity']))} {entry['unit']} of {entry['meter']}: {entry['reason']}"
        )


def _total(documents: Sequence[Document]) -> Decimal:
    with exact():
        return sum((one.total for one in documents), start=Decimal(0))
