"""Requests on their way to the collector: here from before they are first sent until they are acknowledged.

The order in which the requests are tried, and nothing else: where their bytes are kept is the parcels' affair. A parcel
is handed to the sender, which makes it an attempted one, or claimed by the merger, never both.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Final

from tallymark.parcels import Batch, Parcel

MAX_BYTES: Final = 64 * 2**20
"""Size at which the outbox is full: this process's requests and those that it found. A single cut may lie over it: it
is never dropped."""

MAX_ATTEMPTED: Final = 0.5
"""Share of it that parcels may take which have been attempted and not acknowledged. These can never be merged, for the
collector may have them; so while a collector takes nothing, no more are begun, and the rest can be."""


class Outbox:
    """Requests in the order in which they were made; a postponed one stands back without holding up the others."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self._lock = threading.RLock()
        self._batches: dict[Batch, None] = {}
        self._attempted = 0
        self.max_bytes = MAX_BYTES if max_bytes is None else max_bytes
        self.size = 0
        """Bytes of the requests in it."""

    @property
    def full(self) -> bool:
        """True when no cut should be made: usage then goes on adding up in its segment, in a longer interval."""
        return self.size >= self.max_bytes

    def put(self, parcel: Parcel) -> None:
        """Keep a parcel's requests. To put the same parcel twice is an error."""
        with self._lock:
            for batch in parcel.batches:
                self._batches[batch] = None
            self._count(parcel, 1)

    def head(self) -> Batch | None:
        """The request to send now, None when none is due: this process's own first. It stays, and its parcel counts as
        attempted from here on."""
        with self._lock:
            batch = self._due()
            if batch is not None and not batch.parcel.attempted:
                self._count(batch.parcel, -1)
                batch.parcel.attempted = True
                self._count(batch.parcel, 1)
            return batch

    def is_due(self) -> bool:
        """Whether there is a request to send now."""
        with self._lock:
            return self._due() is not None

    def acknowledge(self, batch: Batch) -> None:
        """The collector has it, or a dead-letter file: forget it. Again for the same batch: nothing happens."""
        with self._lock:
            if batch not in self._batches:
                return
            self._forget(batch)
        batch.parcel.handled(batch)

    def postpone(self, batch: Batch, seconds: float) -> None:
        """Do not try it before so many seconds, so that a request which the collector cannot take holds up nobody."""
        batch.due = time.monotonic() + seconds

    def forget_others(self) -> None:
        """Leave what was found of dead processes to another process, which finds it where it stands."""
        with self._lock:
            for batch in [batch for batch in self._batches if not batch.parcel.own]:
                self._forget(batch)

    def batches(self, own: bool = True) -> tuple[Batch, ...]:
        """What is not acknowledged yet: this process's own, or what it found of others."""
        # Without the lock: where a signal's handler waits for another thread, what it interrupts keeps that.
        return tuple(batch for batch in list(self._batches) if batch.parcel.own is own)

    def never_attempted(self) -> list[Parcel]:
        """Parcels of which nothing can have reached the collector, in order."""
        with self._lock:
            parcels = dict.fromkeys(batch.parcel for batch in self._batches)
            return [parcel for parcel in parcels if not parcel.attempted and not parcel.claimed]

    def claim(self, parcels: Sequence[Parcel]) -> bool:
        """Keep them from being sent, all or none: False where one has been attempted, or is not here any more."""
        with self._lock:
            if any(p.attempted or p.claimed or p.batches[0] not in self._batches for p in parcels):
                return False
            for parcel in parcels:
                parcel.claimed = True
            return True

    def give_back(self, parcels: Sequence[Parcel]) -> None:
        """Let claimed ones be sent again."""
        for parcel in parcels:
            parcel.claimed = False

    def exchange(self, claimed: Sequence[Parcel], merged: Parcel) -> None:
        """Put one parcel in the place of those that were claimed."""
        with self._lock:
            if claimed[0].batches[0] not in self._batches:
                return  # left to another process in the meantime
            batches: dict[Batch, None] = {}
            for batch in self._batches:
                if batch.parcel not in claimed:
                    batches[batch] = None
                elif batch.parcel is claimed[-1]:
                    batches.update(dict.fromkeys(merged.batches))
            self._batches = batches
            for parcel in claimed:
                self._count(parcel, -1)
            self._count(merged, 1)

    def __len__(self) -> int:
        return len(self._batches)

    def _due(self) -> Batch | None:
        now = time.monotonic()
        other: Batch | None = None
        crowded = self._attempted >= self.max_bytes * MAX_ATTEMPTED
        for batch in self._batches:
            parcel = batch.parcel
            if batch.due > now or parcel.claimed or (crowded and not parcel.attempted):
                continue
            if parcel.own:
                return batch
            other = other or batch
        return other

    def _forget(self, batch: Batch) -> None:
        del self._batches[batch]
        self.size -= batch.size
        if batch.parcel.attempted:
            self._attempted -= batch.size

    def _count(self, parcel: Parcel, sign: int) -> None:
        size = sign * sum(batch.size for batch in parcel.batches)
        self.size += size
        if parcel.attempted:
            self._attempted += size
