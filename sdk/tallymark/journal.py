"""What is on the disk for this process: its running segment and its parcels.

Why a unit of usage goes out exactly once. Usage is in a segment when its call has returned. At a cut

1. the next segment is made, the running one's end is written, and the two are exchanged;
2. the old segment's sums become requests, which are written as a parcel of the same number under another name,
   synchronised and renamed;
3. the segment is removed, and the parcel when the collector has acknowledged its last request.

A process killed before the rename of step 2 leaves the segment alone: whoever recovers it makes the parcel, and nothing
of it has been sent. One killed after it leaves both, and the parcel counts: the segment is removed unread. Killed after
step 3 it leaves the parcel. A parcel is sent again with the same bytes, whose points the collector knows again. And a
folder has one owner at a time (`tallymark.folder`; `tallymark.recovery` is the heirs' side).

Without room on the disk the requests are kept in memory, and the segment stays until they are acknowledged. Converted
again after a crash, the same segment gives the same points: its end stands in it, and the conversion is a function of
its contents alone.

What the producer had recorded before an interval stands in its segment as well (`tallymark.totals`), for the control
totals: in the first one from the start, in each later one as soon as the sums of the one before are known, and before
that one is converted. Of a process killed in between, the heir finds both.

SIGTERM that nobody handles ends a process without a last delivery. No handler is installed, for that is the
service's affair: what was recorded is here, and the next process delivers it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tallymark import totals
from tallymark.batches import closing_requests, requests_of
from tallymark.folder import Folder
from tallymark.outbox import Outbox
from tallymark.packing import Packer
from tallymark.quantities import Exact
from tallymark.recorder import Recorder, by_meter
from tallymark.reporting import Reporter
from tallymark.segment import Contents, Segment
from tallymark.totals import Totals


class Journal:
    """One for each process. `new_segment` is called by whoever records, the rest by one thread at a time."""

    def __init__(
        self,
        outbox: Outbox,
        packer: Packer,
        reporter: Reporter,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._outbox = outbox
        self._packer = packer
        self._reporter = reporter
        self._clock_ns = clock_ns
        self._place: Path | None = None
        self._producer = b""
        self._interval_ns = 0
        self._folder: Folder | None = None
        self._number = 0
        self._frozen: list[Segment] = []
        self._contents: dict[int, Contents] = {}
        """What has been read of them already, until it is converted."""
        # What each producer that this process has been had recorded at the last cut; a new configuration may make it
        # another one.
        self._totals: dict[bytes, Totals] = {}
        self._closed: dict[bytes, Totals] = {}
        self._cutter = 0

    def open(self, place: Path | None, producer: bytes, interval_ns: int, recorder: Recorder) -> None:
        """From here on folders stand in `place`; None keeps everything in memory. `producer` is the record that says
        who counts. What was recorded until now is put into the outbox; what this process has in another place moves."""
        if self._folder is not None and place is not None and place != self._place:
            try:
                self._folder.move(place)
            except OSError as error:
                self._reporter.error("move", "usage stays in %s, it cannot be moved: %s", self._folder.path, error)
        self._place, self._producer, self._interval_ns = place, producer, interval_ns
        try:
            if not self._let_go(recorder):
                self.cut(recorder)
            for earlier in [known for known in self._totals if known != producer]:
                self._close_producer(earlier)
                del self._totals[earlier]
                self._closed.pop(earlier, None)
        except Exception as error:
            self._reporter.error("cut", "usage is kept until it can be converted: %r", error, exc_info=error)

    def new_segment(self, start_ns: int) -> Segment:
        """A segment for an interval that begins; in memory, with an error in the log, where the disk takes none."""
        number = self._number = self._number + 1
        if self._place is not None:
            if self._folder is not None and not self._folder.path.is_dir():
                self._folder.release()  # somebody has removed it
                self._folder = None
            try:
                if self._folder is None:
                    self._folder = Folder.create(self._place)
                path = self._folder.segment(number)
                return self._with_base(Segment(path, start_ns, self._interval_ns, self._producer, number))
            except OSError as error:
                self._packer.not_durable(error)
        return self._with_base(Segment(None, start_ns, self._interval_ns, self._producer, number))

    def _with_base(self, segment: Segment) -> Segment:
        # At a cut the sums before it are not known yet: they stop changing when the segments are exchanged.
        if self._cutter != threading.get_ident():
            segment.carry(totals.encode(self._base(self._producer, segment.start_ns)))
        return segment

    def _base(self, producer: bytes, start_ns: int) -> Totals:
        return self._totals.get(producer) or Totals.zero(start_ns)

    def cut(self, recorder: Recorder) -> int:
        """Puts what was recorded into the outbox; returns the number of sums. What an error stops is kept, and
        converted by the next call."""
        self._cutter = threading.get_ident()
        try:
            taken = recorder.cut(self._clock_ns())
        finally:
            self._cutter = 0
        for frozen in taken:
            if not frozen.number:
                frozen.number = self._number = self._number + 1
            self._frozen.append(frozen)
        for frozen in taken:
            self._count(frozen)
        if taken:
            recorder.carry(totals.encode(self._base(self._producer, taken[-1].end_ns)))
        count = 0
        while self._frozen:
            count += self._convert(self._frozen[0])
            self._frozen.pop(0).close()
        return count

    def _count(self, frozen: Segment) -> None:
        contents = frozen.contents(rests=True)
        owner = contents.producer or self._producer
        base = self._base(owner, contents.start_ns)
        if totals.decode(contents.base) is None:  # what the disk had no room for, or its first usage came during a cut
            frozen.carry(totals.encode(base))
            contents = replace(contents, base=tuple(totals.encode(base)))
        self._totals[owner] = totals.after(base, contents)
        self._contents[frozen.number] = contents

    def note_end(self, recorder: Recorder) -> bool:
        """Puts a note into the outbox that this process's totals are its last, if they are not noted yet. False, and
        nothing happens, where there is nothing to note or usage waits: then more totals will come."""
        if recorder or self._frozen or self._producer not in self._totals:
            return False
        return self._close_producer(self._producer)

    def _close_producer(self, producer: bytes) -> bool:
        last = self._totals[producer]
        if self._closed.get(producer) == last:
            return False
        number = self._number = self._number + 1
        folder = self._folder if self._place is not None else None
        requests = list(closing_requests(last, producer))
        self._packer.pack(requests, folder, number, own=True, drop_segment=lambda: None)
        self._closed[producer] = last
        return True

    def beat(self, recorder: Recorder) -> None:
        """A sign of life: what the next process recovers is dated by it."""
        recorder.beat(self._clock_ns())

    def unconverted(self) -> dict[str, Exact]:
        """Quantity by meter of what has been cut, but is not in the outbox yet."""
        return by_meter(*(frozen.contents() for frozen in self._frozen))

    def close(self, recorder: Recorder) -> None:
        """Removes the folder if nothing is left in it; the next usage, if any comes, makes another one. Otherwise all
        stays as it is, for this process or the next one, also where there was no time to note the end."""
        if self._folder is None or self._frozen or self._outbox.batches():
            return
        if self._totals.get(self._producer) != self._closed.get(self._producer):
            return
        if self._let_go(recorder):
            folder, self._folder = self._folder, None
            folder.remove()

    def where(self) -> Path | None:
        """The folder of this process, None while it has none."""
        return None if self._folder is None else self._folder.path

    def close_inherited(self) -> None:
        """In a forked child: let go of the parent's lock and mappings, so that the parent's end can be noticed."""
        if self._folder is not None:
            self._folder.release()
        for frozen in self._frozen:
            frozen.close()

    def _let_go(self, recorder: Recorder) -> bool:
        is_empty, segment = recorder.let_go()
        if segment is not None:
            segment.close()
            if segment.path is not None and self._folder is not None:
                self._folder.segment(segment.number).unlink(missing_ok=True)
        return is_empty

    def _convert(self, frozen: Segment) -> int:
        contents = self._contents.pop(frozen.number, None) or frozen.contents(rests=True)
        folder = self._folder if self._place is not None else None

        def drop_segment() -> None:
            if frozen.path is not None and folder is not None:
                folder.segment(frozen.number).unlink(missing_ok=True)

        requests = list(requests_of(contents, self._producer))
        self._packer.pack(requests, folder, frozen.number, own=True, drop_segment=drop_segment)
        return sum(map(len, contents.sums.values()))
