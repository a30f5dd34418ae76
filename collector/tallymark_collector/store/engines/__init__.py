"""Where the database comes from. An engine gives a connection string; everything above it speaks PostgreSQL.

A database is named by one text:

- `embedded:` or `embedded:/some/folder`: a PostgreSQL of our own in that folder, started when it is first used and
  stopped when its last user leaves;
- anything that libpq takes (`postgresql://user@host/name`, `host=… dbname=…`): a PostgreSQL that is already there.
  What it can do is found out (`capabilities`), and where TimescaleDB is installed in it, that is used;
- the same after `timescale:`: TimescaleDB is asked for, is installed by `migrate` where it is missing, and that it
  cannot be is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from tallymark_collector.errors import UserError
from tallymark_collector.store.engines import embedded

_EMBEDDED = "embedded:"
_TIMESCALE = "timescale:"


def default_database() -> str:
    """The embedded database of this machine's user."""
    # As root the embedded server needs a folder that another system user may enter: not one under /root.
    root = Path("/var/lib/tallymark") if os.geteuid() == 0 else Path(platformdirs.user_data_dir("tallymark"))
    return f"{_EMBEDDED}{root / 'postgresql'}"


def embedded_folder(database: str) -> Path | None:
    """The folder of an embedded database, whether it is there or not; None where the text names no embedded one."""
    if database == _EMBEDDED:
        database = default_database()
    if not database.startswith(_EMBEDDED):
        return None
    return Path(database.removeprefix(_EMBEDDED)).expanduser().absolute()


def wants_timescale(database: str) -> bool:
    """True if the text asks for TimescaleDB."""
    return database.startswith(_TIMESCALE)


def libpq_string(database: str) -> str:
    """What libpq takes of a text that names no embedded database."""
    return database.removeprefix(_TIMESCALE)


@contextmanager
def connect_string(database: str) -> Iterator[str]:
    """A libpq connection string for the database; an embedded server runs while the context lasts.

    Raises UserError where the text names no database or the embedded server does not start.
    """
    folder = embedded_folder(database)
    if folder is not None:
        with embedded.server(folder) as dsn:
            yield dsn
    elif "://" in database or "=" in database:
        yield libpq_string(database)
    else:
        raise UserError(
            f"{database!r} names no database: give 'embedded:/some/folder' or a PostgreSQL connection string"
            " such as 'postgresql://user@host/name'"
        )
