"""What clients are told to record."""

from __future__ import annotations

import random
from decimal import Decimal

from tests.interop.clients import Call

ACCOUNTS = 3
ROUTES = ("/search", "/items/{id}")
MAX_CALLS = 40
_STEPS = (1, 25, 100, 100, 100, 200, 300, 700, 900, 1500)
"""Thousandths."""


def rounds(seed: int, prefix: str, count: int) -> list[list[Call]]:
    """So many rounds for accounts named after `prefix`. Some accounts use nothing in a round.

    A client adds doubles up, so after 0.1 + 0.1 + 0.1 its own total is 0.30000000000000004. Volumes are chosen so that
    each total that a client comes to is the decimal that is meant: what is asserted then is what the wire and the
    collector do with 0.1, not what a client's addition does.
    """
    rng = random.Random(seed)
    totals: dict[tuple[str, str], tuple[float, Decimal]] = {}
    found = []
    for at in range(count):
        calls: list[Call] = []
        for account in (f"{prefix}-{number}" for number in range(ACCOUNTS)):
            for route in ROUTES:
                if at and rng.random() < 0.3:
                    continue
                doubles, exact = totals.get((account, route), (0.0, Decimal(0)))
                steps = [step for step in _STEPS if _survives(doubles + step / 1000, exact + Decimal(step) / 1000)]
                step = rng.choice(steps)
                totals[account, route] = doubles + step / 1000, exact + Decimal(step) / 1000
                calls.append(
                    {
                        "account": account,
                        "route": route,
                        "calls": rng.randint(1, MAX_CALLS),
                        "volume_thousandths": step,
                    }
                )
        found.append(calls)
    return found


def _survives(double: float, exact: Decimal) -> bool:
    return Decimal(repr(double)) == exact
