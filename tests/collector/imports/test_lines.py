"""Bytes to lines and records: numbers, ends, limits, compression; and inputs that are none."""

from __future__ import annotations

import gzip
import os
import tracemalloc
from pathlib import Path

import pytest

from tallymark_collector.errors import UserError
from tallymark_collector.imports.lines import MAX_LINE, MAX_RECORD_LINES, Record, csv_records, lines, opened


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
