"""From a segment to a parcel: the one step at which usage changes its form, for the living and for the dead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from tallymark import parcels
from tallymark.batches import Request
from tallymark.folder import Folder
from tallymark.outbox import Outbox
from tallymark.reporting import Reporter


class Packer:
    """Puts requests into the outbox, on the disk where that is possible."""

    def __init__(self, outbox: Outbox, reporter: Reporter) -> None:
        self._outbox = outbox
        self._reporter = reporter
        self.in_memory = 0
        """Segments and parcels that were kept in memory for want of a disk, since the process began."""

    def pack(
        self,
        requests: Sequence[Request],
        folder: Folder | None,
        number: int,
        *,
        own: bool,
        attempted: bool = False,
        drop_segment: Callable[[], None],
        finished: Callable[[], None] = lambda: None,
    ) -> None:
        """The requests of the segment `number`. The segment is dropped when they are safe: on the disk, or else, in
        memory, handled. `finished` is called when they all are handled. `attempted`: the same requests may have been
        sent before, by a process that kept them in memory."""
        if not requests:
            drop_segment()
            finished()
            return
        if folder is not None:
            try:
                parcels.write(folder.parcel(number), requests, attempted)
            except OSError as error:
                self.not_durable(error)
            else:
                drop_segment()
                self.load(folder, number, own=own, finished=finished)
                return

        def finish() -> None:
            with contextlib.suppress(OSError):
                drop_segment()
            finished()

        self._outbox.put(parcels.in_memory(requests, own, finish))

    def load(self, folder: Folder, number: int, *, own: bool, finished: Callable[[], None]) -> str | None:
        """Puts what is still to be sent of a parcel's file into the outbox, and says what is wrong with the file: then
        nothing has been put. Raises DamagedParcelError, OSError."""

        def finish() -> None:
            with contextlib.suppress(OSError):
                folder.parcel(number).unlink(missing_ok=True)
            finished()

        parcel, fault = parcels.read(lambda: folder.parcel(number), own, finish)
        parcel.folder, parcel.number, parcel.finished = folder, number, finished
        if fault is None:
            if parcel.batches:
                self._outbox.put(parcel)
            else:
                finish()
        return fault

    def not_durable(self, error: OSError) -> None:
        """Counts and reports, loudly and not too often, that usage is in memory alone."""
        self.in_memory += 1
        self._reporter.error(
            "disk", "usage is kept in memory and would be lost with the process, the disk does not take it: %s", error
        )
