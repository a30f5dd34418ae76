"""From bytes to lines, and from lines to records, without ever holding more than a bounded piece.

A line ends with LF or CRLF. A record is a line, but for CSV, where quotes may hold line ends. A last line without an
end may still be being written: it is marked, and whoever reads decides.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, cast

from tallymark_collector.errors import UserError

MAX_LINE: Final = 256 * 1024
"""Bytes of one line. A longer one is read over and rejected."""

MAX_RECORD_LINES: Final = 1000
"""Lines of one CSV record; its bytes are bounded by `MAX_LINE` too."""

STDIN: Final = "-"
_GZIP: Final = b"\x1f\x8b"
_BOM: Final = b"\xef\xbb\xbf"
_UTF16: Final = (b"\xff\xfe", b"\xfe\xff")
_BUFFER: Final = 64 * 1024


class Record(NamedTuple):
    """One line, or the lines of one CSV record."""

    number: int
    """Of its first line, from 1."""
    lines: int
    size: int
    """Bytes that it takes in the input, its end included."""
    content: bytes
    """Without its end; of a line that is too long, its beginning."""
    seen: bytes
    """What stands for the record in the digest of what was read."""
    ended: bool
    """False for what stands last, without a line end."""
    fault: str | None = None


class Input(NamedTuple):
    """An open file, or the standard input."""

    stream: BinaryIO
    name: str
    finished: bool
    """True where what stands last is whole: nothing can be added to a compressed file's line or to a closed pipe."""
    repeatable: bool
    size: int
    """Bytes on the disk; 0 where nobody knows."""
    position: Callable[[], int]
    """Bytes read of them."""


@contextmanager
def opened(path: str) -> Iterator[Input]:
    """The input behind a path, decompressed. Raises UserError where it cannot be read."""
    if path == STDIN:
        stream = sys.stdin.buffer
        yield Input(cast("BinaryIO", stream), path, finished=True, repeatable=False, size=0, position=lambda: 0)
        return
    file = Path(path)
    try:
        raw = file.open("rb")
    except (OSError, ValueError) as error:
        said = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"the file {path} cannot be read: {said}") from None
    with raw:
        if not file.is_file():
            raise UserError(f"{path} is no ordinary file: pipe it in and write - for its name")
        start = raw.read(4)
        raw.seek(0)
        if start[:2] in _UTF16:
            raise UserError(f"the file {path} is UTF-16: convert it to UTF-8, e.g. iconv -f UTF-16 -t UTF-8")
        packed = start[:2] == _GZIP
        stream = io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER) if packed else raw
        yield Input(cast("BinaryIO", stream), path, packed, True, file.stat().st_size, raw.tell)


def lines(source: Input) -> Iterator[Record]:
    """The lines of an input. Raises UserError where its compression is damaged."""
    number = 0
    try:
        while piece := source.stream.readline(MAX_LINE + 2):
            number += 1
            content = piece.removesuffix(b"\n").removesuffix(b"\r") if piece.endswith(b"\n") else piece
            if number == 1:
                content = content.removeprefix(_BOM)
            if len(content) > MAX_LINE:
                yield _too_long(source, number, piece)
                continue
            yield Record(number, 1, len(piece), content, piece, piece.endswith(b"\n"))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"the file {source.name} is damaged, or not whole yet, after line {number}: {error}; what was committed"
            " before stays, and is not billed again when the whole file is imported"
        ) from None
    except OSError as error:
        raise UserError(f"the file {source.name} cannot be read on after line {number}: {error.strerror}") from None


def _too_long(source: Input, number: int, piece: bytes) -> Record:
    size, rest, last = len(piece), hashlib.blake2b(digest_size=16), piece
    while not last.endswith(b"\n") and (more := source.stream.readline(MAX_LINE)):
        rest.update(more)
        size += len(more)
        last = more
    content = piece[:MAX_LINE]
    fault = f"the line is longer than {MAX_LINE:,} bytes"
    return Record(number, 1, size, content, piece + rest.digest(), last.endswith(b"\n"), fault)


def csv_records(source: Input, *, final: bool) -> Iterator[Record]:
    """The records of CSV. A quote that is never closed costs its line alone: what follows is read again without it.

    At the end of an input that is not `final` it may still be closed: all since then is one record, not ended.
    """
    waiting: list[Record] = []
    incoming = lines(source)
    again: list[Record] = []
    quotes = 0
    while True:
        line = again.pop() if again else next(incoming, None)
        if line is not None:
            waiting.append(line)
            quotes += line.content.count(b'"')
        elif not waiting:
            return
        whole = quotes % 2 == 0 or waiting[0].fault is not None
        if whole:
            yield _joined(waiting)
        elif line is None or len(waiting) >= MAX_RECORD_LINES or sum(each.size for each in waiting) > MAX_LINE:
            if line is None and not final:
                yield _joined(waiting)._replace(ended=False)
                return
            yield waiting[0]._replace(fault="a quote is opened and never closed")
            again.extend(reversed(waiting[1:]))
        else:
            continue
        waiting, quotes = [], 0


def _joined(several: list[Record]) -> Record:
    first = several[0]
    if len(several) == 1:
        return first
    content = b"\n".join(each.content for each in several)
    fault = next((each.fault for each in several if each.fault), None)
    seen = b"".join(each.seen for each in several)
    return Record(first.number, len(several), sum(e.size for e in several), content, seen, several[-1].ended, fault)
