"""Access logs of our own making, and what they bill, counted by other means than the collector's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from random import Random

import psycopg

from tallymark_collector.imports.importer import Request, Watching, run
from tallymark_collector.imports.mapping import Mapping, parse_mapping
from tallymark_collector.imports.summary import Summary
from tallymark_collector.store import Store

DAY = datetime(2026, 9, 1, tzinfo=timezone.utc)
NOW_NS = int((DAY + timedelta(days=1)).timestamp()) * 1_000_000_000
"""A day after the lines begin, whatever today is."""

LOG_MAPPING = """\
format: combined
account: user
meters:
  - {meter: api.requests, unit: "{request}"}
  - {meter: egress, unit: By, field: bytes}
"""

EVENT_MAPPING = """\
format: json
time: {field: at}
id: id
account: customer
meters:
  - {meter: llm.tokens, unit: "{token}", field: tokens}
"""

LOG: Mapping = parse_mapping(LOG_MAPPING)
EVENTS: Mapping = parse_mapping(EVENT_MAPPING)


def line(
    second: float = 0,
    user: str = "acme",
    path: str = "/orders",
    size: int | str = 10,
    method: str = "GET",
    status: int = 200,
) -> str:
    """A line of a log in the Combined format, so many seconds after DAY."""
    at = (DAY + timedelta(seconds=second)).strftime("%d/%b/%Y:%H:%M:%S +0000")
    return f'10.0.0.1 - {user} [{at}] "{method} {path} HTTP/1.1" {status} {size} "-" "curl/8"\n'


def some_lines(count: int, rng: Random) -> list[str]:
    """Lines of which many share their second and some are the same."""
    return [
        line(
            n // 7,
            rng.choice(["acme", "globex", "initech"]),
            rng.choice(["/a", "/b"]),
            rng.choice(["-", 1, 250, 99999]),
        )
        for n in range(count)
    ]


def sums(lines: Iterable[str]) -> dict[tuple[str, str], Decimal]:
    """(account, meter) to quantity, by cutting lines at their blanks."""
    found: Counter[tuple[str, str]] = Counter()
    for each in lines:
        words = each.split(" ")
        found[words[2], "api.requests"] += 1
        found[words[2], "egress"] += int(re.sub("^-$", "0", words[9]))
    return {key: Decimal(value) for key, value in found.items() if value}


def request(source: str = "web-1", mapping: Mapping = LOG, **more: object) -> Request:
    """A request as of NOW_NS."""
    return Request(source, mapping, now_ns=lambda: NOW_NS, **more)  # type: ignore[arg-type]


async def import_(store: Store, *paths: object, **more: object) -> Summary:
    """Imports files; `more` as of `request`."""
    return await run(store, request(**more), [str(path) for path in paths], Watching())  # type: ignore[arg-type]


def billed(dsn: str) -> dict[tuple[str, str], Decimal]:
    """(account, meter) to quantity, from the raw points."""
    rows = fetch(
        dsn,
        "SELECT account, meter, sum(quantity) FROM usage_point JOIN usage_series USING (account, series) GROUP BY 1, 2",
    )
    return {(account, meter): quantity for account, meter, quantity in rows}


def fetch(dsn: str, statement: str) -> Sequence[tuple[object, ...]]:
    """The rows of a query."""
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        return connection.execute(statement).fetchall()  # type: ignore[arg-type]
