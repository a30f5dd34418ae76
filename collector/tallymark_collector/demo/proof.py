"""The driver's count against what SQL says, call by call of one kind: sums that agree by luck do not pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, NamedTuple

from tallymark_collector.billing.money import plain
from tallymark_collector.settings import DEFAULT_TENANT
from tallymark_collector.store.database import Connection

REQUESTS: Final = "api.requests"
TOKENS: Final = "llm.tokens"
BYTES: Final = "egress.bytes"


class Kind(NamedTuple):
    """Calls that are counted together."""

    meter: str
    account: str
    method: str
    route: str
    status: int


Counts = Mapping[Kind, Decimal]


@dataclass(frozen=True, slots=True)
class Proof:
    """One meter: what was sent, what is billed, and by how much single kinds of calls differ."""

    sent: Decimal = Decimal(0)
    billed: Decimal = Decimal(0)
    lost: Decimal = Decimal(0)
    duplicated: Decimal = Decimal(0)

    @property
    def holds(self) -> bool:
        """True if nothing was lost and nothing was billed twice."""
        return not self.lost and not self.duplicated and self.sent == self.billed

    def line(self) -> str:
        """The demo's last line."""
        return (
            f"sent={plain(self.sent)} billed={plain(self.billed)}"
            f" lost={plain(self.lost)} duplicated={plain(self.duplicated)}"
        )

    def to_document(self) -> dict[str, int]:
        """JSON-able; everything that the demo counts is whole."""
        return {
            "sent": int(self.sent),
            "billed": int(self.billed),
            "lost": int(self.lost),
            "duplicated": int(self.duplicated),
        }


def compare(sent: Counts, billed: Counts) -> dict[str, Proof]:
    """By meter. What one kind lacks is lost and what another has too much is duplicated, also where they even out."""
    proofs = {REQUESTS: Proof()}
    for kind in sorted({*sent, *billed}, key=str):
        ours, theirs = sent.get(kind, Decimal(0)), billed.get(kind, Decimal(0))
        so_far = proofs.get(kind.meter, Proof())
        proofs[kind.meter] = Proof(
            so_far.sent + ours,
            so_far.billed + theirs,
            so_far.lost + max(ours - theirs, Decimal(0)),
            so_far.duplicated + max(theirs - ours, Decimal(0)),
        )
    return proofs


async def billed_counts(connection: Connection) -> dict[Kind, Decimal]:
    """What the database says, from the public view."""
    rows = await (
        await connection.execute(
            """SELECT meter, account, coalesce(method, ''), coalesce(route, ''), coalesce(status_code, 0), sum(quantity)
               FROM tallymark.usage_hourly WHERE tenant = %s GROUP BY 1, 2, 3, 4, 5""",
            [DEFAULT_TENANT],
        )
    ).fetchall()
    return {Kind(*row[:-1]): row[-1] for row in rows}
