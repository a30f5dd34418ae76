"""A process's folder on the disk, and the lock that says whether the process lives.

    <state dir>/<service>-<hash of endpoint and headers>/
        <folder>/lock               held by flock as long as the process lives: the kernel lets go of it, nobody else
        <folder>/00000001.segment   usage as it is counted      (tallymark.segment)
        <folder>/00000001.otlp      usage as it is sent         (tallymark.parcels)
        damaged/, dead-letter/      what needs a person

A folder comes to life at once: it is made under a hidden name with its lock held, then renamed. Whoever gets the lock
of another folder owns what is in it, provided that the lock's file is still the one at that path: its last owner may
have removed the folder in between. Of several processes one gets it.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from pathlib import Path
from typing import Final

from tallymark.reporting import Reporter
from tallymark.segment import NEW

try:
    import fcntl
except ImportError:  # Windows: usage is kept in memory
    fcntl = None  # type: ignore[assignment]

HAS_LOCKS: Final = fcntl is not None
LOCK: Final = "lock"
DAMAGED: Final = "damaged"
DEAD_LETTER: Final = "dead-letter"
SEGMENT: Final = ".segment"
PARCEL: Final = ".otlp"
ASIDE: Final = ".damaged"
MAX_ATTEMPTS: Final = 100
"""Times that a folder is made anew, when others that look for dead processes' folders have taken the unfinished one.
Each looks once: where many start together three were too few, and the process went on in memory."""

MAX_DAMAGED_BYTES: Final = 256 * 2**20
"""Size of `damaged/`, beyond which files that cannot be read stay in their own folder, under another name."""

_OWN: Final = re.compile(r"[0-9]{8,}\.(segment|otlp)")
_FOLDER: Final = re.compile(r"\.?[0-9a-f]{32}")


class Folder:
    """A folder whose lock this process holds."""

    def __init__(self, path: Path, lock: int) -> None:
        """Use `create` and `adopt`."""
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, place: Path) -> Folder:
        """A new folder in `place`, which is made if need be. Raises OSError where that cannot be."""
        if fcntl is None:
            raise OSError("this system has no flock")
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        for attempt in range(MAX_ATTEMPTS):
            name = uuid.uuid4().hex
            hidden = place / f".{name}"
            try:
                hidden.mkdir(mode=0o700)
                lock = os.open(hidden / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    hidden.rename(place / name)
                except BaseException:
                    os.close(lock)
                    raise
                return cls(place / name, lock)
            except (FileNotFoundError, BlockingIOError):  # another process took the unfinished one for a dead one's
                if attempt + 1 == MAX_ATTEMPTS:
                    raise
        raise AssertionError

    @classmethod
    def adopt(cls, path: Path) -> Folder | None:
        """The folder of a process that is gone; None where it lives, or another process was first. Raises OSError."""
        try:
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                path.rmdir()  # its last owner was killed between removing the lock and the folder
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held, there = os.fstat(lock), (path / LOCK).stat()
            if (held.st_ino, held.st_dev) == (there.st_ino, there.st_dev):
                return cls(path, lock)
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        return None

    def segment(self, number: int) -> Path:
        """Where the segment of this number stands."""
        return self.path / f"{number:08d}{SEGMENT}"

    def parcel(self, number: int) -> Path:
        """Where the requests made from it stand."""
        return self.path / f"{number:08d}{PARCEL}"

    def numbers(self, kind: str) -> list[int]:
        """The numbers of the files of a kind (SEGMENT or PARCEL), in order. Raises OSError."""
        return sorted(
            int(f.name[: -len(kind)]) for f in self.path.iterdir() if _OWN.fullmatch(f.name) and f.suffix == kind
        )

    def set_aside(self, path: Path, reason: str, reporter: Reporter) -> None:
        """Moves a file that cannot be read to `damaged/`, with a message; where that is full, it stays here under a
        name that nobody reads. Raises OSError."""
        kept = self.path.parent / DAMAGED
        kept.mkdir(mode=0o700, exist_ok=True)
        if bytes_in(kept) + path.stat().st_size > MAX_DAMAGED_BYTES:
            if path.suffix != ASIDE:
                path = path.rename(path.with_name(path.name + ASIDE))
            reporter.error(
                f"damaged.{kept}",
                "%s is full (%d bytes): a file of usage that is damaged stays as %s: %s",
                kept,
                MAX_DAMAGED_BYTES,
                path,
                reason,
            )
            return
        target = kept / f"{self.path.name}-{path.name.removesuffix(ASIDE)}{ASIDE}"
        path.rename(target)
        reporter.error(f"damaged.{target}", "a file of usage is damaged and set aside as %s: %s", target, reason)

    def tidy(self, reporter: Reporter) -> None:
        """Removes what its maker did not come to finish, which holds no usage, and sets aside what is not Tallymark's.
        Raises OSError."""
        for path in self.path.iterdir():
            if path.name.endswith(NEW):
                path.unlink(missing_ok=True)
            elif path.name != LOCK and not _OWN.fullmatch(path.name):
                self.set_aside(path, "it is none of Tallymark's files", reporter)

    def remove(self) -> bool:
        """Removes the folder if it holds nothing but its lock any more, and lets go of the lock. False where there is
        something left in it."""
        left = False
        with contextlib.suppress(OSError):
            left = [path.name for path in self.path.iterdir()] != [LOCK]
            if not left:
                (self.path / LOCK).unlink()
                self.path.rmdir()
        self.release()
        return not left

    def release(self) -> None:
        """Lets go of the lock: the next process that looks finds the folder. Again: nothing happens."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def move(self, place: Path) -> None:
        """Moves the whole folder at once. Raises OSError where `place` lies on another disk, and nothing happens."""
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = place / self.path.name
        self.path.rename(target)
        self.path = target


def bytes_in(folder: Path) -> int:
    """The size of the files right in a folder. Raises OSError."""
    with os.scandir(folder) as found:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in found)


def folders_in(place: Path) -> list[Path]:
    """Folders of processes, alive and dead; none where there is no such place. Raises OSError."""
    try:
        return sorted(path for path in place.iterdir() if _FOLDER.fullmatch(path.name))
    except FileNotFoundError:
        return []
