"""Processes with any OpenTelemetry client, which count and measure. Their streams are their own: one writer each."""

from __future__ import annotations

import random
from collections import defaultdict
from decimal import Decimal
from typing import Final

from tests.delivery.contract.items import CUMULATIVE, DELTA, Item
from tests.delivery.contract.tally import Tally
from tests.support.usage import SECOND, number

METERS: Final = {"whole": (1, 1000), "tenths": (1, 99)}
"""Meter to the smallest and the largest count of its units: integers, and doubles of tenths."""
UNIT: Final = "{unit}"


class Source:
    """One process."""

    def __init__(self, name: str, rng: random.Random, accounts: list[str], at_ns: int, tally: Tally) -> None:
        self.name = name
        self.rng = rng
        self.accounts = accounts
        self.at_ns = self.began_ns = at_ns
        self.tally = tally

    def step(self) -> list[Item]:
        """What is used in one interval."""
        start, self.at_ns = self.at_ns, self.at_ns + self.rng.randint(1, 3 * SECOND)
        return self.used(start)

    def end(self) -> list[Item]:
        """What it has still to say."""
        return []

    def used(self, start: int) -> list[Item]:
        """What is used from `start` to now."""
        raise NotImplementedError

    def restarts(self) -> bool:
        """By chance, one in seven."""
        return self.rng.random() < 0.15

    def some_accounts(self) -> list[str]:
        """One of them at the least."""
        return self.rng.sample(self.accounts, self.rng.randint(1, len(self.accounts)))


class Counters(Source):
    """Sums of a counter of integers and one of tenths, as deltas or as running totals."""

    temporality = DELTA

    def __init__(self, name: str, rng: random.Random, accounts: list[str], at_ns: int, tally: Tally) -> None:
        super().__init__(name, rng, accounts, at_ns, tally)
        self.running: dict[tuple[str, str], int] = defaultdict(int)

    def used(self, start: int) -> list[Item]:
        """What is used from `start` to now."""
        if self.temporality == CUMULATIVE and self.restarts():
            self.began_ns = start  # its totals begin anew
            self.running.clear()
        found = []
        for meter, (least, most) in METERS.items():
            for account in self.some_accounts():
                units = self.rng.randint(least, most)
                self.tally.use(account, meter, Decimal(units) / (1 if meter == "whole" else 10))
                route = f"/r{self.rng.randrange(3)}"
                since = start
                if self.temporality == CUMULATIVE:
                    self.running[account, meter] += units
                    units, since = self.running[account, meter], self.began_ns
                    route = "/r"  # one stream has one running total
                value = units if meter == "whole" else units / 10
                attributes = {"tallymark.account.id": account, "http.route": route}
                point = number(since, self.at_ns, value, attributes)
                found.append(Item(self.name, meter, UNIT, (point,), self.temporality))
        return found


class Totals(Counters):
    """The same as running totals."""

    temporality = CUMULATIVE


class Levels(Source):
    """A gauge of integers, some below 0, and an UpDownCounter of tenths: what they stand at is no amount."""

    def __init__(self, name: str, rng: random.Random, accounts: list[str], at_ns: int, tally: Tally) -> None:
        super().__init__(name, rng, accounts, at_ns, tally)
        self.standing: dict[str, int] = defaultdict(int)

    def used(self, start: int) -> list[Item]:
        """What they stand at now."""
        found = []
        for account in self.some_accounts():
            attributes = {"tallymark.account.id": account, "pool": "a"}
            level = self.rng.randint(-50, 50)
            self._sampled(account, "queue", Decimal(level))
            point = number(0, self.at_ns, level, attributes)
            found.append(Item(self.name, "queue", UNIT, (point,), 0, "gauge"))
        for account in self.some_accounts():
            self.standing[account] += self.rng.randint(-99, 99)
            self._sampled(account, "seats", Decimal(self.standing[account]) / 10)
            point = number(self.began_ns, self.at_ns, self.standing[account] / 10, {"tallymark.account.id": account})
            found.append(Item(self.name, "seats", UNIT, (point,), CUMULATIVE, monotonic=False))
        return found

    def _sampled(self, account: str, meter: str, level: Decimal) -> None:
        self.tally.levels[account, meter, self.at_ns // 1000, level] += 1
