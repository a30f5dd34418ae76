"""What a database can do beyond plain PostgreSQL: asked of the database itself, never of a version or a name; and how
the extension that can do it is called."""

from __future__ import annotations

from importlib import resources
from typing import NamedTuple

import psycopg

from tallymark_collector.errors import UserError
from tallymark_collector.store.database import Connection


class Capabilities(NamedTuple):
    """What was found, as `sql/capabilities.sql` asks for it."""

    hypertables: bool
    """Tables can be cut up by time, and whole pieces dropped. (Who may call what does it is another question.)"""
    continuous_aggregates: bool
    """The database keeps sums by hour, and makes chosen hours again by force."""
    columnstore: bool
    """Old pieces can be kept as columns, and a policy can see to it."""
    installed: bool
    """The extension is in this database (its edition or age may lack all of the above)."""
    available: bool
    """The server has the extension's files."""
    preloaded: bool
    """The server was started with the extension's library."""


class State(NamedTuple):
    """What of it is in use, as `sql/state.sql` asks for it."""

    hypertables: bool = False
    continuous_aggregates: bool = False


def sql(name: str) -> str:
    """The text of an engine's SQL file."""
    return (resources.files(__package__) / "sql" / f"{name}.sql").read_text("utf-8")


async def called(connection: Connection, text: str) -> psycopg.sql.Composed:
    """A statement that calls the extension's functions: their schema, wherever an administrator has put it, stands for
    `{extension}`. Raises UserError where this role may not use that."""
    return psycopg.sql.SQL(text).format(extension=psycopg.sql.Identifier(await callable_schema(connection)))


async def callable_schema(connection: Connection) -> str:
    """The schema of the extension's functions. Raises UserError where this role may not call what is in it."""
    row = await (await connection.execute(sql("extension"))).fetchone()
    if row is None:
        raise UserError("TimescaleDB is not in this database any more: restore it from a backup")
    name, usable = row
    if not usable:
        user = connection.info.user
        what = psycopg.sql.SQL("GRANT USAGE ON SCHEMA {} TO {}")
        grant = what.format(psycopg.sql.Identifier(name), psycopg.sql.Identifier(user)).as_string(connection)
        raise UserError(
            f"TimescaleDB is in the schema {name!r} of this database, which the user {user!r} may not use: as an"
            f" administrator, run {grant}"
        )
    return str(name)


async def capabilities(connection: Connection) -> Capabilities:
    """What the database behind the connection can do."""
    row = await (await connection.execute(sql("capabilities"))).fetchone()
    assert row is not None
    return Capabilities(*row)


async def state(connection: Connection) -> State:
    """What a migrated database uses."""
    if not (await capabilities(connection)).installed:
        return State()
    row = await (await connection.execute(sql("state"))).fetchone()
    assert row is not None
    return State(*row)
