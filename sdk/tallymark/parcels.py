"""A parcel: the requests made from one segment, in a file, until the collector has acknowledged them all.

    magic, version u32, attempted u32 (NEVER, or anything else)
    frames  one a request:  details length u32, body length u32, crc u32 over both, state u32 (0 to be sent, 1 handled),
            details             JSON: points, amounts by meter
            body                the OTLP request as it is sent, each time
    A merged parcel (tallymark.merging) begins with a handled frame without a body, whose details are the numbers of the
    parcels that it replaces.

The file is written under another name, synchronised and renamed: it is there whole or not at all. Two words change
afterwards, each by one aligned store. A state that is lost means that the request is sent again and known again. That a
request of the parcel is going to be sent is written and synchronised before it is: from then on the collector may have
it, whatever becomes of the process, and its bytes never change. Where the disk does not take that word, the owner's bit
for execution says it.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tallymark import quantities
from tallymark.batches import Request
from tallymark.folder import Folder
from tallymark.quantities import Exact
from tallymark.segment import NEW

MAGIC: Final = b"TALLYOUT"
VERSION: Final = 2
NEVER: Final = 0x7E5E2A11
"""Nothing of the parcel has been sent. Anything else, also the 0 of version 1: it may have been."""
_HEAD: Final = struct.Struct("<8sII")
_FRAME: Final = struct.Struct("<IIII")
_TO_SEND, _HANDLED = 0, 1
_ATTEMPTED_AT: Final = 12
_ATTEMPTED_MODE: Final = 0o700


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
        self.attempted = False
        """Some of it may have been sent. The outbox sets it when it hands a request out, `note_attempt` writes it."""
        self.claimed = False
        """It is being merged and not to be sent."""
        self.folder: Folder | None = None
        self.number = 0
        """Where its file stands; None and 0 for a parcel in memory."""
        self.finished: Callable[[], None] = lambda: None
        """What `finish` does besides removing the file."""
        self.interval: tuple[int, int] | None = None
        """Over which its points are, once somebody has looked."""
        self._finish = finish
        self._left = 0
        self._noted = False

    def add(self, batch: Batch) -> None:
        """One more request."""
        self.batches.append(batch)
        self._left += 1

    def note_attempt(self) -> None:
        """To be called before a request is sent: the file says from here on that it may have been. Raises OSError."""
        if self._noted or (path := self.path()) is None:
            return
        file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            try:
                os.pwrite(file, bytes(4), _ATTEMPTED_AT)
            except OSError:
                # A full disk may refuse even to change what is there. It must not keep usage from leaving it.
                os.fchmod(file, _ATTEMPTED_MODE)
            os.fsync(file)
        finally:
            os.close(file)
        self._noted = True

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


def write(path: Path, requests: Sequence[Request], attempted: bool = False, replaces: Sequence[int] = ()) -> None:
    """Makes the file of a parcel; it is on the disk afterwards. Raises OSError, leaving nothing behind.

    `attempted`: the same requests may have been sent already. `replaces`: numbers of the parcels that it was made of.
    """
    frames = []
    if replaces:
        details = json.dumps({"replaces": list(replaces)}).encode()
        frames += [_FRAME.pack(len(details), 0, zlib.crc32(details), _HANDLED), details]
    for request in requests:
        details = _details(request.points, request.amounts)
        crc = zlib.crc32(request.body, zlib.crc32(details))
        frames += [_FRAME.pack(len(details), len(request.body), crc, _TO_SEND), details, request.body]
    replace(path, [_HEAD.pack(MAGIC, VERSION, 0 if attempted else NEVER), *frames])


def replace(path: Path, pieces: Iterable[bytes]) -> None:
    """Writes a file under another name, synchronises it, renames it. Raises OSError, leaving nothing behind."""
    made = path.with_name(path.name + NEW)
    try:
        with open(made, "wb", opener=_private) as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        made.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            made.unlink()
        raise
    synchronise(path.parent)


def synchronise(folder: Path) -> None:
    """Names that were made in the folder, or removed, are so on the disk. Raises OSError."""
    opened = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def read(where: Callable[[], Path], own: bool, finish: Callable[[], None]) -> tuple[Parcel, str | None]:
    """A parcel's requests that are still to be sent, and what is wrong with the file from some place on, or None.

    Raises DamagedParcelError where it is none, OSError.
    """
    path = where()
    data = memoryview(path.read_bytes())
    parcel = Parcel(where, own, finish)
    parcel.attempted = parcel._noted = _head(data) != NEVER or bool(path.stat().st_mode & stat.S_IXUSR)
    at = _HEAD.size
    while at < len(data):
        if at + _FRAME.size > len(data):
            return parcel, f"it ends inside a frame, at byte {at}"
        details_size, size, crc, state = _FRAME.unpack_from(data, at)
        begin = at + _FRAME.size + details_size
        if begin + size > len(data) or crc != zlib.crc32(data[at + _FRAME.size : begin + size]):
            return parcel, f"a frame's checksum is wrong, at byte {at}"
        if state == _TO_SEND:
            details = json.loads(bytes(data[at + _FRAME.size : begin]))
            amounts = {meter: quantities.of_text(text) for meter, text in details["amounts"].items()}
            parcel.add(Batch(parcel, details["points"], amounts, size, at=begin, state_at=at + 12))
        at = begin + size
    return parcel, None


def repair(path: Path) -> None:
    """Rewrites a parcel's file with the requests in it that are still to be sent and can be read. Raises as `read`."""
    parcel, _ = read(lambda: path, False, lambda: None)
    requests = [Request(batch.read(), batch.points, batch.amounts) for batch in parcel.batches]
    write(path, requests, attempted=True)


def replaced_by(path: Path) -> list[int]:
    """Numbers of the parcels that this one was made of. Raises as `read`; a damaged one tells of none."""
    with path.open("rb") as file:
        _head(file.read(_HEAD.size))
        frame = file.read(_FRAME.size)
        if len(frame) < _FRAME.size:
            return []
        details_size, size, crc, state = _FRAME.unpack(frame)
        if size or state != _HANDLED:
            return []
        details = file.read(details_size)
    return [int(number) for number in json.loads(details)["replaces"]] if crc == zlib.crc32(details) else []


def _head(data: bytes | memoryview) -> int:
    """The word that says whether something has been sent."""
    if len(data) < _HEAD.size:
        raise DamagedParcelError(f"{len(data)} bytes are no parcel")
    magic, version, attempted = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise DamagedParcelError("it does not begin as a parcel does")
    if version > VERSION:
        raise NewerParcelError(f"it has version {version}, this Tallymark reads {VERSION}")
    return int(attempted)


def _details(points: int, amounts: Mapping[str, Exact]) -> bytes:
    texts = {meter: quantities.text(amount) for meter, amount in amounts.items()}
    return json.dumps({"points": points, "amounts": texts}).encode()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
