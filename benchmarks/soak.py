"""10,000 requests a second for a minute: does memory stay flat, does every call arrive?"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, MutableMapping
from typing import Any, Final

import psutil
from rich.table import Table

import tallymark
from benchmarks.metered import metered
from benchmarks.sink import sink
from tallymark.integrations.asgi import UsageMiddleware

RATE: Final = 10_000
SECONDS: Final = int(os.environ.get("TALLYMARK_BENCH_SOAK_SECONDS", "60"))
ACCOUNTS: Final = 4_999
ROUTES: Final = 5
INTERVAL_S: Final = 2.0
REPORTS: Final = 12


def tables() -> Iterator[Table]:
    """One table: requests served and resident memory over time."""
    with sink() as endpoint, metered(endpoint, INTERVAL_S) as own:
        rows = asyncio.run(_load(UsageMiddleware(_app(), identify=_account)))
        delivered = own.flush(60)
        recorded = own.recorder.sums()
    settled = [resident for second, _, resident, _ in rows if second >= SECONDS / 3]
    table = Table(
        title=f"{RATE:,} requests/s wanted, {ACCOUNTS:,} accounts x {ROUTES} routes, an export each {INTERVAL_S:g} s"
    )
    for column in ("second", "requests", "resident MiB", "of one core"):
        table.add_column(column, justify="right")
    for second, requests, resident, share in rows:
        table.add_row(f"{second:.0f}", f"{requests:,}", f"{resident / 2**20:.1f}", f"{share:.0%}")
    table.caption = (
        f"all delivered: {delivered and not recorded}; "
        f"resident memory after the first third: {min(settled) / 2**20:.1f} to {max(settled) / 2**20:.1f} MiB"
    )
    yield table


def _app() -> Any:
    @tallymark.track_usage("soak.requests")
    async def handler() -> bytes:
        return b"{}"

    async def app(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        body = await handler()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return app


def _account(scope: MutableMapping[str, Any]) -> dict[str, str | None]:
    return {"account": scope["account"]}


async def _load(app: Any) -> list[tuple[float, int, int, float]]:
    """(second, requests so far, resident bytes, share of one core) at regular times."""
    process = psutil.Process()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: MutableMapping[str, Any]) -> None:
        return None

    routes = [type("Route", (), {"path_format": f"/v1/things/{n}/{{id}}"})() for n in range(ROUTES)]
    rows: list[tuple[float, int, int, float]] = []
    requests = 0
    process.cpu_percent()
    start = time.monotonic()
    report_at = 0.0
    while (elapsed := time.monotonic() - start) < SECONDS:
        if elapsed >= report_at:
            rows.append((elapsed, requests, process.memory_info().rss, process.cpu_percent() / 100))
            report_at += SECONDS / REPORTS
        if requests >= elapsed * RATE:
            await asyncio.sleep(0.001)
            continue
        for _ in range(10):
            scope = {
                "type": "http",
                "method": "GET",
                "path": "/",
                "route": routes[requests % ROUTES],
                "account": f"account-{requests * 7919 % ACCOUNTS}",
            }
            await app(scope, receive, send)
            requests += 1
    rows.append((SECONDS, requests, process.memory_info().rss, process.cpu_percent() / 100))
    return rows
