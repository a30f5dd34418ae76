"""Commands run in this process against a real database; `program` runs them as a person's shell would."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from typer.testing import CliRunner

from tallymark_collector.cli.app import app
from tallymark_collector.model import Batch, Point, Stream
from tallymark_collector.store import Store
from tests.support.usage import SECOND

Run = Callable[..., Any]

PLANS = """\
currency: EUR
meters:
  api.requests: {unit: "{request}"}
  egress: {unit: By}
plans:
  pro:
    name: Pro
    charges:
      - {flat: 29.00, name: Base fee}
      - {meter: api.requests, included: 100, unit_price: 0.0004, name: Requests}
  free: {charges: []}
accounts:
  acme: {plan: pro, since: 2024-03-01, time_zone: Europe/Zurich}
  globex: {plan: free, since: 2024-03-01, time_zone: America/New_York}
"""


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith("TALLYMARK_") or name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
            monkeypatch.delenv(name)


@pytest.fixture
def run(dsn: str) -> Run:
    """Runs a command on the test's database, or on another that is named."""
    return partial(invoke, database=dsn)


@pytest.fixture
def offline() -> Run:
    """Runs a command that must not need a database."""
    return partial(invoke, database="host=nowhere.invalid")


def invoke(*arguments: str, database: str) -> Any:
    result = CliRunner().invoke(app, list(arguments), env={"TALLYMARK_DATABASE": database}, prog_name="tallymark")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def plans(tmp_path: Path) -> Path:
    file = tmp_path / "plans.yaml"
    file.write_text(PLANS)
    return file


@pytest.fixture
def empty_dsn(server: str) -> Iterator[str]:
    """A database that nobody has migrated."""
    name = sql.Identifier(f"tallymark_test_empty_{os.getpid()}")
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(name))
        yield make_conninfo(server, dbname=name.as_string().strip('"'))
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


def used(of: Stream, at: str, quantity: int | str) -> Point:
    """A point over the second that ends at that time."""
    time_ns = int(datetime.fromisoformat(at).replace(tzinfo=timezone.utc).timestamp()) * SECOND
    return Point(of, time_ns - SECOND, time_ns, Decimal(quantity))


def fill(dsn: str, *points: Point, refresh: bool = True, **more: Any) -> None:
    """Writes points and brings the hours up to date."""

    async def write() -> None:
        store = Store(dsn)
        await store.open()
        try:
            await store.write(Batch(points=list(points), **more))
            while refresh and await store.refresh():
                pass
        finally:
            await store.close()

    asyncio.run(write())


def execute(dsn: str, statement: str) -> int:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
        return connection.execute(statement).rowcount  # type: ignore[arg-type]


def program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line as a process of its own, its output in pipes."""
    return subprocess.run(
        [sys.executable, "-m", "tallymark_collector", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def cells(table: str) -> list[list[str]]:
    """A printed table's rows, the header first; columns are two spaces or more apart."""
    lines = [line for line in table.splitlines() if line.strip() and set(line.strip()) - {"─", " "}]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
