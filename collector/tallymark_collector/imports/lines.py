"""From bytes to lines, without ever holding more than a bounded piece.

A line ends with LF or CRLF. A record is a line, but for CSV, where quotes may hold line ends (csv_lines.py). A last
line without an end may still be being written: it is marked, and whoever reads decides.
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
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

from tallymark_collector.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_LINE: Final = 256 * 1024
"""Bytes of one line. A longer one is read over and rejected."""

STDIN: Final = "-"
_STDIN_NAME: Final = "standard input"
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
        piped = sys.stdin.buffer
        # It cannot be read twice: what was looked at is put before the rest.
        try:
            start = piped.read(2)
        except OSError as error:
            raise UserError(f"{_STDIN_NAME} cannot be read: {error.strerror}") from None
        stream = _readable(io.BufferedReader(_Prefixed(start, piped), _BUFFER), start, _STDIN_NAME)
        yield Input(stream, path, finished=True, repeatable=False, size=0, position=lambda: 0)
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
        start = raw.read(2)
        raw.seek(0)
        stream = _readable(raw, start, f"the file {path}")
        yield Input(stream, path, start == _GZIP, True, file.stat().st_size, raw.tell)


class _Prefixed(io.RawIOBase):
    """What was read of a stream, and the rest of it."""

    def __init__(self, start: bytes, rest: BinaryIO) -> None:
        self._start, self._rest = start, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        # As much as is there: a pipe's writer may be slow.
        piece = self._start or self._rest.read1(len(view))  # type: ignore[attr-defined]
        piece, self._start = piece[: len(view)], self._start[len(view) :]
        view[: len(piece)] = piece
        return len(piece)


def _readable(raw: BinaryIO, start: bytes, name: str) -> BinaryIO:
    """The text behind bytes that begin so. Raises UserError where it is none that can be read."""
    if start in _UTF16:
        raise UserError(f"{name} is UTF-16: convert it to UTF-8, e.g. iconv -f UTF-16 -t UTF-8")
    return io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER) if start == _GZIP else raw


def called(source: Input) -> str:
    """What the input is called in a sentence."""
    return _STDIN_NAME if source.name == STDIN else f"the file {source.name}"


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
            f"{called(source)} is damaged, or not whole yet, after line {number}: {error}; what was committed"
            " before stays, and is not billed again when the whole file is imported"
        ) from None
    except OSError as error:
        raise UserError(f"{called(source)} cannot be read on after line {number}: {error.strerror}") from None


def _too_long(source: Input, number: int, piece: bytes) -> Record:
    size, rest, last = len(piece), hashlib.blake2b(digest_size=16), piece
    while not last.endswith(b"\n") and (more := source.stream.readline(MAX_LINE)):
        rest.update(more)
        size += len(more)
        last = more
    content = piece[:MAX_LINE]
    fault = f"the line is longer than {MAX_LINE:,} bytes"
    return Record(number, 1, size, content, piece + rest.digest(), last.endswith(b"\n"), fault)
