"""Finds what processes that are gone have left, and sees to it that it is delivered under their own identity.

A folder found is kept locked until its last request is handled, then it is removed. What cannot be read is set aside
with a message and never deleted; what stands before the damage is billed. With its last segment goes the note that the
producer has ended, unless that segment is not the last word: where it is damaged, or ended by its owner who went on in
memory.

While the outbox is full, folders are not taken over but condensed, once each: what was counted becomes requests, the
intervals that follow each other are merged (`tallymark.merging`), and the folder is left until there is room.
"""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tallymark import parcels, segment, totals
from tallymark.batches import requests_of
from tallymark.folder import PARCEL, SEGMENT, Folder, folders_in
from tallymark.merging import Merger, complete
from tallymark.outbox import Outbox
from tallymark.packing import Packer
from tallymark.parcels import DamagedParcelError, NewerParcelError
from tallymark.reporting import Reporter
from tallymark.segment import Contents, DamagedSegmentError, NewerSegmentError

MAX_CONDENSED: Final = 50
"""Folders that are condensed at once, so that the signs of life of this process do not wait for long."""


class Recovery:
    """The heirs' side of a process. `run` belongs to one thread at a time, `release` may be called by another."""

    def __init__(
        self,
        outbox: Outbox,
        packer: Packer,
        merger: Merger,
        reporter: Reporter,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._outbox = outbox
        self._packer = packer
        self._merger = merger
        self._reporter = reporter
        self._clock_ns = clock_ns
        self._began_ns = clock_ns()
        self._adopted: dict[Path, _Adopted] = {}
        self._unreadable: set[Path] = set()
        self._condensed: set[Path] = set()
        self._lock = threading.Lock()
        self._working = threading.Lock()
        self._leaving = False

    def is_needed(self, place: Path | None, own: Path | None) -> bool:
        """Whether `place` holds folders besides this process's `own`, of processes alive or gone."""
        try:
            return place is not None and bool(self._others(place, own))
        except OSError:
            return False

    def run(self, place: Path | None, own: Path | None) -> None:
        """Puts the usage of processes that are gone into the outbox. Never raises; what does not work now is tried
        again at the next call."""
        if place is None or not self._working.acquire(blocking=False):
            return  # the thread of an earlier configuration is still at it
        try:
            self._run(place, own)
        finally:
            self._working.release()
            self._leave()

    def _run(self, place: Path, own: Path | None) -> None:
        try:
            others = self._others(place, own)
        except OSError as error:
            self._reporter.error("recover", "usage of earlier processes cannot be looked for now: %s", error)
            return
        condensed = 0
        for path in others:
            if self._leaving:
                return
            if self._outbox.full:
                self._merger.make_room()
            full = self._outbox.full
            if full and (path in self._condensed or condensed >= MAX_CONDENSED):
                continue
            try:
                folder = Folder.adopt(path)
                if folder is not None and full:
                    condensed += 1
                    self._condense(folder)
                elif folder is not None:
                    self._recover(folder, self._packer)
            except Exception as error:
                self._reporter.error("recover", "usage in %s cannot be recovered now: %r", path, error)

    def tell_of_other_credentials(self, place: Path) -> None:
        """Warns of usage that this service left under another endpoint or credential: it is not sent with this one."""
        service = place.name.rpartition("-")[0]
        try:
            for other in place.parent.glob(f"{service}-*"):
                if other != place and other.name.rpartition("-")[0] == service and self._has_orphans(other):
                    self._reporter.error(
                        f"elsewhere.{other}",
                        "usage of ended processes waits in %s for the endpoint and the headers it was recorded for: "
                        "where only these have changed, move the folders in it to %s",
                        other,
                        place,
                    )
        except OSError as error:
            self._reporter.error("recover", "usage of earlier processes cannot be looked for now: %s", error)

    def release(self) -> None:
        """Leaves what is not delivered to other processes: at once, or where another thread is in `run` when that is
        done with the folder that it is at, which nobody else may have before."""
        self._leaving = True
        self._leave()

    def _leave(self) -> None:
        # Whichever of the two threads sees the other's mark: none is between looking and letting go of the lock.
        while self._leaving and self._working.acquire(blocking=False):
            try:
                self._let_go()
                self._leaving = False
            finally:
                self._working.release()

    def _let_go(self) -> None:
        with self._merger.paused():
            self._outbox.forget_others()
            with self._lock:
                left, self._adopted = self._adopted, {}
            for adopted in left.values():
                adopted.folder.release()

    def close_inherited(self) -> None:
        """In a forked child: let go of the locks that are the parent's."""
        for adopted in self._adopted.values():
            adopted.folder.release()

    def _others(self, place: Path, own: Path | None) -> list[Path]:
        return [p for p in folders_in(place) if p != own and p not in self._adopted and p not in self._unreadable]

    def _has_orphans(self, place: Path) -> bool:
        for path in folders_in(place):
            folder = Folder.adopt(path)
            if folder is not None:
                folder.release()
                return True
        return False

    def _condense(self, folder: Folder) -> None:
        """Makes a folder as small as it can be and leaves it to whoever has room for it."""
        aside = Outbox(0)
        self._condensed.add(folder.path)
        try:
            self._recover(folder, Packer(aside, self._reporter))
            Merger(aside, self._reporter).make_room()
        finally:
            with self._lock:
                adopted = self._adopted.pop(folder.path, None)
            if adopted is not None:
                folder.release()

    def _recover(self, folder: Folder, packer: Packer) -> None:
        adopted = self._adopted[folder.path] = _Adopted(folder)
        try:
            folder.tidy(self._reporter)
            complete(folder)
            packed, segments = folder.numbers(PARCEL), folder.numbers(SEGMENT)
            self._link(folder, segments)
            for number in sorted({*packed, *segments}):
                with self._lock:
                    adopted.open += 1
                finished = _once(lambda: self._finished(adopted))
                try:
                    if number not in packed or not self._load(packer, folder, number, finished):
                        self._convert(packer, folder, number, finished, is_last=number == segments[-1])
                except (NewerSegmentError, NewerParcelError) as error:
                    adopted.keep = True
                    self._unreadable.add(folder.path)
                    self._reporter.error(f"newer.{folder.path}", "usage in %s is left alone: %s", folder.path, error)
                    finished()
                except BaseException:
                    finished()
                    raise
        except BaseException:
            adopted.keep = True
            raise
        finally:
            self._finished(adopted)  # for the one that it began with, so that it stayed open until here

    def _load(self, packer: Packer, folder: Folder, number: int, finished: Callable[[], None]) -> bool:
        """Puts a parcel into the outbox. False, and it is set aside, when its segment is the better source."""
        path = folder.segment(number)
        try:
            fault = packer.load(folder, number, own=False, finished=finished)
        except NewerParcelError:
            raise
        except DamagedParcelError as error:
            folder.set_aside(folder.parcel(number), str(error), self._reporter)
            if path.exists():
                return False
            finished()
            return True
        if fault is None:
            self._drop(folder, number, self._fault_of(path))
        elif path.exists():
            folder.set_aside(folder.parcel(number), fault, self._reporter)
            return False
        else:
            self._repair(folder, number, fault)
            packer.load(folder, number, own=False, finished=finished)
        return True

    def _link(self, folder: Folder, segments: list[int]) -> None:
        """Writes into each segment what was recorded before it, where its owner died before it came to it: while the
        segment before is still there."""
        for number, following in itertools.pairwise(segments):
            try:
                if totals.decode(segment.read(folder.segment(following)).base) is None:
                    contents = self._sealed(folder.segment(number))
                    base = totals.decode(contents.base)
                    if base is not None and not contents.damaged:
                        segment.carry(folder.segment(following), totals.encode(totals.after(base, contents)))
            except ValueError:  # damaged, which its own conversion tells of
                continue

    def _sealed(self, path: Path) -> Contents:
        contents = segment.read(path)
        if contents.end_ns:
            return contents
        segment.seal(path, self._end_of(contents))
        return segment.read(path)

    def _convert(
        self, packer: Packer, folder: Folder, number: int, finished: Callable[[], None], is_last: bool
    ) -> None:
        """Makes the parcel of a segment. Where its interval had been ended, the requests may have been sent from
        memory, for want of a disk."""
        path = folder.segment(number)
        try:
            attempted = bool(segment.read(path).end_ns)
            contents = self._sealed(path)
            requests = list(requests_of(contents, b"", closing=is_last and contents.sealed))
        except NewerSegmentError:
            raise
        except ValueError as error:
            folder.set_aside(path, str(error), self._reporter)
            finished()
            return
        fault = "a record's checksum is wrong; what stands before it is billed" if contents.damaged else None
        packer.pack(
            requests,
            folder,
            number,
            own=False,
            attempted=attempted,
            drop_segment=lambda: self._drop(folder, number, fault),
            finished=finished,
        )

    def _end_of(self, contents: Contents) -> int:
        """When the interval of a process that was killed ended: its last sign of life and one interval, at most now.

        Not after this process began, where that is later than the sign of life: it may count under the same name.
        """
        alive_ns = max(contents.start_ns, contents.heartbeat_ns)
        limit_ns = self._began_ns if self._began_ns > alive_ns else max(self._clock_ns(), alive_ns)
        return max(min(alive_ns + contents.interval_ns, limit_ns), contents.start_ns + 1)

    def _drop(self, folder: Folder, number: int, fault: str | None) -> None:
        path = folder.segment(number)
        if fault is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            folder.set_aside(path, fault, self._reporter)

    def _fault_of(self, path: Path) -> str | None:
        """What is wrong with a segment whose parcel is there, so that it is of no more use."""
        try:
            return "a record's checksum is wrong" if segment.read(path).damaged else None
        except FileNotFoundError:
            return None
        except DamagedSegmentError as error:
            return str(error)

    def _repair(self, folder: Folder, number: int, fault: str) -> None:
        """Replaces a damaged parcel by one with the requests that can be read, and keeps a copy of the damaged one."""
        path = folder.parcel(number)
        copy = path.with_name(path.name + ".copy")
        shutil.copyfile(path, copy)
        parcels.repair(path)
        folder.set_aside(copy, fault, self._reporter)

    def _finished(self, adopted: _Adopted) -> None:
        with self._lock:
            adopted.open -= 1
            if adopted.open > 0 or self._adopted.get(adopted.folder.path) is not adopted:
                return
        if adopted.keep:
            adopted.folder.release()
        elif not adopted.folder.remove():
            self._unreadable.add(adopted.folder.path)  # what is left in it needs a person
        with self._lock:
            self._adopted.pop(adopted.folder.path, None)


class _Adopted:
    """A folder of a process that is gone, and how many of its files are not done with. `keep`: there is something in it
    that this process leaves to another one, or to its own next attempt."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.open = 1
        self.keep = False


def _once(function: Callable[[], None]) -> Callable[[], None]:
    called: list[bool] = []

    def once() -> None:
        if not called:
            called.append(True)
            function()

    return once
