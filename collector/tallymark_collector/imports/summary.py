"""What an import did, in numbers that a program can hold against its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final, NamedTuple

from tallymark_collector.billing.money import canonical, exact
from tallymark_collector.imports.extraction import Line

_PLACE: Final = re.compile(r" at character \d+")
_PARTICULARS: Final = re.compile(r"'[^']*'|\d\S*")
"""What differs from line to line in the reason of a fault."""


class Unclosed(NamedTuple):
    """Where a CSV file opens a quote that nothing closes so far, and how many whole lines wait for that."""

    file: str
    line: int
    lines: int


@dataclass(slots=True)
class Summary:
    """Of one input or, added up, of several. Lines that an earlier import read are `before` and nothing else."""

    files: int = 0
    before: int = 0
    """Lines that earlier imports of the same file had read."""
    lines: int = 0
    """Lines read now; of CSV records, each of their lines. Every record is counted by one of the next six."""
    accepted: int = 0
    duplicates: int = 0
    """Billed before: in another file of the source, or twice under one id."""
    conflicts: int = 0
    """Under an id that was billed before, with other values: in quarantine."""
    rejected: int = 0
    skipped: int = 0
    """Left out by the mapping's filters."""
    blank: int = 0
    """Blank lines, and the header of CSV."""
    left: int = 0
    """Lines at the end that were left for the next import: without a line end, or behind a quote that is open."""
    unclosed: list[Unclosed] = field(default_factory=list)
    points: int = 0
    quarantined: int = 0
    """Of these points, those that the database would not take after all; `totals` has them."""
    totals: dict[tuple[str, str, str], Decimal] = field(default_factory=dict)
    """What the accepted lines bill, by account, meter and unit."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why lines were rejected, without particulars."""

    def accept(self, line: Line) -> None:
        """Counts a line that is billed."""
        self.accepted += 1
        self.points += len(line.amounts)
        for stream, value in line.amounts:
            series = stream.series
            key = (series.account, series.meter, series.unit)
            with exact():
                self.totals[key] = self.totals.get(key, Decimal(0)) + value

    def reject(self, reason: str) -> None:
        """Counts a line that could not be read."""
        self.rejected += 1
        self.reasons[_PARTICULARS.sub("…", _PLACE.sub("", reason.partition(":")[0]))] += 1

    def add(self, other: Summary) -> None:
        """Takes another summary in."""
        for name in ("files", "before", "lines", "accepted", "duplicates", "conflicts", "rejected", "skipped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.blank += other.blank
        self.left += other.left
        self.unclosed += other.unclosed
        self.points += other.points
        self.quarantined += other.quarantined
        self.reasons += other.reasons
        for key, value in other.totals.items():
            with exact():
                self.totals[key] = self.totals.get(key, Decimal(0)) + value

    def rows(self) -> Sequence[tuple[str, str, str, Decimal]]:
        """Account, meter, unit, quantity; sorted."""
        return [(*key, value) for key, value in sorted(self.totals.items())]

    def counts(self) -> dict[str, int]:
        """The numbers alone."""
        names = ("files", "before", "lines", "accepted", "duplicates", "conflicts", "rejected", "skipped", "blank")
        return {name: getattr(self, name) for name in (*names, "left", "points", "quarantined")}

    def told(self) -> dict[str, Any]:
        """As JSON has it; quantities are text, exact."""
        columns = ("account", "meter", "unit", "quantity")
        return {
            **self.counts(),
            "unclosed": [each._asdict() for each in self.unclosed],
            "reasons": dict(self.reasons.most_common()),
            "totals": [dict(zip(columns, (*row[:3], canonical(row[3])), strict=True)) for row in self.rows()],
        }
