"""Merging: in a full outbox neighbouring parcels of a process become one, whose streams cover all their intervals.

Resolution is lost, usage never is. Only parcels are merged of which nothing has been sent: what a collector may have,
with its acknowledgement lost, must go out as the same points again. Neighbours are parcels of one folder whose
intervals follow each other without a gap, so that the merged ones overlap nothing.

Why nothing is lost or doubled. For parcels a, b, …, z

1. they are claimed in the outbox: the sender takes none of them from here on;
2. their sums become requests, written under another name together with the numbers a, b, … (`replaces`),
   synchronised and renamed to z;
3. the files a, b, … are removed, and the folder is synchronised;
4. the new z takes the place of all of them in the outbox.

Killed before the rename, a process leaves a, b, …, z as they were. After it the new z holds all of the usage and says
which files are of no more use; who finds them removes them before it reads anything else (`complete`). z is not sent,
so never removed, before they are gone. The folder has one owner throughout.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from tallymark import parcels
from tallymark.folder import PARCEL, Folder
from tallymark.outbox import Outbox
from tallymark.parcels import DamagedParcelError, Parcel
from tallymark.reporting import Reporter
from tallymark.sums import Sums

MAX_TOGETHER: Final = 8
"""Parcels that are merged at once, so that resolution is lost step by step, the oldest first."""

MAX_BYTES_TOGETHER: Final = 16 * 2**20
"""Bytes of requests that are merged at once: they are in memory while they are."""

ENOUGH: Final = 0.5
"""Share of the outbox that is to be taken after merging, so that not every cut merges again."""


_ALONE: Final = -1, 0
"""In place of the interval of a parcel that has no neighbours, for its requests are of another form."""


class Merger:
    """Merges what stands in the outbox. Its methods may be called from any thread."""

    def __init__(self, outbox: Outbox, reporter: Reporter) -> None:
        self._outbox = outbox
        self._reporter = reporter
        self._unfinished: list[list[Parcel]] = []
        self._working = threading.RLock()
        self.merged = 0
        """Parcels that were merged into others, since the process began."""

    def make_room(self, most_bytes: float | None = None) -> None:
        """Merges until the outbox holds at most so many bytes (half of what it may, when left out), or nothing more
        can be merged. Never raises."""
        most = self._outbox.max_bytes * ENOUGH if most_bytes is None else most_bytes
        try:
            self._finish()
            progress = True
            while progress and self._outbox.size > most:
                progress = False
                for group in self._groups():
                    if self._outbox.size <= most:
                        return
                    progress = self._merge(group) or progress
        except Exception as error:
            self._reporter.error("merge", "intervals of usage cannot be merged now: %r", error, exc_info=error)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Merges nothing inside the block, in which the folders of others are let go of: who finds them completes."""
        with self._working:
            self._unfinished = [group for group in self._unfinished if group[0].own]
            yield

    def _groups(self) -> Iterator[list[Parcel]]:
        """Neighbours, oldest first."""
        by_folder: dict[Folder, list[Parcel]] = {}
        for parcel in self._outbox.never_attempted():
            if parcel.folder is not None:
                by_folder.setdefault(parcel.folder, []).append(parcel)
        for found in by_folder.values():
            group: list[Parcel] = []
            size = 0
            for parcel in sorted(found, key=lambda parcel: parcel.number):
                own = sum(batch.size for batch in parcel.batches)
                together = group and len(group) < MAX_TOGETHER and size + own <= MAX_BYTES_TOGETHER
                if not (together and self._interval(group[-1])[1] == self._interval(parcel)[0]):
                    if len(group) > 1:
                        yield group
                    group, size = [], 0
                group.append(parcel)
                size += own
            if len(group) > 1:
                yield group

    def _interval(self, parcel: Parcel) -> tuple[int, int]:
        if parcel.interval is None:
            try:
                sums = Sums()
                for batch in parcel.batches:
                    sums.take(batch.read())
                parcel.interval = sums.begin_ns, sums.end_ns
            except ValueError:
                parcel.interval = _ALONE
        return parcel.interval

    def _merge(self, group: list[Parcel]) -> bool:
        with self._working:
            folder, last = group[-1].folder, group[-1].number
            assert folder is not None
            numbers = [parcel.number for parcel in group]
            if any(folder.segment(number).exists() for number in numbers) or not self._outbox.claim(group):
                return False
            try:
                sums = Sums()
                for parcel in group:
                    for batch in parcel.batches:
                        sums.take(batch.read())
                parcels.write(folder.parcel(last), list(sums.requests()), replaces=numbers[:-1])
            except Exception as error:
                if not self._is_there(folder, last, numbers[:-1]):
                    self._outbox.give_back(group)
                    self._reporter.error("merge", "intervals of usage stay as they are: %r", error, exc_info=error)
                    return False
            self._unfinished.append(group)
            self._finish()
        return True

    def _is_there(self, folder: Folder, number: int, replaces: Sequence[int]) -> bool:
        """Whether the merged parcel had got its name when writing it failed."""
        try:
            return parcels.replaced_by(folder.parcel(number)) == list(replaces)
        except (OSError, DamagedParcelError):
            return False

    def _finish(self) -> None:
        """Steps 3 and 4. Raises OSError: then the merged requests are not sent before the next attempt to finish."""
        with self._working:
            while self._unfinished:
                group = self._unfinished[0]
                folder, last = group[-1].folder, group[-1].number
                assert folder is not None
                _remove(folder, [parcel.number for parcel in group[:-1]])
                self._outbox.exchange(group, self._read(folder, last, group))
                self.merged += len(group) - 1
                self._unfinished.pop(0)

    def _read(self, folder: Folder, number: int, group: Sequence[Parcel]) -> Parcel:
        def finished() -> None:
            for parcel in group:
                parcel.finished()

        def finish() -> None:
            try:
                folder.parcel(number).unlink(missing_ok=True)
            finally:
                finished()

        merged, fault = parcels.read(lambda: folder.parcel(number), group[-1].own, finish)
        if fault is not None:
            raise OSError(f"the merged parcel cannot be read: {fault}")
        merged.folder, merged.number, merged.finished = folder, number, finished
        begins, ends = group[0].interval, group[-1].interval
        assert begins is not None
        assert ends is not None
        merged.interval = begins[0], ends[1]
        return merged


def complete(folder: Folder) -> None:
    """Removes what a process that was killed in step 3 did not come to remove. Raises OSError."""
    for number in folder.numbers(PARCEL):
        try:
            replaced = parcels.replaced_by(folder.parcel(number))
        except (FileNotFoundError, DamagedParcelError):
            continue
        if replaced:
            _remove(folder, replaced)


def _remove(folder: Folder, numbers: Sequence[int]) -> None:
    for number in numbers:
        folder.segment(number).unlink(missing_ok=True)
        folder.parcel(number).unlink(missing_ok=True)
    parcels.synchronise(folder.path)
