"""Files that `tallymark import` reads: which are known, how far each was read, and which line is which.

A piece of a file is written in one transaction: its points, its lines, and how far the file is read then. Importers of
one source take turns; should two meet all the same (a session that was lost), the second finds the file further on than
it expects, and its transaction is undone.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from psycopg.errors import UniqueViolation

from tallymark_collector.errors import StoreUnavailable
from tallymark_collector.model import fingerprint, without_nul
from tallymark_collector.store import Note, Store, rows
from tallymark_collector.store.database import Connection

_POINTS_FROM_SQL: Final = "SELECT points_from FROM usage_kept WHERE points_from > '-infinity'"

_SOURCE_SQL: Final = """
INSERT INTO usage_import_source (tenant, name, source, mapping) VALUES (%s, %s, %s, %s::jsonb) ON CONFLICT DO NOTHING"""

_MAPPING_SQL: Final = """
INSERT INTO usage_import_mapping (source, number, mapping) VALUES (%s, %s, %s::jsonb) ON CONFLICT DO NOTHING"""

_FORGET_SQL: Final = """
UPDATE usage_import_file SET bytes = 0, lines = 0, digest = NULL, updated_at = now() WHERE source = %s AND file <> %s"""

# An index leads to the first line of a source, none to that of a file.
_KEPT_SQL: Final = """
SELECT s.mapping, ARRAY(SELECT m.mapping FROM usage_import_mapping m WHERE m.source = s.source ORDER BY m.number),
       EXISTS (SELECT FROM usage_import_line l WHERE l.source = s.source)
FROM usage_import_source s WHERE s.source = %s"""

_ELSEWHERE_SQL: Final = """
SELECT s.name, f.path, f.bytes, f.lines, f.digest
FROM usage_import_source s JOIN usage_import_file f ON f.source = s.source
WHERE s.tenant = %s AND s.source <> %s AND f.digest IS NOT NULL AND f.bytes > 0
  AND EXISTS (SELECT FROM usage_import_line l WHERE l.source = s.source)"""

_FILES_SQL: Final = """
SELECT file, bytes, lines, digest FROM usage_import_file WHERE source = %s AND digest IS NOT NULL AND bytes > 0"""

_KNOWN_SQL: Final = """
SELECT l.key, l.digest, f.path, l.line
FROM usage_import_line l JOIN usage_import_file f ON f.source = l.source AND f.file = l.file
WHERE l.source = %s AND l.key = ANY (%s::uuid[])"""

_STATE_SQL: Final = "SELECT bytes, digest FROM usage_import_file WHERE source = %s AND file = %s FOR NO KEY UPDATE"
_BEGIN_SQL: Final = """
INSERT INTO usage_import_file (source, file, path, bytes, lines) VALUES (%s, %s, %s, 0, 0) ON CONFLICT DO NOTHING"""
_ADVANCE_SQL: Final = """
UPDATE usage_import_file SET path = %s, bytes = %s, lines = %s, digest = %s, updated_at = now()
WHERE source = %s AND file = %s"""


class Progress(NamedTuple):
    """How far a file is read: `digest` is over its first `size` bytes, in which `lines` lines are."""

    size: int
    lines: int
    digest: bytes


class KnownFile(NamedTuple):
    """A file that was read before."""

    file: UUID
    progress: Progress


class OthersFile(NamedTuple):
    """A file of another source, and how it was called last."""

    source: str
    path: str
    progress: Progress


class Kept(NamedTuple):
    """How a source has been read."""

    mappings: Sequence[Mapping[str, Any]]
    """From the first to the one in force; none of a source that nobody has read."""
    billed: bool
    """Whether a line of it was accepted."""


class Registration(NamedTuple):
    """A mapping that comes into force with the first piece that is read by it."""

    tenant: str
    name: str
    number: int
    """Mappings before it."""
    mapping: Mapping[str, Any]
    forgets: bool
    """Files that were read before are read again."""


class Stored(NamedTuple):
    """A line that was accepted before, and where it stood."""

    digest: int
    path: str
    line: int


class NewLine(NamedTuple):
    """A line that is accepted now."""

    key: UUID
    line: int
    digest: int
    account: str
    time_ns: int


def source_id(tenant: str, name: str) -> UUID:
    """The identity of a source."""
    return fingerprint("import", tenant, name)


@asynccontextmanager
async def alone(store: Store, source: UUID, note: Note) -> AsyncIterator[None]:
    """Until its end nobody else imports that source. Tells `note` if somebody does, and waits."""
    key = f"tallymark.import.{source}"
    async with store.session() as connection:
        row = await (await connection.execute("SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", [key])).fetchone()
        if row != (True,):
            note("another import of this source is under way: waiting for its end")
            await connection.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [key])
        try:
            yield
        finally:
            if not connection.closed:
                await connection.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", [key])


async def kept_from(store: Store) -> datetime | None:
    """Points of earlier times have been dropped and are not taken; None where all are kept."""
    async with store.reading() as connection:
        row = await (await connection.execute(_POINTS_FROM_SQL)).fetchone()
        return None if row is None else row[0]


async def kept(store: Store, source: UUID) -> Kept:
    """How the source has been read so far."""
    async with store.reading() as connection:
        row = await (await connection.execute(_KEPT_SQL, [source])).fetchone()
    return Kept((), billed=False) if row is None else Kept((row[0], *row[1]), row[2])


async def files(store: Store, source: UUID) -> list[KnownFile]:
    """The files of a source that can be known by their beginning."""
    async with store.reading() as connection:
        found = await (await connection.execute(_FILES_SQL, [source])).fetchall()
    return [KnownFile(file, Progress(size, lines, digest)) for file, size, lines, digest in found]


async def elsewhere(store: Store, tenant: str, source: UUID) -> list[OthersFile]:
    """Files of the tenant's other sources that can be known by their beginning; of those that have billed anything."""
    async with store.reading() as connection:
        found = await (await connection.execute(_ELSEWHERE_SQL, [tenant, source])).fetchall()
    return [OthersFile(name, path, Progress(size, lines, digest)) for name, path, size, lines, digest in found]


async def known(store: Store, source: UUID, keys: Sequence[UUID]) -> dict[UUID, Stored]:
    """Those of the lines that were accepted before."""
    async with store.reading() as connection:
        found = await (await connection.execute(_KNOWN_SQL, [source, list(keys)])).fetchall()
    return {key: Stored(digest, path, line) for key, digest, path, line in found}


async def advance(
    connection: Connection,
    source: UUID,
    file: UUID,
    path: str,
    before: Progress,
    after: Progress,
    lines: Sequence[NewLine],
    *,
    repeatable: bool,
    registration: Registration | None = None,
) -> None:
    """In a transaction with the lines' points: from now on the file is read up to `after`. Again changes nothing.

    With the first piece goes the mapping that it was read by, where that is not kept yet.

    Raises StoreUnavailable where the file is not read up to `before`. Of input that is not `repeatable` no digest is
    kept: it cannot be known again.
    """
    path = without_nul(path).encode(errors="backslashreplace").decode()
    await connection.execute(_BEGIN_SQL, [source, file, path])
    row = await (await connection.execute(_STATE_SQL, [source, file])).fetchone()
    assert row is not None, "it was inserted above, and files are not deleted"
    digest = after.digest if repeatable else None
    if row == (after.size, digest):
        return  # this transaction was committed, and the answer got lost
    if row[0] != before.size:
        raise StoreUnavailable(f"another import went on with {path} meanwhile: what it read is kept; start again")
    if registration is not None:
        await _register(connection, source, file, registration)
    copied = "".join(
        f"{rows.timestamp(each.time_ns)}\t{source}\t{each.key}\t{file}\t{each.line}\t{each.digest}"
        f"\t{rows.copy_text(each.account)}\n"
        for each in lines
    )
    statement = "COPY usage_import_line (time, source, key, file, line, digest, account) FROM STDIN"
    try:
        async with connection.cursor() as cursor, cursor.copy(statement) as copy:
            await copy.write(copied.encode())
    except UniqueViolation as error:
        raise StoreUnavailable("another import took lines of this source meanwhile: start again") from error
    await connection.execute(_ADVANCE_SQL, [path, after.size, after.lines, digest, source, file])


async def _register(connection: Connection, source: UUID, file: UUID, registration: Registration) -> None:
    tenant, name, number, mapping, forgets = registration
    written = json.dumps(mapping)
    if number:
        done = await connection.execute(_MAPPING_SQL, [source, number, written])
    else:
        done = await connection.execute(_SOURCE_SQL, [tenant, name, source, written])
    if not done.rowcount:
        raise StoreUnavailable("another import of this source began meanwhile: start again")
    if forgets:
        await connection.execute(_FORGET_SQL, [source, file])
