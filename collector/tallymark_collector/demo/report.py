"""The findings for people: tables on stdout, and progress on stderr."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Final
from zoneinfo import ZoneInfo

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tallymark_collector.billing import Invoice
from tallymark_collector.billing.money import grouped
from tallymark_collector.demo.findings import Findings, completeness_document
from tallymark_collector.demo.proof import BYTES, REQUESTS, TOKENS, Proof

SHOWN_ACCOUNTS: Final = 10

_WIDTH_IN_A_PIPE: Final = 120
_METERS: Final = (REQUESTS, TOKENS, BYTES)


class Steps:
    """Says on stderr what is being done, and keeps how long each step took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        """One step."""
        began = time.monotonic()
        self._console.print(f"{text} ...", style="dim")
        yield
        self.seconds[name] = round(time.monotonic() - began, 2)

    @contextmanager
    def counting(self, name: str, text: str, total: int) -> Iterator[Callable[[], None]]:
        """One step of `total` equal parts: with a bar where somebody watches. Gives what to call after each part."""
        if not self._console.is_terminal:
            with self.step(name, text):
                yield lambda: None
            return
        began = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(text, total=total)
            yield lambda: progress.advance(task)
        self.seconds[name] = round(time.monotonic() - began, 2)


def write(findings: Findings, proofs: dict[str, Proof]) -> None:
    """Usage, invoices, the audit and the proof of every meter but requests, whose proof is the last line."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_IN_A_PIPE)
    console.print("\nUsage by account and endpoint", style="bold")
    console.print(_usage(findings))
    for invoice in findings.invoices:
        _write_invoice(console, invoice)
    audit = findings.audit
    console.print(
        f"\naudit: {audit.hours:,} cached sums compared with {audit.points:,} points:"
        f" {len(audit.differences)} differences, {len(audit.drifts)} drifts, {len(audit.overlaps)} overlaps;"
        f" quarantine: {sum(findings.contents.quarantine.values())};"
        f" calls shown by spans: {findings.contents.evidence.rows:,}",
        soft_wrap=True,
    )
    document = completeness_document(findings)
    for meter, known in sorted(document["meters"].items()):
        console.print(
            f"completeness of {meter}: the service says {known['recorded']}, here are {known['counted']}:"
            f" {', '.join(known['status'])}",
            soft_wrap=True,
        )
    console.print(
        f"on sampled spans: the service says {document['on_spans']}, the spans show {document['shown_by_spans']}",
        soft_wrap=True,
    )
    for meter, proof in proofs.items():
        if meter != REQUESTS:
            console.print(f"{meter}: {proof.line()}")


def _usage(findings: Findings) -> Table:
    by_endpoint: dict[tuple[str, str], dict[str, Decimal]] = defaultdict(lambda: dict.fromkeys(_METERS, Decimal(0)))
    for account, route, meter, _, quantity, _ in findings.usage.rows:
        assert isinstance(quantity, Decimal)
        by_endpoint[str(account), str(route)][str(meter)] += quantity
    requests: dict[str, Decimal] = defaultdict(Decimal)
    for (account, _), meters in by_endpoint.items():
        requests[account] += meters[REQUESTS]
    shown = sorted(requests, key=lambda account: (-requests[account], account))[:SHOWN_ACCOUNTS]
    rest = f"{len(requests) - len(shown)} others"
    rows: dict[tuple[str, str], dict[str, Decimal]] = defaultdict(lambda: dict.fromkeys(_METERS, Decimal(0)))
    for (account, route), meters in by_endpoint.items():
        for meter, quantity in meters.items():
            rows[account if account in shown else rest, route][meter] += quantity
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, show_footer=True)
    table.add_column("account", "total")
    table.add_column("endpoint")
    for meter in _METERS:
        total = sum((row[meter] for row in rows.values()), Decimal(0))
        table.add_column(meter, grouped(total), justify="right", no_wrap=True)
    last = ""
    for account, route in sorted(rows, key=lambda row: ([*shown, rest].index(row[0]), row[1])):
        cells = [grouped(rows[account, route][meter]) if rows[account, route][meter] else "" for meter in _METERS]
        table.add_row("" if account == last else account, route, *cells)
        last = account
    return table


def _write_invoice(console: Console, invoice: Invoice) -> None:
    zone = ZoneInfo(invoice.time_zone)
    first, last = (at.astimezone(zone).isoformat(" ", "minutes") for at in (invoice.period.start, invoice.period.end))
    console.print(f"\nInvoice of {invoice.account}, plan {invoice.plan_name}, preliminary", style="bold")
    console.print(f"{first} to {last} ({invoice.time_zone})")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, show_footer=True)
    table.add_column("description", "total")
    table.add_column("quantity", justify="right", no_wrap=True)
    table.add_column("unit")
    table.add_column("unit price", justify="right", no_wrap=True)
    table.add_column(f"amount ({invoice.currency})", grouped(invoice.total), justify="right", no_wrap=True)
    for line in invoice.lines:
        table.add_row(
            line.description, grouped(line.quantity), line.unit or "", grouped(line.unit_price), grouped(line.amount)
        )
    console.print(table)
