"""A parcel: the requests made from one segment, in a file, until the collector has acknowledged them all.

    magic, version                  16 bytes
    frames  one a request:  details length u32, body length u32, crc u32 over both, state u32 (0 to be sent, 1 handled),
            details             JSON: points, amounts by meter
            body                the OTLP request as it is sent, each time

The file is written under another name, synchronised and renamed: it is there whole or not at all. The state changes
afterwards, one aligned word; lost, the request is sent again and known again.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Final

from tallymark.batches import Request
from tallymark.quantities import Exact
from tallymark.segment import NEW

MAGIC: Final = b"TALLYOUT"
VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sII")
_FRAME: Final = struct.Struct("<IIII")
_TO_SEND, _HANDLED = 0, 1


class DamagedParcelError(ValueError):
    """A file that is no parcel, or none that this version reads; the message says why."""


class NewerParcelError(DamagedParcelError):
    """A parcel of a later version of Tallymark, which is able to read it."""


@dataclass(slots=True, eq=False)
class Batch:
    """One request on its way. Its bytes are read when it is sent."""

    parcel: Parcel
    points: int
    amounts: Mapping[str, Exact]
    size: int
    body: bytes | None = None
    """None where the body stands in the parcel's file, at `at`."""
    at: int = 0
    state_at: int = 0
    due: float = 0.0
    """Not to be tried before this time of the monotonic clock."""
    attempts: int = 0

    def read(self) -> bytes:
        """The request, as it was made. Raises OSError."""
        if self.body is not None:
            return self.body
        path = self.parcel.path()
        assert path is not None
        with path.open("rb") as file:
            file.seek(self.at)
            return file.read(self.size)


class Parcel:
    """The requests of one segment. `finish` is called once, when the last of them is handled.

    `path` says where its file stands, for a folder may be moved; it gives None for a parcel in memory. `own`: usage of
    this process, not of one that is gone.
    """

    def __init__(self, path: Callable[[], Path | None], own: bool, finish: Callable[[], None]) -> None:
        self.path = path
        self.own = own
        self.batches: list[Batch] = []
        self._finish = finish
        self._left = 0

    def add(self, batch: Batch) -> None:
        """One more request."""
        self.batches.append(batch)
        self._left += 1

    def handled(self, batch: Batch) -> None:
        """Leaves a note in the file, so that the request is not sent again by another process; the last note is the
        removal of the file. Never raises: what is not noted is sent again, and known again."""
        self._left -= 1
        with contextlib.suppress(OSError):
            if self._left == 0:
                self._finish()
            elif batch.body is None and (path := self.path()) is not None:
                file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.pwrite(file, struct.pack("<I", _HANDLED), batch.state_at)
                finally:
                    os.close(file)


def in_memory(requests: Iterable[Request], own: bool, finish: Callable[[], None]) -> Parcel:
    """A parcel for when there is no disk to write to."""
    parcel = Parcel(lambda: None, own, finish)
    for request in requests:
        parcel.add(Batch(parcel, request.points, request.amounts, len(request.body), request.body))
    return parcel


def write(path: Path, requests: Sequence[Request]) -> None:
    """Makes the file of a parcel; it is on the disk afterwards. Raises OSError, leaving nothing behind."""
    frames = []
    for request in requests:
        details = _details(request.points, request.amounts)
        crc = zlib.crc32(request.body, zlib.crc32(details))
        frames += [_FRAME.pack(len(details), len(request.body), crc, _TO_SEND), details, request.body]
    replace(path, _HEAD.pack(MAGIC, VERSION, 0) + b"".join(frames))


def replace(path: Path, data: bytes) -> None:
    """Writes a file under another name, synchronises it, renames it. Raises OSError, leaving nothing behind."""
    made = path.with_name(path.name + NEW)
    try:
        with open(made, "wb", opener=_private) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        made.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            made.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(where: Callable[[], Path], own: bool, finish: Callable[[], None]) -> tuple[Parcel, str | None]:
    """A parcel's requests that are still to be sent, and what is wrong with the file from some place on, or None.

    Raises DamagedParcelError where it is none, OSError.
    """
    data = where().read_bytes()
    if len(data) < _HEAD.size:
        raise DamagedParcelError(f"{len(data)} bytes are no parcel")
    magic, version, _ = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise DamagedParcelError("it does not begin as a parcel does")
    if version > VERSION:
        raise NewerParcelError(f"it has version {version}, this Tallymark reads {VERSION}")
    parcel = Parcel(where, own, finish)
    at = _HEAD.size
    while at < len(data):
        if at + _FRAME.size > len(data):
            return parcel, f"it ends inside a frame, at byte {at}"
        details_size, size, crc, state = _FRAME.unpack_from(data, at)
        begin = at + _FRAME.size + details_size
        if begin + size > len(data) or crc != zlib.crc32(data[at + _FRAME.size : begin + size]):
            return parcel, f"a frame's checksum is wrong, at byte {at}"
        if state == _TO_SEND:
            details = json.loads(data[at + _FRAME.size : begin])
            amounts = {meter: _amount(text) for meter, text in details["amounts"].items()}
            parcel.add(Batch(parcel, details["points"], amounts, size, at=begin, state_at=at + 12))
        at = begin + size
    return parcel, None


def repair(path: Path) -> None:
    """Rewrites a parcel's file with the requests in it that are still to be sent and can be read. Raises as `read`."""
    parcel, _ = read(lambda: path, False, lambda: None)
    write(path, [Request(batch.read(), batch.points, batch.amounts) for batch in parcel.batches])


def _details(points: int, amounts: Mapping[str, Exact]) -> bytes:
    texts = {
        meter: format(amount, "f") if isinstance(amount, Decimal) else str(amount) for meter, amount in amounts.items()
    }
    return json.dumps({"points": points, "amounts": texts}).encode()


def _amount(text: str) -> Exact:
    number = Decimal(text)
    return int(number) if number == number.to_integral_value() else number


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
