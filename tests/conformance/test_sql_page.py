"""The examples of docs/sql.md run, and those that lead from an invoice to its calls lead there."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from tallymark_collector.billing import records
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.invoicing import Asked, finalize
from tallymark_collector.model import Attributes, Batch, Evidence
from tallymark_collector.store import Store
from tests.support.usage import BASE, SECOND, point, stream

PAGE = Path(__file__).parents[2] / "docs" / "sql.md"
OCTOBER = datetime(2026, 10, 1, tzinfo=timezone.utc)
NOW = datetime(2026, 11, 5, tzinfo=timezone.utc)
PLANS = """currency: EUR
meters: {api.requests: {unit: "{request}"}}
plans: {basic: {charges: [{flat: "5.00"}, {meter: api.requests, unit_price: "0.5"}]}}
accounts: {acme: {plan: basic, since: 2026-10-01}, globex: {plan: basic, since: 2026-10-01}}
"""


def statements() -> dict[str, str]:
    """Each statement by the comment above it."""
    blocks = re.findall(r"```sql\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    found = [piece.strip() for block in blocks for piece in block.split(";\n") if piece.strip()]
    return {re.sub(r"^-- ", "", piece.splitlines()[0]): piece for piece in found}


async def test_every_example_runs_and_an_invoice_leads_to_its_calls(store: Store, dsn: str) -> None:
    async with store.transaction() as connection:
        await records.apply(connection, "default", parse_catalog(PLANS), NOW)
    first = round(OCTOBER.timestamp()) - BASE // SECOND
    ends = [first - 1, *(first + 7200 * n + 60 for n in range(60)), round((NOW - OCTOBER).total_seconds()) + first]
    of = stream(**{"http.route": "/a"})
    await store.write(
        Batch(
            points=[point(of, end - 9, end, 3) for end in ends],
            evidence=[
                Evidence(
                    *("default", "acme", "api.requests", b"t" * 16, bytes([n]) * 8),
                    *(BASE + (ends[n] - 1) * SECOND, BASE + ends[n] * SECOND, Decimal(1), "GET", "shop", "u1"),
                    Attributes(),
                )
                for n in (1, 2)
            ],
        )
    )
    asked = Asked("anne", NOW, settled=timedelta(0))
    [invoice] = (await finalize(store, "default", "acme", OCTOBER, asked)).documents
    await store.write(Batch(points=[point(of, ends[1] + 600, ends[1] + 609, 100)]))
    told: dict[str, list[dict[str, Any]]] = {}
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        for name, statement in statements().items():
            cursor = connection.execute(statement)  # type: ignore[arg-type]
            told[name] = cursor.fetchall() if cursor.description else []
    assert [(row["quantity"], row["amount"], row["points"]) for row in told["The line"]] == [
        (1, Decimal("5.00"), None),
        (180, Decimal("90.00"), 60),
    ]
    days = told["The days behind it, as the document has them: kept for ever"]
    assert (sum(row["quantity"] for row in days), sum(row["points"] for row in days), len(days)) == (180, 60, 5)
    hours = told["The hours behind it, with every dimension"]
    assert (sum(row["quantity"] for row in hours), {row["route"] for row in hours}) == (280, {"/a"}), "as they are now"
    [points] = [rows for name, rows in told.items() if name.startswith("The points that were billed")]
    assert (sum(row["quantity"] for row in points), len(points), points[0]["producer"]) == (180, 60, "one")
    calls = told["Single calls behind them, where spans were sampled"]
    assert [row["span_id"] for row in calls] == ["01" * 8, "02" * 8]
    assert told["Are the points what they were when they were billed?"] == [
        {"invoice": invoice.invoice, "points": 60, "points_now": 60, "unchanged": True}
    ]
    [billed] = told["What has been billed of each period, corrections included"]
    assert (billed["account"], billed["total"], billed["documents"]) == ("acme", Decimal("95.00"), 1)
    waiting = {(row["account"], row["period_start"]) for row in told["Periods that are over and not finalised"]}
    assert ("globex", OCTOBER) in waiting
    assert ("acme", OCTOBER) not in waiting
