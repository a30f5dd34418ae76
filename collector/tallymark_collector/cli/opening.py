"""From the text that a person gave to an open store: is it a database, is it there, is it migrated?"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tallymark_collector import application
from tallymark_collector.cli.redaction import misread, shown
from tallymark_collector.errors import UserError
from tallymark_collector.store import Store, migrations
from tallymark_collector.store.engines import default_database, embedded_folder

PASSWORD_FILE: Final = "TALLYMARK_DATABASE_PASSWORD_FILE"  # noqa: S105 - a name
"""Names a file with the database's password: a container's secret, which an environment variable would show to
whoever may look at the container."""


def named(database: str | None) -> str:
    """The database that is meant. Raises UserError where the text cannot name one, and never repeats a password."""
    named = _named(database)
    file = os.environ.get(PASSWORD_FILE)
    return named if file is None or embedded_folder(named) is not None else _with_password(named, Path(file))


def _with_password(database: str, file: Path) -> str:
    if conninfo_to_dict(database).get("password"):
        raise UserError(f"the database has a password in its connection string and one in {PASSWORD_FILE}: keep one")
    try:
        password = file.read_text("utf-8").removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"the file {file} of {PASSWORD_FILE} cannot be read: {reason}") from None
    if not password or "\n" in password or "\0" in password:
        raise UserError(f"the file {file} of {PASSWORD_FILE} must hold one line, the password, and nothing else")
    return make_conninfo(database, password=password)


def _named(database: str | None) -> str:
    if database is None:
        return default_database()
    if embedded_folder(database) is not None:
        return database
    if misread(database):
        raise UserError(
            "the password in --database (or TALLYMARK_DATABASE) has an @ or / that is not escaped: write %40 for @ and"
            " %2F for /"
        )
    readable = "://" in database or "=" in database
    if readable:
        try:
            conninfo_to_dict(database)
        except psycopg.Error:
            readable = False  # libpq's message may quote a piece of the password
    if not readable:
        raise UserError(
            "what was given as --database (or TALLYMARK_DATABASE) names no database: write 'embedded:/some/folder',"
            " 'postgresql://user@host/name' or 'host=… dbname=…'"
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
