"""`tallymark audit`: what is derived from the points, against the points; the points, against what producers say."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Final

import typer

from tallymark_collector.access.records import check_tenant
from tallymark_collector.aggregates.audit import MAX_OVERLAPS, Difference, Drift, Overlap, Report
from tallymark_collector.aggregates.audit import audit as compare
from tallymark_collector.aggregates.completeness import TOLERANCE, Completeness, Proof, Status, prove
from tallymark_collector.aggregates.days import with_days
from tallymark_collector.aggregates.reconciliation import EvidenceBalance, reconcile
from tallymark_collector.billing.money import plain
from tallymark_collector.cli import opening, output
from tallymark_collector.cli.arguments import (
    AccountOption,
    AnyTenantOption,
    DatabaseOption,
    FromOption,
    JsonOption,
    ToOption,
    hours_touched,
    time_range,
)
from tallymark_collector.store import Store
from tallymark_collector.store.hours import BATCH

REPAIR_ROUNDS: Final = 20
"""Refreshes that a repair makes beyond those that its own hours need, for what was waiting before them."""

SHOWN_COMPLETE: Final = 20
"""Producers and meters of which all are listed; of more, those that are complete are only counted."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that one audit looked at."""

    report: Report
    proof: Proof | None
    """None where one account is asked for: control totals are a producer's, of all accounts together."""
    evidence: Sequence[EvidenceBalance]

    @property
    def missing_evidence(self) -> list[EvidenceBalance]:
        """Accounts and meters with spans that did not come."""
        return [one for one in self.evidence if one.missing]

    @property
    def clean(self) -> bool:
        """True if nothing differs and nothing is missing."""
        return self.report.clean and (self.proof is None or self.proof.clean) and not self.missing_evidence


def audit(
    database: DatabaseOption = None,
    tenant: AnyTenantOption = None,
    account: AccountOption = None,
    since: FromOption = None,
    until: ToOption = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make differing hours again from the points, and audit again.")
    ] = False,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="How long usage and spans may take to arrive before they are missing, and producers may be silent.",
        ),
    ] = TOLERANCE.total_seconds(),
    as_json: JsonOption = False,
) -> None:
    """Compare every cached hour with the points behind it, and the points with what producers say that they recorded.
    Exit status 1 if anything differs or is missing.

    Also compares the increases of cumulative streams with their totals, and looks for intervals of one stream that
    overlap, and compares the usage that spans show with what the SDK wrote on spans; these are for a person to judge
    and --repair leaves them. A range is widened to whole hours.
    """
    start, end = time_range(since, until)
    if start is not None:
        start, _ = hours_touched(start, start)
    if end is not None:
        _, end = hours_touched(end, end)
    with output.progress("comparing hours with points") as now:
        asked = _Asked(tenant, account, start, end, timedelta(seconds=tolerance))
        found, repaired = asyncio.run(_audit(opening.named(database), asked, repair, now))
    if as_json:
        document = as_document(found)
        output.write_json({**document, "repaired": repaired} if repair else document)
    else:
        if repair:
            output.say(f"account-hours made again from their points: {repaired:,}")
        write_findings(found)
    if not found.clean:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Asked:
    tenant: str | None
    account: str | None
    start: datetime | None
    end: datetime | None
    tolerance: timedelta


async def _audit(database: str, asked: _Asked, repair: bool, now: output.Saying) -> tuple[Findings, int]:
    async with opening.opened(database) as store:
        found = await _look(store, asked)
        if not (repair and found.report.differences):
            return found, 0
        hours = {(differs.bucket, differs.account, differs.tenant) for differs in found.report.differences}
        await store.mark(hours)
        # Views are right from here on. Beside a busy collector there is always more to refresh, so not until the end.
        done = 0
        for _ in range(len(hours) // BATCH + REPAIR_ROUNDS):
            count = await store.refresh()
            if not count:
                break
            done += count
            now(f"making hours again: {done:,}")
        now("comparing again")
        return await _look(store, asked), len(hours)


async def _look(store: Store, asked: _Asked) -> Findings:
    bounds: dict[str, Any] = {"start": asked.start, "end": asked.end}
    whose: dict[str, Any] = {"tenant": asked.tenant, "account": asked.account}
    async with store.reading() as connection:
        await check_tenant(connection, asked.tenant)
        report = await compare(connection, **whose, **bounds)
        proof = None
        if asked.account is None:
            proof = await prove(connection, tenant=asked.tenant, tolerance=asked.tolerance, **bounds)
        return Findings(
            await with_days(connection, report, **whose, **bounds),
            proof,
            await reconcile(connection, tolerance=asked.tolerance, **whose, **bounds),
        )


def as_document(found: Findings) -> dict[str, Any]:
    """JSON-able but for decimals and instants, which `output` writes."""
    report, proof = found.report, found.proof
    return {
        "clean": found.clean,
        "hours": report.hours,
        "points": report.points,
        "differences": [differs._asdict() for differs in report.differences],
        "drifts": [drifts._asdict() for drifts in report.drifts],
        "overlaps": [overlaps._asdict() for overlaps in report.overlaps],
        "completeness": None
        if proof is None
        else [{**one._asdict(), "status": one.status.value} for one in proof.producers],
        "unproved_producers": None if proof is None else proof.unproved,
        "evidence": [one._asdict() for one in found.evidence],
    }


def write_findings(found: Findings) -> None:
    """What an audit found, for people."""
    write_report(found.report)
    if found.proof is not None:
        write_proof(found.proof)
    if found.evidence:
        write_evidence(found)


def write_proof(proof: Proof) -> None:
    """What producers say against what is here; nothing where none of them says anything."""
    if proof.producers:
        counts = ", ".join(f"{len(proof.of(status)):,} {status.value}" for status in Status)
        output.say(f"producers and meters: {counts}")
        shown = proof.producers if len(proof.producers) <= SHOWN_COMPLETE else proof.of(*_NOT_COMPLETE)
        output.write_table(_PROOF_COLUMNS, [_proof_row(one) for one in shown], ("counted", "recorded"))
        for one in proof.of(Status.MISSING):
            if one.in_quarantine:
                output.say(
                    f"producer {one.producer}: of the {plain(one.difference)} of {one.meter} that are missing,"
                    f" {plain(one.in_quarantine)} lie in quarantine"
                )
            if one.discarded:
                output.say(
                    f"producer {one.producer}: of the {plain(one.difference)} of {one.meter} that are missing,"
                    f" {plain(one.discarded)} were discarded from quarantine: `tallymark quarantine history`"
                )
    if proof.unproved:
        output.say(f"producers that send no control totals: {proof.unproved:,}")


_NOT_COMPLETE: Final = (Status.MISSING, Status.TOO_MANY, Status.OPEN)
_PROOF_COLUMNS: Final = ("tenant", "service", "producer", "meter", "unit", "state", "as of", "counted", "recorded")


def _proof_row(one: Completeness) -> tuple[object, ...]:
    state = str(one.status.value)
    if one.since is not None and one.until is not None:
        amount, since, until = plain(one.difference), output.iso(one.since), output.iso(one.until)
        state = f"{'missing ' if one.status is Status.MISSING else ''}{amount}"
        state += f"{' too many' if one.status is Status.TOO_MANY else ''} since {since}, first told at {until}"
    elif one.uncovered:
        state += f" ({plain(one.uncovered)} later than its last total)"
    service = f"{one.namespace}/{one.service}" if one.namespace else one.service
    return (one.tenant, service, one.producer, one.meter, one.unit, state, one.as_of, one.counted, one.control)


def write_evidence(found: Findings) -> None:
    """How what spans show compares with what was written on spans."""
    missing, more = found.missing_evidence, [one for one in found.evidence if one.more]
    equal = len(found.evidence) - len(missing) - len(more)
    output.say(f"accounts and meters on spans: {equal:,} equal, {len(missing):,} missing, {len(more):,} with more")
    if missing or more:
        output.write_table(EvidenceBalance._fields, [*missing, *more], ("counted", "shown", "missing", "more"))


def write_report(report: Report) -> None:
    """What an audit found, for people."""
    output.say(f"compared {report.hours:,} cached sums with {report.points:,} points")
    if report.clean:
        output.say("nothing differs")
    if report.differences:
        output.say(
            f"{len(report.differences):,} cached sums differ from their points; mend: `tallymark audit --repair`"
        )
        write_differences(report.differences)
    if report.drifts:
        output.say(f"{len(report.drifts):,} cumulative streams where the increases are not what the totals say")
        write_drifts(report.drifts)
    if report.overlaps:
        more = f" (the first {MAX_OVERLAPS:,} are shown)" if len(report.overlaps) == MAX_OVERLAPS else ""
        output.say(f"{len(report.overlaps):,} intervals overlap the one before: two writers under one name{more}")
        output.write_table(Overlap._fields, report.overlaps)


def write_differences(differences: Sequence[Difference]) -> None:
    """The differing buckets as a table."""
    output.write_table(Difference._fields, differences, ("raw", "aggregated"))


def write_drifts(drifts: Sequence[Drift]) -> None:
    """The differing streams as a table."""
    output.write_table(Drift._fields, drifts, ("billed", "sampled"))
