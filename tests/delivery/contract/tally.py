"""What was used, counted where it was used: what is stored is compared with it."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from decimal import Decimal


@dataclass
class Tally:
    """Of one tenant's accounts in one run."""

    used: defaultdict[tuple[str, str], Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    """(account, meter) to quantity."""
    levels: Counter[tuple[str, str, int, Decimal]] = field(default_factory=Counter)
    """(account, meter, microseconds, level) to how many samples say so."""
    calls: Counter[str] = field(default_factory=Counter)
    """Account to the calls that spans show."""
    told: defaultdict[tuple[str, str], Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    """(producer, meter) to what the producer's control totals come to."""

    def use(self, account: str, meter: str, quantity: Decimal | int) -> None:
        """So much was used."""
        self.used[account, meter] += quantity
