"""What a database can do beyond plain PostgreSQL: asked of the database itself, never of a version or a name."""

from __future__ import annotations

from importlib import resources
from typing import NamedTuple

from tallymark_collector.store.database import Connection


class Capabilities(NamedTuple):
    """What was found, as `sql/capabilities.sql` asks for it."""

    hypertables: bool
    """Tables can be cut up by time, and whole pieces dropped."""
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
