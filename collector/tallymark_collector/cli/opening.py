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
from tallymark_collector.store.engines import default_database, embedded_folder, libpq_string

DATABASE: Final = "--database"
OWNER_DATABASE: Final = "--owner-database"
VARIABLES: Final = {DATABASE: "TALLYMARK_DATABASE", OWNER_DATABASE: "TALLYMARK_OWNER_DATABASE"}
"""Options that name a database. After each variable's name with `_PASSWORD_FILE` stands a file with the password: a
container's secret, which an environment variable would show to whoever may look at the container."""


def named(database: str | None, option: str = DATABASE) -> str:
    """The database that is meant. Raises UserError where the text cannot name one, and never repeats a password."""
    named = _named(database, option)
    variable = f"{VARIABLES[option]}_PASSWORD_FILE"
    file = os.environ.get(variable)
    return named if file is None or embedded_folder(named) is not None else _with_password(named, Path(file), variable)


def _with_password(database: str, file: Path, variable: str) -> str:
    text = libpq_string(database)
    if conninfo_to_dict(text).get("password"):
        raise UserError(f"the database has a password in its connection string and one in {variable}: keep one")
    try:
        password = file.read_text("utf-8").removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"the file {file} of {variable} cannot be read: {reason}") from None
    if not password or "\n" in password or "\0" in password:
        raise UserError(f"the file {file} of {variable} must hold one line, the password, and nothing else")
    return database.removesuffix(text) + make_conninfo(text, password=password)


def _named(database: str | None, option: str) -> str:
    if database is None:
        return default_database()
    if embedded_folder(database) is not None:
        return database
    if misread(database):
        raise UserError(
            f"the password in {option} (or {VARIABLES[option]}) has an @ or / that is not escaped: write %40 for @ and"
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
            f"what was given as {option} (or {VARIABLES[option]}) names no database: write 'embedded:/some/folder',"
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
