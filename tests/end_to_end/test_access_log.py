"""A real access log, replayed over HTTP through the example service, is billed to the request and to the byte.

What is expected is computed here from the file's text, by other means than the driver reads it with.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from tallymark_collector.aggregates.audit import Report, audit
from tallymark_collector.demo import stage
from tallymark_collector.demo.processes import stopping_on_signals
from tallymark_collector.store import Store
from tallymark_collector.store.engines import connect_string
from tests.end_to_end import replay_driver

ROOT = Path(__file__).parents[2]
LOG = ROOT.parent / "shared" / "data" / "http_access.log"

pytestmark = pytest.mark.skipif(
    not LOG.exists(), reason=f"NOT TESTED on real input: there is no {LOG.name} in {LOG.parent}"
)


class Logged(NamedTuple):
    account: str
    method: str
    status: int
    size: int


class Billed(NamedTuple):
    account: str
    meter: str
    unit: str
    method: str
    status: int
    quantity: Decimal


def logged() -> list[Logged]:
    """The log by its quotes and blanks: `address - - [time] "request" status size "referrer" "agent"`."""
    found = []
    for line in LOG.read_bytes().splitlines():
        before, request, after = line.split(b'"')[:3]
        status, size = after.split()
        account = before.split()[0].decode()
        found.append(Logged(account, request.split()[0].decode(), int(status), int(size.replace(b"-", b"0"))))
    return found


class Replayed(NamedTuple):
    received: int
    rows: list[Billed]
    audit: Report
    quarantined: int


@pytest.fixture(scope="module")
def replayed(module_folder: Path) -> Iterator[Replayed]:
    """The log through the service, and what the database says afterwards."""
    database = f"embedded:{module_folder / 'postgresql'}"
    requests = replay_driver.read(LOG.read_text("utf-8").splitlines())
    with stopping_on_signals(), ExitStack() as held, ExitStack() as children:
        collector = stage.start_collector(module_folder, database)
        children.callback(collector.stop)
        endpoint = stage.endpoint_of(collector)
        dsn = held.enter_context(connect_string(database))
        application = "tests.end_to_end.replay_service:app"
        service = stage.start_service(module_folder, endpoint, application, PYTHONPATH=str(ROOT))
        children.callback(service.stop)
        received = asyncio.run(replay_driver.replay(stage.url_of(service), requests))
        service.stop()
        yield Replayed(received, *_read(dsn))


def _read(dsn: str) -> tuple[list[Billed], Report, int]:
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(
            """SELECT account, meter, unit, method, status_code, sum(quantity) FROM tallymark.usage_hourly
               WHERE tenant = 'default' AND route = '/replay/{path}' GROUP BY 1, 2, 3, 4, 5"""
        ).fetchall()
        quarantined = connection.execute("SELECT count(*) FROM tallymark.usage_quarantine").fetchall()[0][0]

    async def audited(store: Store) -> Report:
        async with store.reading() as reading:
            return await audit(reading)

    return [Billed(*row) for row in rows], stage.with_store(dsn, audited), quarantined


def summed(rows: list[Billed], meter: str, field: str) -> dict[object, Decimal]:
    sums: Counter[object] = Counter()
    for row in rows:
        if row.meter == meter:
            sums[getattr(row, field)] += row.quantity
    return dict(sums)


@pytest.mark.parametrize("field", ["account", "status", "method"])
def test_requests_are_billed_as_logged(replayed: Replayed, field: str) -> None:
    assert summed(replayed.rows, "api.requests", field) == Counter(getattr(line, field) for line in logged())


@pytest.mark.parametrize("field", ["account", "status", "method"])
def test_bytes_are_billed_as_logged(replayed: Replayed, field: str) -> None:
    expected: Counter[object] = Counter()
    for line in logged():
        expected[getattr(line, field)] += line.size
    # Who was sent no byte has no usage of that meter.
    assert summed(replayed.rows, "egress.bytes", field) == {key: size for key, size in expected.items() if size}


def test_totals(replayed: Replayed) -> None:
    lines = logged()
    totals: Counter[tuple[str, str]] = Counter()
    for row in replayed.rows:
        totals[row.meter, row.unit] += row.quantity
    sent = sum(line.size for line in lines)
    assert totals == {("api.requests", "{request}"): len(lines), ("egress.bytes", "By"): sent}
    assert replayed.received == sent, "the bytes have crossed the wire"
    assert (len(lines), len({line.account for line in lines})) == (10_000, 1_753), "the log is the published one"


def test_the_audit_is_clean_and_nothing_is_in_quarantine(replayed: Replayed) -> None:
    assert replayed.audit.points >= len({row[:5] for row in replayed.rows})
    assert replayed.audit.clean, replayed.audit
    assert replayed.quarantined == 0
