"""Rows in COPY's binary format say what the server says of the same values in text."""

from __future__ import annotations

from decimal import Decimal
from struct import pack, unpack_from
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tallymark_collector.store import binary, rows
from tests.support.usage import BASE, point, stream

_whole = st.integers(0, 25).flatmap(lambda n: st.from_regex(rf"\A(0|[1-9][0-9]{{0,{max(n - 1, 0)}}})\Z"))
_digits = st.builds(
    lambda sign, whole, places: f"{sign}{whole}{'.' if places else ''}{places}",
    st.sampled_from(["", "-"]),
    _whole,
    st.text("0123456789", max_size=30),
)
_exponents = st.builds(lambda n, e: f"{n}E{e:+d}", st.integers(-(10**12), 10**12), st.integers(-18, 18))
EDGES = ["0", "-0", "0.00", "1", "-1", "9999", "10000", "10001", "0.0001", "0.00010", "0.00001", "99999999.99990000"]
EDGES += ["1E+30", "1E-30", "9" * 25 + "." + "9" * 30, "-" + "9" * 25 + "." + "0" * 29 + "1", "100000000", "0.1"]


def sent(dsn: str, kind: str, fields: list[bytes]) -> list[tuple[str, bytes]]:
    """Text and binary forms, the server's own, of values that were copied in."""
    send = {"numeric": "numeric_send", "timestamptz": "timestamptz_send", "text": "textsend"}[kind]
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(f"CREATE TEMP TABLE v (n int, v {kind})")  # type: ignore[arg-type]
        with connection.cursor().copy("COPY v FROM STDIN (FORMAT binary)") as copy:
            copy.write(binary.HEADER)
            for n, field in enumerate(fields):
                copy.write(pack(">hii", 2, 4, n) + field)
            copy.write(binary.TRAILER)
        return connection.execute(f"SELECT v::text, {send}(v) FROM v ORDER BY n").fetchall()  # type: ignore[arg-type]


def server_says(dsn: str, texts: list[str], kind: str, send: str) -> list[tuple[str, bytes]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        statement: Any = (
            f"SELECT v::{kind}::text, {send}(v::{kind}) FROM unnest(%s::text[]) WITH ORDINALITY AS t (v, n) ORDER BY n"
        )
        return connection.execute(statement, [texts]).fetchall()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(_digits, _exponents), max_size=40))
def test_a_numeric_is_what_the_server_makes_of_its_text(dsn: str, texts: list[str]) -> None:
    """To the bit: value, sign and number of decimal places."""
    # PostgreSQL knows no -0 and reads 1E+3 as 1000.
    texts = [*EDGES, *texts]
    assert sent(dsn, "numeric", [binary.numeric(str(Decimal(text))) for text in texts]) == server_says(
        dsn, texts, "numeric", "numeric_send"
    )


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 2**63), max_size=40))
def test_a_time_is_what_the_server_makes_of_its_text(dsn: str, times: list[int]) -> None:
    times = [0, 1, 999, 1000, BASE, BASE + 999_999_999, 946_684_799_999_999_999, 946_684_800_000_000_000, *times]
    fields = [binary.EIGHT + binary.timestamptz(ns) for ns in times]
    assert sent(dsn, "timestamptz", fields) == server_says(
        dsn, [rows.timestamp(ns) for ns in times], "timestamptz", "timestamptz_send"
    )


@pytest.mark.parametrize("digits", ["NaN", "Infinity", "1E-20000", "1E+140000"])
def test_what_numeric_cannot_hold_is_refused_as_the_server_would(digits: str) -> None:
    with pytest.raises(psycopg.DataError):
        binary.numeric(digits)


@given(st.text(max_size=300), st.text(max_size=300), st.integers(1, 40), st.integers(1, 40))
def test_a_rows_key_ends_where_its_series_begins(account: str, other: str, start: int, later: int) -> None:
    one = point(stream(account), start, start + 1, 5)
    [row, another, again] = rows.point_rows([one, point(stream(other), later, later + 1, 5), one._replace(value=7)])
    assert row.startswith(rows.key(row))
    [length] = unpack_from(">i", row, len(rows.key(row)))
    assert (length, row[len(rows.key(row)) + 4 :][:16]) == (16, one.stream.series.id.bytes)
    assert rows.key(row) == rows.key(again)
    same = (account, start) == (other, later)
    assert (rows.key(row) == rows.key(another)) == same
    if not same:
        assert (rows.key(row) < rows.key(another)) == (row < another), "rows sort by their key"
