"""Who keeps what is stored: hours, their audit, columns, what is dropped.

Where the collector keeps the hours, its writer can do that. Continuous aggregates are made again, and pieces of a
table laid out or dropped, by their owner alone: then the loops work through a store of the owner's, and requests still
come in through the writer's.
"""

from __future__ import annotations

import secrets

from tallymark_collector.aggregates.retention import check_possible
from tallymark_collector.errors import UserError
from tallymark_collector.settings import Retention
from tallymark_collector.store import Store, keeping, roles
from tallymark_collector.store.database import Connection
from tallymark_collector.store.engines.capabilities import callable_schema


async def check_keeper(keeper: Store, receiver: Store, retention: Retention) -> None:
    """Raises UserError where `keeper` cannot do what this database and these settings ask for.

    `receiver` is the store that requests are written to, of a migrated database; where there is no other it is the
    keeper.
    """
    if keeper is not receiver:
        await _check_same(keeper, receiver)
    await check_possible(keeper, retention)
    if retention.columnstore_after is not None:
        await keeper.check_columns()
    async with keeper.session() as connection:
        user = connection.info.user
        if await roles.owns(connection):
            if await _owners_work(connection, retention):
                await callable_schema(connection)
            return
        if keeper is not receiver:
            raise UserError(
                f"--owner-database is for the owner of the database's tables, and its user {user!r} is not: name the"
                " user that runs `tallymark migrate`, or leave it out"
            )
        work = await _owners_work(connection, retention)
    if work:
        raise UserError(
            f"{work} takes the owner of the database's tables, and the user {user!r} is not: give the owner's"
            " connection string as --owner-database (or TALLYMARK_OWNER_DATABASE); requests are still written as"
            f" {user!r}"
        )


async def _owners_work(connection: Connection, retention: Retention) -> str:
    if await keeping.is_native(connection):
        return "keeping continuous aggregates"
    asked = {"--keep-points": retention.points, "--keep-evidence": retention.evidence}
    return " and ".join(name for name, age in asked.items() if age is not None)


async def _check_same(keeper: Store, receiver: Store) -> None:
    """An advisory lock is of one database of one server, however that is reached, and everybody may take one."""
    key = secrets.randbits(62)
    async with receiver.transaction() as one, keeper.transaction() as other:
        await one.execute("SELECT pg_advisory_xact_lock(%s)", [key])
        row = await (await other.execute("SELECT pg_try_advisory_xact_lock(%s)", [key])).fetchone()
    if row != (False,):
        raise UserError("--database and --owner-database are not the same database: name one, as two of its users")
