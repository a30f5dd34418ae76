"""From the text that a person gave to an open store: is it a database, is it there, is it migrated?"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tallymark_collector import application
from tallymark_collector.cli.redaction import misread, shown
from tallymark_collector.errors import UserError
from tallymark_collector.store import Store, migrations
from tallymark_collector.store.engines import default_database, embedded_folder, libpq_string


def named(database: str | None) -> str:
    """The database that is meant. Raises UserError where the text cannot name one, and never repeats a password."""
    if database is None:
        return default_database()
    if embedded_folder(database) is not None:
        return database
    if misread(database):
        raise UserError(
            "the password in --database (or TALLYMARK_DATABASE) has an @ or / that is not escaped: write %40 for @ and"
            " %2F for /"
        )
    text = libpq_string(database)
    readable = "://" in text or "=" in text
    if readable:
        try:
            conninfo_to_dict(text)
        except psycopg.Error:
            readable = False  # libpq's message may quote a piece of the password
    if not readable:
        raise UserError(
            "what was given as --database (or TALLYMARK_DATABASE) names no database: write 'embedded:/some/folder',"
            " 'postgresql://user@host/name' or 'host=… dbname=…', the last two also after 'timescale:'"
        )
    return database


def existing(database: str) -> str:
    """The same database. Raises UserError where it is an embedded one that nobody has made yet."""
    folder = embedded_folder(database)
    if folder is None:
        return database
    try:
        found = (folder / "PG_VERSION").exists()
    except OSError as error:
        raise UserError(f"the folder {folder} of the embedded database cannot be read: {error.strerror}") from None
    if not found:
        raise UserError(
            f"there is no embedded database in {folder}: make one with `tallymark serve` or `tallymark migrate`,"
            " or name another with --database (or TALLYMARK_DATABASE)"
        )
    return database


@asynccontextmanager
async def opened(database: str) -> AsyncIterator[Store]:
    """The store of a migrated database that is there already. Raises UserError."""
    async with application.opened(existing(database)) as store:
        async with store.reading() as connection:
            pending = await migrations.pending(connection)
        if pending:
            names = ", ".join(migration.name for migration in pending)
            raise UserError(f"the database {shown(database)} lacks {names}: run `tallymark migrate`")
        yield store
