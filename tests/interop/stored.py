"""What the collector has, asked of the database."""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal

import psycopg

from tests.interop.ledger import Ledger, Quantities


def stored(dsn: str, prefix: str, quarantined: bool = False) -> Quantities:
    """Raw points and evidence of the accounts of this prefix. Nothing of them may be in quarantine, unless said."""
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        points = connection.execute(
            """SELECT s.meter, p.account, s.route, sum(p.quantity)
               FROM usage_point p JOIN usage_series s ON s.account = p.account AND s.series = p.series
               WHERE p.account LIKE %s GROUP BY 1, 2, 3""",
            (f"{prefix}-%",),
        ).fetchall()
        spans = connection.execute(
            """SELECT 'span:' || meter, account, '', sum(quantity) FROM usage_evidence
               WHERE account LIKE %s GROUP BY 1, 2""",
            (f"{prefix}-%",),
        ).fetchall()
        aside = connection.execute(
            "SELECT account, meter, reason, detail FROM usage_quarantine WHERE account LIKE %s OR account = ''",
            (f"{prefix}-%",),
        ).fetchall()
    assert quarantined or not aside, f"in quarantine: {aside}"
    return {(meter, account, route): Decimal(quantity) for meter, account, route, quantity in [*points, *spans]}


def quarantined(dsn: str, prefix: str) -> Quantities:
    """What was kept aside because it contradicts what is stored, added up from the requests that are kept."""
    found: Quantities = defaultdict(Decimal)
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        rows = connection.execute(
            "SELECT payload FROM usage_quarantine WHERE account LIKE %s AND reason = 'value_conflict'",
            (f"{prefix}-%",),
        ).fetchall()
    for (payload,) in rows:
        kept = Ledger()
        kept.take("metrics", payload)
        for entry, quantity in kept.quantities().items():
            found[entry] += quantity
    return dict(found)


def views(dsn: str, prefix: str) -> Quantities:
    """The same as the billing view has it, without spans."""
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        rows = connection.execute(
            """SELECT meter, account, route, sum(quantity) FROM usage_hourly
               WHERE account LIKE %s GROUP BY 1, 2, 3""",
            (f"{prefix}-%",),
        ).fetchall()
    return {(meter, account, route): Decimal(quantity) for meter, account, route, quantity in rows}


def difference(one: Quantities, other: Quantities) -> dict[str, tuple[str, str]]:
    """Where they differ, readable; empty where they are equal to the unit."""
    zero = Decimal(0)
    return {
        " ".join(entry): (str(one.get(entry, zero)), str(other.get(entry, zero)))
        for entry in sorted({*one, *other})
        if one.get(entry, zero) != other.get(entry, zero)
    }
