"""COPY into several tables with one message to the server.

Sent one by one, BEGIN, two COPYs and COMMIT are six waits for an answer: for the rows of a small request they cost more
than the rows. One message may hold several statements. Where no transaction is under way they are one: it is committed
before the last of them is answered, or nothing of it is kept (PostgreSQL's documentation, "Multiple Statements in a
Simple Query"). psycopg's own `copy` takes one statement; this is the same for several, with libpq as psycopg has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

import psycopg
from psycopg import generators
from psycopg.abc import PQGen
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn
from psycopg.waiting import Wait

from tallymark_collector.store import binary
from tallymark_collector.store.database import Connection

_CHUNK: Final = 1024
"""Rows handed to the connection at once, about 100 KB: the server works on them while the next are put together."""


class Copy(NamedTuple):
    """Rows for a table."""

    statement: str
    """COPY ... FROM STDIN (FORMAT binary); it may have others before it whose answers nobody wants."""
    rows: Sequence[bytes]


async def copy(connection: Connection, *copies: Copy) -> None:
    """Copies all of these rows or raises psycopg.Error. Outside of a transaction, returns after the commit."""
    await connection.wait(_copying(connection.pgconn, copies, connection.info.encoding))


def _copying(pgconn: PGconn, copies: Sequence[Copy], encoding: str) -> PQGen[None]:
    pgconn.send_query(";".join(one.statement for one in copies).encode())
    yield from generators.send(pgconn)
    for one in copies:
        if not (yield from _asks(pgconn, encoding)):
            raise psycopg.ProgrammingError(f"no COPY FROM STDIN: {one.statement}")
        for chunk in _chunks(one.rows):
            while not pgconn.put_copy_data(chunk):
                yield Wait.W
            yield from generators.send(pgconn)
        while not pgconn.put_copy_end():
            yield Wait.W
        yield from generators.send(pgconn)
    if (yield from _asks(pgconn, encoding)):
        raise psycopg.ProgrammingError("more COPY FROM STDIN than rows for them")


def _asks(pgconn: PGconn, encoding: str) -> PQGen[bool]:
    """True once the server asks for rows, False once it has answered the whole message. Raises what it complains of."""
    while (result := (yield from generators.fetch(pgconn))) is not None:
        if result.status == ExecStatus.COPY_IN:
            return True
        if result.status == ExecStatus.FATAL_ERROR:
            with suppress(psycopg.DatabaseError):  # it may have hung up after that
                while (yield from generators.fetch(pgconn)) is not None:
                    pass
            raise error_from_result(result, encoding=encoding)
    return False


def _chunks(rows: Sequence[bytes]) -> Iterator[bytes]:
    for start in range(0, max(len(rows), 1), _CHUNK):
        before = b"" if start else binary.HEADER
        after = binary.TRAILER if start + _CHUNK >= len(rows) else b""
        yield b"".join((before, *rows[start : start + _CHUNK], after))
