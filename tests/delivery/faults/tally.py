"""What processes recorded, by their own count outside of Tallymark: words in a shared file, which outlive SIGKILL.

Each thread of each process has, for each account and meter, two words: the sum that it is about to have recorded,
written before the call, and the sum that it has recorded, written after it. They differ by the call under way when the
process dies, and that call alone may be in what is stored or not.
"""

from __future__ import annotations

import mmap
from decimal import Decimal
from pathlib import Path
from typing import Final

THREADS: Final = 2
ACCOUNTS: Final = 3
UNITS: Final = {
    "whole": Decimal(1),
    "tenths": Decimal("0.1"),
    "fine": Decimal("1e-6"),
    "wide": Decimal("4e18") + Decimal("0.5"),
}
"""Meter to the size of one unit of a count: int, float, Decimal, and more than an int64 holds."""

METERS: Final = tuple(UNITS)
_PAIRS: Final = THREADS * ACCOUNTS * len(METERS)
_REGION: Final = 1 + 2 * _PAIRS


class Tally:
    """Regions for so many processes; `words[of(region)]` is the process's id, 0 until it has begun."""

    def __init__(self, path: Path, regions: int) -> None:
        if not path.exists():
            path.write_bytes(bytes(8 * _REGION * regions))
        with path.open("r+b") as file:
            self.words = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
        self.regions = regions

    def of(self, region: int) -> int:
        """Where a process's words begin."""
        return region * _REGION

    def at(self, region: int, thread: int, account: int, meter: int) -> int:
        """Where a pair stands."""
        return self.of(region) + 1 + 2 * ((thread * ACCOUNTS + account) * len(METERS) + meter)

    def pids(self) -> list[int]:
        """Processes that have begun."""
        return [pid for pid in (self.words[self.of(region)] for region in range(self.regions)) if pid]

    def calls(self) -> int:
        """Something above 0 where anything was recorded: the counts' sum."""
        return sum(self.words) - sum(self.pids())

    def totals(self) -> dict[tuple[int, str], set[Decimal]]:
        """(account, meter) to the totals that are right: one for each choice of the calls under way."""
        found: dict[tuple[int, str], set[Decimal]] = {}
        for account in range(ACCOUNTS):
            for meter, name in enumerate(METERS):
                totals = {0}
                for region in range(self.regions):
                    for thread in range(THREADS):
                        at = self.at(region, thread, account, meter)
                        totals = {t + n for t in totals for n in {self.words[at], self.words[at + 1]}}
                found[account, name] = {total * UNITS[name] for total in totals}
        return found
