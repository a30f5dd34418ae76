"""What keeps a period from being finalised.

    BillingError
     └── RefusedError   nothing was finalised; `obstacles` has at least one entry

Some of it a person may knowingly accept, with a reason that goes into the document; that sums differ never.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, TypeAlias

from tallymark_collector.aggregates.audit import audit
from tallymark_collector.aggregates.completeness import Completeness, Proof, Status, prove
from tallymark_collector.aggregates.days import with_days
from tallymark_collector.billing.errors import BillingError
from tallymark_collector.billing.money import exact, grouped, plain
from tallymark_collector.billing.periods import Period
from tallymark_collector.billing.plans import Plan
from tallymark_collector.invoicing.basis import Basis
from tallymark_collector.quarantine.items import beside_invoice
from tallymark_collector.store.database import Connection

ACCEPTABLE: Final = ("overlap", "missing", "quarantine", "dropped")
"""What may be accepted knowingly, by the name that `--despite` takes."""

_HOUR: Final = timedelta(hours=1)

Proofs: TypeAlias = "dict[tuple[str, datetime, datetime], tuple[datetime, Proof]]"
"""What producers said of a tenant's period, and when they were asked: accounts share it, and it takes long."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One thing that is in the way."""

    kind: str
    """One of `ACCEPTABLE`; or `open`, `grace`, `arriving`, `difference`, `drift`, which nobody can accept."""
    sentence: str

    @property
    def acceptable(self) -> bool:
        """Whether a person may accept it."""
        return self.kind in ACCEPTABLE


class RefusedError(BillingError):
    """A period that cannot be finalised as it is."""

    def __init__(self, account: str, obstacles: Sequence[Obstacle]) -> None:
        """With at least one obstacle."""
        super().__init__(f"account {account!r} is not finalised: " + "; ".join(one.sentence for one in obstacles))
        self.account = account
        self.obstacles = tuple(obstacles)


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found, as the document keeps it, and what of it is in the way."""

    document: dict[str, Any]
    obstacles: tuple[Obstacle, ...]


def ended(period: Period, now: datetime, grace: timedelta) -> list[Obstacle]:
    """Whether the period is over, and late usage has had its time."""
    end = period.end.isoformat()
    if period.end > now:
        return [Obstacle("open", f"its period has not ended, it does so at {end}")]
    if period.end + grace > now:
        until = (period.end + grace).isoformat()
        return [Obstacle("grace", f"its period ended at {end}, and late usage has time until {until} (--grace)")]
    return []


async def examine(
    connection: Connection, tenant: str, account: str, period: Period, plan: Plan, found: Basis, proofs: Proofs
) -> Findings:
    """The audit of the account's hours and days, completeness of the meters that the plan bills, and the quarantine.

    The connection sees one moment, the one that `found` is of.
    """
    start, end = _hours_touched(period)
    bounds: dict[str, Any] = {"tenant": tenant, "account": account, "start": start, "end": end}
    report = await with_days(connection, await audit(connection, **bounds), **bounds)
    asked_at, proof = await _proved(connection, tenant, period, proofs)
    missing, surplus = _missing(proof, plan), [one for one in proof.of(Status.TOO_MANY) if one.meter in plan.units]
    quarantined = await beside_invoice(connection, tenant, account, period.start, period.end)
    nameless = await beside_invoice(connection, tenant, "", period.start, period.end)
    obstacles = []
    if report.differences or found.disagreeing:
        count = len(report.differences) or len(found.disagreeing)
        obstacles.append(
            Obstacle("difference", f"{count:,} sums differ from their points; mend them: tallymark audit --repair")
        )
    if report.drifts:
        text = f"{len(report.drifts):,} cumulative streams have increases that are not what their totals say"
        obstacles.append(Obstacle("drift", f"{text}; see tallymark audit"))
    if found.arriving:
        text = f"{found.arriving:,} points of the period arrived just now; try again in a minute"
        obstacles.append(Obstacle("arriving", text))
    if found.dropped is not None:
        text = f"points of the period before {found.dropped.isoformat()} have been dropped, its hours cannot be audited"
        obstacles.append(Obstacle("dropped", text))
    if report.overlaps:
        obstacles.append(
            Obstacle("overlap", f"{len(report.overlaps):,} intervals overlap the one before; see tallymark audit")
        )
    if missing or surplus:
        named = ", ".join(_told(one) for one in (*missing, *surplus))
        obstacles.append(Obstacle("missing", f"what producers say they recorded is not what is here: {named}"))
    if quarantined:
        text = f"{quarantined:,} points of the period are open in quarantine; see tallymark quarantine list"
        obstacles.append(Obstacle("quarantine", text))
    return Findings(
        {
            "audit": {
                "hours": report.hours,
                "points": report.points,
                "differences": len(report.differences),
                "drifts": len(report.drifts),
                "overlaps": len(report.overlaps),
            },
            "completeness": {
                "asked_at": _iso(asked_at),
                "producers": len(proof.producers),
                "unproved_producers": proof.unproved,
                **{status.name.lower(): len(proof.of(status)) for status in Status},
                "of_billed_meters": [_as_document(one) for one in (*missing, *surplus)],
            },
            "in_quarantine": {"account": quarantined, "no_account": nameless},
        },
        tuple(obstacles),
    )


def refuse(account: str, obstacles: Sequence[Obstacle], despite: Collection[str]) -> tuple[Obstacle, ...]:
    """The obstacles, all of which are accepted. Raises RefusedError with those that are not."""
    if left := [one for one in obstacles if not (one.acceptable and one.kind in despite)]:
        raise RefusedError(account, left)
    return tuple(obstacles)


async def _proved(connection: Connection, tenant: str, period: Period, proofs: Proofs) -> tuple[datetime, Proof]:
    key = (tenant, period.start, period.end)
    if key not in proofs:
        [now] = await (await connection.execute("SELECT now()")).fetchone() or [period.end]
        proofs[key] = (now, await prove(connection, tenant=tenant, start=period.start, end=period.end))
    return proofs[key]


def _missing(proof: Proof, plan: Plan) -> list[Completeness]:
    """Of the meters that the plan bills. What is known to lie in quarantine may be of any account and is told by
    account; what was discarded there is not to be billed."""
    with exact():
        return [
            one
            for one in proof.of(Status.MISSING)
            if one.meter in plan.units and one.difference > one.in_quarantine + one.discarded
        ]


def _told(one: Completeness) -> str:
    amount = grouped(one.difference)
    return f"{one.producer} of {one.service} {one.status.value} {amount} of {one.meter}"


def _as_document(one: Completeness) -> dict[str, str]:
    return {
        "namespace": one.namespace,
        "service": one.service,
        "producer": one.producer,
        "meter": one.meter,
        "unit": one.unit,
        "status": one.status.value,
        "difference": plain(one.difference),
        "in_quarantine": plain(one.in_quarantine),
        "discarded": plain(one.discarded),
    }


def _hours_touched(period: Period) -> tuple[datetime, datetime]:
    """The whole hours (UTC) that have any of the period in them."""
    start = period.start.replace(minute=0, second=0, microsecond=0)
    end = period.end.replace(minute=0, second=0, microsecond=0)
    return start, end if end == period.end else end + _HOUR


def _iso(instant: datetime) -> str:
    return instant.isoformat().replace("+00:00", "Z")
