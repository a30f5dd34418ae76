"""A part of a query's groups at a time, in the order of what they are grouped by.

A page goes on behind a group's key, not behind a number of rows: what arrives between two pages then neither hides nor
doubles any other group. The order is of bytes, and the same on every database, whatever its collation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Final, NamedTuple, TypeAlias

from tallymark_collector.store.database import Connection

PAGE_BYTES: Final = 1024 * 1024
"""Of a page's rows, as text. Clients of gRPC take messages of 4 MiB, unless they are told otherwise."""
_ROW_BYTES: Final = 200
"""Of a row beside its texts: the names of its columns, a number, what lies around them."""
_PIECE: Final = 500
"""Rows of a page that are fetched at a time."""
_FETCH_SQL: Final = f"FETCH {_PIECE} FROM tallymark_page"

_TIMES: Final = frozenset({"hour", "day"})
_TIME_SQL: Final = "YYYY-MM-DD HH24:MI:SS"

AFTER_SQL: Final = "(%(after)s::text[] IS NULL OR {key} > %(after)s::text[])"
"""What holds of the groups of a page, and of those that follow it."""

Key: TypeAlias = "tuple[str | None, ...]"
"""What a row is grouped by, as text, in the order of its columns."""


class Page(NamedTuple):
    """A part of the rows, in the order of their keys: those behind a key, so many at most."""

    size: int
    after: Key | None = None
    """None: from the first."""
    bytes: int = PAGE_BYTES
    """Past it a page ends, behind one row at least."""


def key_sql(columns: Mapping[str, str]) -> str:
    """A group's key, of expressions by their names. Nothing comes before an empty text."""
    texts = (
        f"to_char({expression}, '{_TIME_SQL}')" if name in _TIMES else f"{expression}::text"
        for name, expression in columns.items()
    )
    return f"""(ARRAY[{", ".join(f"coalesce('=' || {text}, '')" for text in texts)}] COLLATE "C")"""


def key(values: Iterable[object]) -> Key:
    """The same of a row that was read."""
    return tuple(map(_text, values))


def arguments(page: Page | None) -> dict[str, object]:
    """For a query that ends in `HAVING {AFTER_SQL} … LIMIT %(limit)s`."""
    if page is None:
        return {"after": None, "limit": None}
    after = None if page.after is None else ["" if text is None else f"={text}" for text in page.after]
    return {"after": after, "limit": page.size + 1}


async def rows(
    connection: Connection, page: Page | None, query: str, values: Mapping[str, object]
) -> tuple[list[tuple[object, ...]], bool]:
    """A query's rows, and whether others follow behind the page."""
    if page is None:
        return await (await connection.execute(query, values)).fetchall(), False
    found: list[tuple[object, ...]] = []
    size = 0
    # By a cursor of the server's: what does not go into the page does not come here at all. psycopg's own object for
    # one warns where its transaction is cut off before it is closed.
    await connection.execute(f"DECLARE tallymark_page NO SCROLL CURSOR FOR {query}", values)
    more = False
    while not more and (piece := await (await connection.execute(_FETCH_SQL)).fetchall()):
        for row in piece:
            size += _ROW_BYTES + sum(len(value.encode()) for value in row if isinstance(value, str))
            if found and (len(found) == page.size or size > page.bytes):
                more = True
                break
            found.append(row)
    await connection.execute("CLOSE tallymark_page")
    return found, more


def _text(value: object) -> str | None:
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds").removesuffix("+00:00")
    return None if value is None else str(value)
