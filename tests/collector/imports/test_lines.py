"""Bytes to lines and records: numbers, ends, limits, compression; and inputs that are none."""

from __future__ import annotations

import csv
import gzip
import io
import os
import sys
import tracemalloc
from pathlib import Path
from random import Random

import pytest

from tallymark_collector.errors import UserError
from tallymark_collector.imports.csv_lines import MAX_RECORD_LINES, csv_records
from tallymark_collector.imports.lines import MAX_LINE, Record, lines, opened


def read(tmp_path: Path, content: bytes, csv: bool = False, final: bool = False) -> list[Record]:
    file = tmp_path / "file"
    file.write_bytes(content)
    with opened(str(file)) as source:
        found = list(csv_records(source, final=final) if csv else lines(source))
    assert sum(each.size for each in found) == len(content if content[:2] != b"\x1f\x8b" else gzip.decompress(content))
    return found


def test_line_ends_and_a_byte_order_mark_are_no_content(tmp_path: Path) -> None:
    found = read(tmp_path, b"\xef\xbb\xbfone\r\n\ntwo\n\rthree\r")
    assert [(each.number, each.content, each.ended) for each in found] == [
        (1, b"one", True),
        (2, b"", True),
        (3, b"two", True),
        (4, b"\rthree\r", False),
    ]


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    assert read(tmp_path, b"") == []
    assert read(tmp_path, gzip.compress(b"")) == []


def test_nul_bytes_are_content_like_any_other(tmp_path: Path) -> None:
    assert [each.content for each in read(tmp_path, b"\0\0a\nb\0\n")] == [b"\0\0a", b"b\0"]


@pytest.mark.parametrize("extra", [0, 1, 2, 10, MAX_LINE, 3 * MAX_LINE])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_that_is_too_long_is_read_over(tmp_path: Path, extra: int, end: bytes) -> None:
    found = read(tmp_path, b"a\n" + b"x" * (MAX_LINE + extra) + (end and b"\nb\n"))
    faults = [each.fault for each in found]
    assert faults == [
        None,
        None if extra == 0 else f"the line is longer than {MAX_LINE:,} bytes",
        *([None] if end else []),
    ]
    assert [each.number for each in found] == [1, 2, 3][: len(found)]
    assert found[1].ended is bool(end)
    assert len(found[1].content) <= MAX_LINE


def test_what_differs_behind_the_limit_is_seen(tmp_path: Path) -> None:
    one = read(tmp_path, b"x" * 2 * MAX_LINE + b"1\n")
    two = read(tmp_path, b"x" * 2 * MAX_LINE + b"2\n")
    assert one[0].content == two[0].content
    assert one[0].seen != two[0].seen


def test_memory_does_not_grow_with_a_line_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "long.gz"
    with gzip.open(file, "wb", compresslevel=1) as packed:
        for _ in range(48):
            packed.write(b"x" * 1024 * 1024)
        packed.write(b"\n" + b"short\n" * 1_000_000)
    tracemalloc.start()
    try:
        with opened(str(file)) as source:
            count = sum(1 for _ in lines(source))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 1_000_001
    assert peak < 8 * 1024 * 1024


def test_compressed_files_are_known_by_their_content_and_may_have_members(tmp_path: Path) -> None:
    found = read(tmp_path, gzip.compress(b"a\n") + gzip.compress(b"b"))
    assert [each.content for each in found] == [b"a", b"b"]


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:40] + b"\0" * 30 + b[70:], lambda b: b + b"rest"])
def test_damaged_compression_is_told_with_the_line(tmp_path: Path, damage: object) -> None:
    file = tmp_path / "file.gz"
    file.write_bytes(damage(gzip.compress(os.urandom(50_000).hex(" ", 8).replace(" ", "\n").encode())))  # type: ignore[operator]
    with (
        pytest.raises(UserError, match=r"file.gz is damaged, or not whole yet, after line \d+"),
        opened(str(file)) as source,
    ):
        list(lines(source))


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, said in [
        (tmp_path / "missing", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "a\0b", "cannot be read"),
    ]:
        with pytest.raises(UserError, match=said), opened(str(path)):
            pass


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("NOT TESTED: root may read every file")
    file = tmp_path / "secret"
    file.touch(mode=0)
    with pytest.raises(UserError, match="Permission denied"), opened(str(file)):
        pass


def test_utf_16_is_told(tmp_path: Path) -> None:
    file = tmp_path / "wide"
    file.write_bytes("a,b\n".encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16: convert it"), opened(str(file)):
        pass


# Standard input


class Trickling(io.RawIOBase):
    """A pipe that gives a byte at a time."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self._content.read(min(1, len(buffer)))
        buffer[: len(piece)] = piece
        return len(piece)


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Trickling(content))))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\ntwo", [b"one", b"two"]),
        (b"\xef\xbb\xbfone\n", [b"one"]),
        (b"1", [b"1"]),
        (b"", []),
        (gzip.compress(b"one\ntwo\n"), [b"one", b"two"]),
        (gzip.compress(b"one\n") + gzip.compress(b"two"), [b"one", b"two"]),
        (b"\x1f", [b"\x1f"]),
    ],
    ids=["lines", "a mark", "a byte", "nothing", "gzip", "members", "half a mark of gzip"],
)
def test_standard_input_is_read_like_a_file(
    monkeypatch: pytest.MonkeyPatch, content: bytes, expected: list[bytes]
) -> None:
    piped(monkeypatch, content)
    with opened("-") as source:
        assert [each.content for each in lines(source)] == expected
        assert (source.finished, source.repeatable) == (True, False)


@pytest.mark.parametrize("coding", ["utf-16-le", "utf-16-be"])
def test_utf_16_on_standard_input_is_told(monkeypatch: pytest.MonkeyPatch, coding: str) -> None:
    piped(monkeypatch, "\ufeffa,b\n".encode(coding))
    with pytest.raises(UserError, match="standard input is UTF-16: convert it"), opened("-"):
        pass


def test_damaged_compression_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, gzip.compress(b"one\n" * 1000)[:-9])
    with pytest.raises(UserError, match="standard input is damaged, or not whole yet"), opened("-") as source:
        list(lines(source))


# CSV


def test_quotes_hold_line_ends(tmp_path: Path) -> None:
    found = read(tmp_path, b'a,"one\ntwo ""x""\r\n",b\nnext\n', csv=True)
    assert [(each.number, each.lines, each.content) for each in found] == [
        (1, 3, b'a,"one\ntwo ""x""\n",b'),
        (4, 1, b"next"),
    ]


def test_a_quote_that_is_never_closed_costs_its_line(tmp_path: Path) -> None:
    rows = [b"row %d\n" % n for n in range(MAX_RECORD_LINES + 20)]
    found = read(tmp_path, b'"open\n' + b"".join(rows), csv=True)
    assert found[0].fault == "a quote is opened and never closed"
    assert [each.content + b"\n" for each in found[1:]] == rows
    assert [each.number for each in found] == list(range(1, len(rows) + 2))


def test_a_quote_at_the_end_of_a_file_may_still_be_closed(tmp_path: Path) -> None:
    [first, last] = read(tmp_path, b'a\n"open\nnext', csv=True)
    assert (first.content, first.ended) == (b"a", True)
    assert (last.ended, last.content) == (False, b'"open\nnext')
    [_, last] = read(tmp_path, b'a\n"open\nnext\n', csv=True)
    assert last.ended is False, "the closing quote may follow in the next line"


def test_a_quote_that_is_open_at_the_very_end_costs_its_line(tmp_path: Path) -> None:
    found = read(tmp_path, b'a\n"open\nnext\nlast', csv=True, final=True)
    assert [(each.content, each.fault is None, each.ended) for each in found] == [
        (b"a", True, True),
        (b'"open', False, True),
        (b"next", True, True),
        (b"last", True, False),
    ]


@pytest.mark.parametrize("final", [True, False])
def test_a_quote_inside_a_field_opens_nothing(tmp_path: Path, final: bool) -> None:
    rows = [b'n%d,5" pipe,1\n' % n if n in (100, 600) else b"n%d,pipe,1\n" % n for n in range(1000)]
    found = read(tmp_path, b"id,what,n\n" + b"".join(rows), csv=True, final=final)
    assert [each.content + b"\n" for each in found[1:]] == rows
    assert [each for each in found if each.fault or not each.ended] == []


@pytest.mark.parametrize(
    "content",
    [
        b'a,b"\n',
        b'a,"b"\n',
        b'a,"b ""x"" c"\n',
        b'"",""\n',
        b'""\n',
        b'"a,b",c\n',
        b'a, "b\n',
        b'a,"b"x\n',
        b'"a"b,"\n',
        b',"",\n',
    ],
)
def test_records_of_one_line(tmp_path: Path, content: bytes) -> None:
    found = read(tmp_path, content + b"x,y\n", csv=True)
    assert [each.content + b"\n" for each in found] == [content, b"x,y\n"]
    assert [each.fault for each in found] == [None, None], "what is wrong inside a line, its reader says"


@pytest.mark.parametrize("ends", [b'x"y,1\n', b'x",1,2\n', b'x" pipe,1\n'])
def test_a_quote_that_is_closed_wrongly_costs_its_line(tmp_path: Path, ends: bytes) -> None:
    """What it is closed by is a stray quote too, or the record has not the fields of the others."""
    rows = [b"row,%d\n" % n for n in range(20)]
    found = read(tmp_path, b'a,b\n1,"open\n' + b"".join(rows) + ends + b"last,1\n", csv=True)
    assert [each.content + b"\n" for each in found] == [b"a,b\n", b'1,"open\n', *rows, ends, b"last,1\n"]
    assert [each.number for each in found if each.fault] == [2]
    assert found[1].fault is not None
    assert "line 23" in found[1].fault


def test_a_line_that_is_too_long_closes_no_quote(tmp_path: Path) -> None:
    long = b"x" * (MAX_LINE + 5) + b"\n"
    found = read(tmp_path, b'"open\nnext\n' + long + b"last\n", csv=True)
    assert [(each.number, each.fault is None) for each in found] == [(1, False), (2, True), (3, False), (4, True)]


def test_the_delimiter_says_where_a_field_begins(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b'a\t"b\nc"\t1\n5,"x\t2\t3\n')
    with opened(str(file)) as source:
        found = list(csv_records(source, final=True, delimiter="\t"))
    assert [(each.number, each.lines) for each in found] == [(1, 2), (3, 1)]


def test_columns_that_are_known_are_those_of_the_first_record_too(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b'1,"open\n2,3\nx",4,5\n6,7\n')
    with opened(str(file)) as source:
        found = list(csv_records(source, final=True, columns=2))
    assert [(each.number, each.lines, each.fault is None) for each in found] == [
        (1, 1, False),
        (2, 1, True),
        (3, 1, True),
        (4, 1, True),
    ]


def test_records_are_those_of_the_csv_module(tmp_path: Path) -> None:
    """Of any bytes: where Python's own reader takes a file, and each record has as many fields, they are the same."""
    rng, compared = Random(7), 0
    for _ in range(4000):
        text = "".join(rng.choice('a",\n') for _ in range(rng.randrange(1, 14))) + "\n"
        try:
            expected = [row for row in csv.reader(text.splitlines(keepends=True), strict=True) if row]
        except csv.Error:
            continue
        if len({len(row) for row in expected}) > 1:
            continue
        found = [each for each in read(tmp_path, text.encode(), csv=True, final=True) if each.content.strip()]
        assert [next(csv.reader([each.content.decode()], strict=True)) for each in found] == expected, repr(text)
        compared += 1
    assert compared > 500


GROWING = b"""note,time,account,n
"hello
world",2026-11-01T00:00:00Z,acme,1
x,2026-11-01T00:00:00Z,acme,2
"a ""quoted""
text
of three",2026-11-01T00:00:00Z,"ac
me",3
"""


@pytest.mark.parametrize("cut", range(len(GROWING)))
def test_a_file_that_is_still_being_written_has_no_wrong_records(tmp_path: Path, cut: int) -> None:
    """Wherever it ends just now: what is whole is a record of the whole file, and what is not is left."""
    whole = [record.content for record in read(tmp_path, GROWING, csv=True, final=True)]
    assert len(whole) == 4
    now = read(tmp_path, GROWING[:cut], csv=True)
    assert [record.fault for record in now] == [None] * len(now)
    ended = [record.content for record in now if record.ended]
    assert ended == whole[: len(ended)]
    assert len(now) - len(ended) <= 1


def test_the_second_line_of_a_record_may_read_as_one(tmp_path: Path) -> None:
    """As long as the first does not: then these are no two quotes that strayed into lines of their own."""

    def alone(record: Record) -> bool:
        return record.content.count(b",") == 3

    path = tmp_path / "a.csv"
    path.write_bytes(GROWING)
    with opened(str(path)) as source:
        found = list(csv_records(source, final=True, alone=alone))
    assert [record.fault for record in found] == [None] * 4
