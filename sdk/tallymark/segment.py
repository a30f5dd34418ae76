"""A segment: one interval's sums in a memory-mapped file, so that they outlive the process that counts them.

Adding to a sum is one aligned 8-byte store into a shared mapping: no system call, and what has been stored belongs to
the kernel, whatever becomes of the process. It survives SIGKILL, not the loss of the machine's power.

    header   64 bytes: magic, version, checksum, start, interval, end (0 while it is written to), heartbeat, and 1 where
             the end was written by an heir
    records  one after the other, each a multiple of 8 bytes:
             size  u32   of the whole record; written last, so that a record is there whole or not at all
             crc   u32   over kind, scale and body
             value i64   the sum, in units of 10^-scale; the only part that changes
             kind  u8    1 the producer, 2 a stream, 3 nothing (fills a chunk up), 4 a stream whose sum is wide,
                         5 what the producer had recorded before (`tallymark.totals`)
             scale u8
             body  length u32, then what `tallymark.streams` wrote, padded

A sum that an int64 cannot hold stands in a wide record: before the body lie two banks of 512 bits in units of
10^-WIDE_PLACES, and the value says which of them counts. The other one is written, then the value: so every recording
becomes valid by one store, and a process killed at any instruction leaves each of its calls in whole or not at all.

A file is made under another name and gets its own when its header and its producer stand in it. It grows by chunks
whose space is reserved on disk before they are mapped: writing to a mapped hole on a full disk would end the process
with SIGBUS. Numbers are little-endian, as is every machine that CPython's wheels are made for.

Version 2 added kind 5, and streams that count evidence: version 1 would bill these, so it must not read them.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tallymark.yielding import restful

MAGIC: Final = b"TALLYSEG"
VERSION: Final = 2
HEADER: Final = struct.Struct("<8sIIqqqq")  # magic, version, crc, start, interval, end, heartbeat
HEADER_SIZE: Final = 64
_FIXED: Final = struct.Struct("<8sIqq")  # what the header's checksum covers: magic, version, start, interval
_START, _INTERVAL, _END, _HEARTBEAT, _SEALED = 16 // 8, 24 // 8, 32 // 8, 40 // 8, 48 // 8

RECORD: Final = struct.Struct("<IIqBBxxI")  # size, crc, value, kind, scale, body length
PRODUCER, STREAM, FILLER, WIDE, BASE = 1, 2, 3, 4, 5
WIDE_PLACES: Final = 100
_BANK: Final = 64
_WIDE_MAX: Final = 2 ** (8 * _BANK)

NEW: Final = ".new"
"""Ends the name of a file that is still being made and holds no usage."""

FIRST_CHUNK: Final = 64 * 1024
MAX_CHUNK: Final = 4 * 1024 * 1024
RECORDS_BETWEEN_RESTS: Final = 256

MAX_BODY: Final = 1024 * 1024

Slot = tuple[memoryview, int]
"""Where a sum stands: `view[index]`."""


class DamagedSegmentError(ValueError):
    """A file that is no segment, or one whose beginning cannot be trusted; the message says why."""


class NewerSegmentError(DamagedSegmentError):
    """A segment of a later version of Tallymark, which is able to read it."""


class Segment:
    """A segment that is being written to. Not thread-safe: its owner holds a lock.

    With `path` None it lives in memory alone, for when there is no disk to write to.
    """

    def __init__(
        self, path: Path | None, start_ns: int, interval_ns: int, producer: bytes = b"", number: int = 0
    ) -> None:
        """`number` orders the segments of a process. Raises OSError where the file cannot be made or its space not
        be reserved."""
        self.path = path
        self.start_ns = start_ns
        self.interval_ns = interval_ns
        self.end_ns = 0
        self.empty = True
        self._chunks: list[tuple[mmap.mmap, memoryview]] = []
        self._size = 0
        self._used = 0
        self.number = number
        self._file = -1
        self._unwritten: list[bytes] = []
        made = None if path is None else path.with_name(path.name + NEW)
        try:
            if made is not None:
                self._file = os.open(made, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            self._grow(FIRST_CHUNK)
            self._write_header()
            if producer:
                self.append(PRODUCER, producer)
            if made is not None and path is not None:
                made.rename(path)
        except BaseException:
            self.close()
            if made is not None:
                with contextlib.suppress(OSError):
                    made.unlink()
            raise

    def beat(self, now_ns: int) -> None:
        """Says that the process was alive at this time: what is recovered is dated by it."""
        self._words()[_HEARTBEAT] = now_ns

    def begin(self, start_ns: int) -> None:
        """Moves the beginning of a segment in memory, which no other process reads."""
        self.start_ns = start_ns
        self._write_header()

    def end(self, time_ns: int) -> None:
        """Says where the interval ends. What is added afterwards, before the owner lets go, still belongs to it."""
        self.end_ns = time_ns
        self._words()[_END] = time_ns

    def carry(self, bases: Iterable[bytes]) -> None:
        """Says what the producer had recorded before. Without room on the disk it is in memory, where no heir finds
        it."""
        for body in bases:
            try:
                self.append(BASE, body)
            except OSError:
                self._unwritten.append(body)

    def add_wide(self, body: bytes, amount: int) -> WideSlot:
        """Adds a wide record that begins with `amount`, in units of 10^-WIDE_PLACES. Raises OSError as `append`."""
        banks = amount.to_bytes(_BANK, "little") + bytes(_BANK)
        words, index = self.append(WIDE, banks + body, WIDE_PLACES)
        return WideSlot(self._chunks[-1][0], words, index)

    def append(self, kind: int, body: bytes, scale: int = 0, value: int = 0) -> Slot:
        """Adds a record and returns where its value stands. Raises OSError where the disk is full."""
        if len(body) > MAX_BODY:
            raise ValueError(f"a record of {len(body)} bytes; at most {MAX_BODY} fit")
        size = -(-(RECORD.size + len(body)) // 8) * 8
        left = self._size - self._used
        if left < size + RECORD.size:
            self._fill(left)
            self._grow(max(min(self._size, MAX_CHUNK), size + RECORD.size))
        offset = self._write(kind, body, scale, value, size)
        self.empty = self.empty and kind not in (STREAM, WIDE)
        return self._chunks[-1][1], offset // 8 + 1

    def close(self) -> None:
        """Gives memory and descriptor back; the file stays."""
        chunks, self._chunks = self._chunks, []
        for mapped, view in chunks:
            view.release()
            # A handler's thread may still hold the view for the length of one addition.
            with contextlib.suppress(BufferError):
                mapped.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def contents(self, *, rests: bool = False) -> Contents:
        """What has been recorded so far. With `rests` handlers run meanwhile, which takes longer."""
        found = parse([mapped for mapped, _ in self._chunks], rests=rests)
        return replace(found, base=(*found.base, *self._unwritten)) if self._unwritten else found

    def copy(self) -> list[bytes]:
        """The same, to be parsed where no lock is held."""
        return [bytes(mapped) for mapped, _ in self._chunks]

    def _words(self) -> memoryview:
        return self._chunks[0][1]

    def _write_header(self) -> None:
        crc = zlib.crc32(_FIXED.pack(MAGIC, VERSION, self.start_ns, self.interval_ns))
        header = HEADER.pack(MAGIC, VERSION, crc, self.start_ns, self.interval_ns, self.end_ns, 0)
        self._chunks[0][0][: HEADER.size] = header

    def _grow(self, length: int) -> None:
        length = -(-length // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if self._file < 0:
            mapped = mmap.mmap(-1, length)
        else:
            _reserve(self._file, self._size, length)
            mapped = mmap.mmap(self._file, length, offset=self._size)
        self._chunks.append((mapped, memoryview(mapped).cast("q")))
        self._used = self._size if self._size else HEADER_SIZE
        self._size += length

    def _fill(self, length: int) -> None:
        if length >= RECORD.size:
            self._write(FILLER, b"", 0, 0, length)

    def _write(self, kind: int, body: bytes, scale: int, value: int, size: int) -> int:
        """Returns the record's offset in the last chunk."""
        mapped, words = self._chunks[-1]
        offset = self._used - (self._size - len(mapped))
        crc = _crc(kind, scale, body)
        # Everything but the size first; then size and checksum in one store, which makes the record be there.
        RECORD.pack_into(mapped, offset, 0, 0, value, kind, scale, len(body))
        mapped[offset + RECORD.size : offset + RECORD.size + len(body)] = body
        words[offset // 8] = struct.unpack("<q", struct.pack("<II", size, crc))[0]
        self._used += size
        return offset


class WideSlot:
    """Where a wide sum stands."""

    __slots__ = ("_banks", "_index", "_mapped", "_words")

    def __init__(self, mapped: mmap.mmap, words: memoryview, index: int) -> None:
        self._mapped = mapped
        self._words = words
        self._index = index
        self._banks = (index - 1) * 8 + RECORD.size

    def add(self, amount: int) -> None:
        """Adds to the sum, in units of 10^-WIDE_PLACES. Raises OverflowError past 512 bits, having added nothing."""
        now = self._words[self._index]
        at, to = self._banks + now * _BANK, self._banks + (1 - now) * _BANK
        total = int.from_bytes(self._mapped[at : at + _BANK], "little") + amount
        self._mapped[to : to + _BANK] = total.to_bytes(_BANK, "little")
        self._words[self._index] = 1 - now


@dataclass(frozen=True, slots=True)
class Contents:
    """A segment as it stands in its file. Times in Unix nanoseconds."""

    start_ns: int
    interval_ns: int
    end_ns: int
    """0 where the process did not come to end the interval."""
    heartbeat_ns: int
    producer: bytes
    """Empty where usage was recorded before `configure()` said who sends it."""
    sums: Mapping[int, Mapping[bytes, int]]
    """By scale and stream: the sum in units of 10^-scale. Flat, for there may be very many (see tallymark.yielding)."""
    damaged: bool
    """True where the records stop making sense before the file ends; what stands before that is in `sums`."""
    base: tuple[bytes, ...] = ()
    """What the producer had recorded before, for `tallymark.totals` to read."""
    sealed: bool = False
    """True where the end was written by an heir: no other segment of the process began at it."""


def read(path: Path) -> Contents:
    """What a segment's file holds. Raises DamagedSegmentError, OSError."""
    return parse([path.read_bytes()], rests=True)


def seal(path: Path, end_ns: int) -> None:
    """Writes the end of an interval into the file of a process that died before it came to it: whoever reads it
    from now on dates it alike. Raises OSError."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(file, struct.pack("<q", 1), _SEALED * 8)
        os.pwrite(file, struct.pack("<q", end_ns), _END * 8)
    finally:
        os.close(file)


def carry(path: Path, bases: Iterable[bytes]) -> None:
    """`Segment.carry` for the segment of a process that died before it came to it. Raises OSError, ValueError."""
    data = path.read_bytes()
    offset = HEADER_SIZE
    while offset + RECORD.size <= len(data) and (size := RECORD.unpack_from(data, offset)[0]):
        offset += size
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if any(data[offset:]):  # of a record whose writer was killed before it was whole
            os.pwrite(file, bytes(len(data) - offset), offset)
        for body in bases:
            size = -(-(RECORD.size + len(body)) // 8) * 8
            os.pwrite(file, RECORD.pack(0, 0, 0, BASE, 0, len(body)) + body.ljust(size - RECORD.size, b"\0"), offset)
            os.pwrite(file, struct.pack("<II", size, _crc(BASE, 0, body)), offset)
            offset += size
    finally:
        os.close(file)


def parse(chunks: Sequence[bytes | mmap.mmap], *, rests: bool = False) -> Contents:
    """What the bytes of a segment hold, cut at the ends of records if at all. Raises DamagedSegmentError."""
    data = chunks[0] if chunks else b""
    if len(data) < HEADER_SIZE:
        raise DamagedSegmentError(f"{len(data)} bytes are no segment")
    magic, version, crc, start, interval, end, heartbeat = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise DamagedSegmentError("it does not begin as a segment does")
    if version > VERSION:
        raise NewerSegmentError(f"it has version {version}, this Tallymark reads {VERSION}")
    if crc != zlib.crc32(_FIXED.pack(magic, version, start, interval)):
        raise DamagedSegmentError("its header's checksum is wrong")
    producer, base, damaged = b"", [], False
    sums: dict[int, dict[bytes, int]] = {}
    found = itertools.chain.from_iterable(_records(c, 0 if n else HEADER_SIZE) for n, c in enumerate(chunks))
    for record in found if not rests else restful(found, RECORDS_BETWEEN_RESTS):
        if record is None:
            damaged = True
            break
        kind, scale, value, body = record
        if kind == PRODUCER:
            producer = body
        elif kind in (STREAM, WIDE) and value:
            of_scale = sums.setdefault(scale, {})
            of_scale[body] = of_scale.get(body, 0) + value
        elif kind == BASE:
            base.append(body)
    sealed = data[_SEALED * 8] == 1
    return Contents(start, interval, end, heartbeat, producer, sums, damaged, tuple(base), sealed)


def _records(data: bytes | mmap.mmap, offset: int) -> Iterator[tuple[int, int, int, bytes] | None]:
    """(kind, scale, value, body) of each record; None, and nothing more, where one is damaged."""
    while offset + RECORD.size <= len(data):
        size, crc, value, kind, scale, length = RECORD.unpack_from(data, offset)
        if size == 0:  # the end, or a record whose writer was killed before it was whole
            return
        body = data[offset + RECORD.size : offset + RECORD.size + length]
        whole = size % 8 == 0 and RECORD.size + length <= size <= len(data) - offset
        if not whole or crc != _crc(kind, scale, body) or value < 0 or (kind == WIDE and value > 1):
            yield None
            return
        if kind == WIDE:
            value = int.from_bytes(body[value * _BANK : (value + 1) * _BANK], "little")
            body = body[2 * _BANK :]
        yield kind, scale, value, body
        offset += size


def _crc(kind: int, scale: int, body: bytes) -> int:
    return zlib.crc32(bytes((kind, scale)) + (body[2 * _BANK :] if kind == WIDE else body))


def _reserve(file: int, offset: int, length: int) -> None:
    """Space on the disk, not only in the file's length. Raises OSError (ENOSPC)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, offset, length)
    else:
        os.pwrite(file, bytes(length), offset)
