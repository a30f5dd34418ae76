"""Requests on the disk that the next hop has not acknowledged: a file each, in the order of their numbers."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import threading
import zlib
from pathlib import Path
from typing import Final, NamedTuple

from tallymark_collector.errors import UserError

SIGNALS: Final = ("metrics", "traces", "logs")
_NAME: Final = re.compile(r"(?P<number>\d{16})\.(?P<signal>metrics|traces|logs)", re.ASCII)
_HEAD: Final = struct.Struct(">4sIQ")
_MAGIC: Final = b"TMF1"


class Entry(NamedTuple):
    """One request."""

    number: int
    signal: str
    size: int
    """Bytes of its file."""

    @property
    def name(self) -> str:
        """Its file's."""
        return f"{self.number:016}.{self.signal}"


class Spool:
    """One folder, one collector's at a time. Safe to use from several threads."""

    def __init__(self, folder: Path, max_bytes: int, max_files: int) -> None:
        """Raises UserError where the folder cannot be used, or is another's."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._guard = threading.Lock()
        self._entries: dict[int, Entry] = {}
        self._bytes = 0
        self._next = 1
        self._lock = _locked(folder)
        try:
            self._load()
        except OSError as error:
            os.close(self._lock)
            raise UserError(f"--forward-dir {folder} cannot be read: {error.strerror}") from None

    def _load(self) -> None:
        for path in sorted(self._folder.iterdir()):
            found = _NAME.fullmatch(path.name)
            if found:
                self._add(Entry(int(found["number"]), found["signal"], path.stat().st_size))
            elif path.suffix == ".tmp":
                path.unlink()  # the process ended while it wrote
        self._next = max(self._entries, default=0) + 1

    @property
    def waiting(self) -> int:
        """Requests that are here."""
        return len(self._entries)

    def append(self, signal: str, body: bytes) -> int:
        """Keeps a request, and returns how many old ones were dropped for it; the new one itself counts where it alone
        passes the limit. Raises OSError: it was not kept."""
        size = _HEAD.size + len(body)
        if size > self._max_bytes:
            return 1
        dropped = self._make_room(size)
        entry = Entry(self._next, signal, size)
        self._next += 1
        written = self._folder / f"{entry.name}.tmp"
        try:
            with written.open("xb") as file:
                file.write(_HEAD.pack(_MAGIC, zlib.crc32(body), len(body)))
                file.write(body)
            written.rename(self._folder / entry.name)
        except OSError:
            written.unlink(missing_ok=True)
            raise
        with self._guard:
            self._add(entry)
        return dropped

    def oldest(self) -> Entry | None:
        """The request that is next."""
        with self._guard:
            return next(iter(self._entries.values()), None)

    def read(self, entry: Entry) -> bytes | None:
        """Its body; None where the file is damaged, or was dropped meanwhile."""
        try:
            data = (self._folder / entry.name).read_bytes()
        except FileNotFoundError:
            return None
        body = data[_HEAD.size :]
        whole = data[: _HEAD.size] == _HEAD.pack(_MAGIC, zlib.crc32(body), len(body))
        return body if whole else None

    def remove(self, entry: Entry) -> bool:
        """Forgets a request; False where it was dropped before."""
        with self._guard:
            if self._entries.pop(entry.number, None) is None:
                return False
            self._bytes -= entry.size
        (self._folder / entry.name).unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Leaves the folder to another."""
        os.close(self._lock)

    def _add(self, entry: Entry) -> None:
        self._entries[entry.number] = entry
        self._bytes += entry.size

    def _make_room(self, size: int) -> int:
        dropped = 0
        while self._bytes + size > self._max_bytes or len(self._entries) >= self._max_files:
            entry = self.oldest()
            if entry is None:
                break
            dropped += self.remove(entry)
        return dropped


def _locked(folder: Path) -> int:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"--forward-dir {folder} cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise UserError(f"--forward-dir {folder} is in use by another collector: give each its own") from None
    return lock
