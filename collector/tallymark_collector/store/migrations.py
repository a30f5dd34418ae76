"""Brings the schema to this version: numbered SQL files, each applied once, in its own transaction.

A file that has been applied anywhere is never edited; a changed one is refused by its checksum.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Final

from tallymark_collector.errors import UserError
from tallymark_collector.store.database import SCHEMA, Connection, find_schema

LOCK: Final = 0x7A11_1234
"""Advisory lock: of several collectors that start together, one migrates and the others wait for it."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the file's text."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def available() -> list[Migration]:
    """The migrations that this version of the code has, in order."""
    folder = resources.files(__package__) / "sql"
    found = [
        Migration(int(file.name[:4]), file.name.removesuffix(".sql"), file.read_text("utf-8"))
        for file in folder.iterdir()
        if file.name.endswith(".sql") and file.name[:4].isdigit()
    ]
    return sorted(found, key=lambda migration: migration.version)


async def pending(connection: Connection) -> list[Migration]:
    """What `migrate` would apply. Raises UserError where the database and this code do not fit."""
    found = await (await connection.execute("SELECT to_regclass(%s)", [f"{SCHEMA}.migration"])).fetchone()
    if found is None or found[0] is None:
        return available()
    applied = await (await connection.execute("SELECT version, name, checksum FROM migration")).fetchall()
    return _pending(available(), applied)


async def migrate(connection: Connection, steps: Sequence[Migration] | None = None) -> list[str]:
    """Applies what is pending and returns the names. Safe to call from several processes at once.

    `steps` stands in for the files of this version (tests of the chain).
    """
    async with alone(connection):
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        await find_schema(connection)
        await connection.execute(
            f"""CREATE TABLE IF NOT EXISTS {SCHEMA}.migration (
                version integer PRIMARY KEY, name text NOT NULL, checksum text NOT NULL,
                applied_at timestamptz NOT NULL DEFAULT now())"""
        )
        applied = await (await connection.execute("SELECT version, name, checksum FROM migration")).fetchall()
        todo = _pending(available() if steps is None else steps, applied)
        for migration in todo:
            async with connection.transaction():
                await connection.execute(migration.sql)
                await connection.execute(
                    "INSERT INTO migration (version, name, checksum) VALUES (%s, %s, %s)",
                    [migration.version, migration.name, migration.checksum],
                )
        return [migration.name for migration in todo]


@asynccontextmanager
async def alone(connection: Connection) -> AsyncIterator[None]:
    """No other process migrates meanwhile; waits its turn. May be nested."""
    await connection.execute("SELECT pg_advisory_lock(%s)", [LOCK])
    try:
        await find_schema(connection)
        yield
    finally:
        if not connection.closed:
            await connection.execute("SELECT pg_advisory_unlock(%s)", [LOCK])


def _pending(steps: Sequence[Migration], applied: Sequence[tuple[int, str, str]]) -> list[Migration]:
    known = {step.version: step for step in steps}
    for version, name, checksum in applied:
        if version not in known:
            raise UserError(
                f"the database has migration {name}, which this version of Tallymark does not know: upgrade Tallymark"
            )
        if known[version].checksum != checksum:
            raise UserError(f"migration {name} was changed after it had been applied to this database")
    done = {version for version, _, _ in applied}
    return [step for step in steps if step.version not in done]
