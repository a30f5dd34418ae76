"""Requests on their way to the collector: here from before they are first sent until they are acknowledged.

The order in which the requests are tried, and nothing else: where their bytes are kept is the parcels' affair.
"""

from __future__ import annotations

import threading
import time
from typing import Final

from tallymark.parcels import Batch, Parcel

MAX_BYTES: Final = 64 * 2**20
"""Size at which the outbox is full. A single cut may lie over it: it is never dropped."""


class Outbox:
    """Requests in the order in which they were made; a postponed one stands back without holding up the others."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._lock = threading.Lock()
        self._batches: dict[Batch, None] = {}
        self._bytes = 0
        self._max_bytes = max_bytes

    @property
    def full(self) -> bool:
        """True when no cut should be made: usage then goes on adding up in its segment, in a longer interval."""
        return self._bytes >= self._max_bytes

    def put(self, parcel: Parcel) -> None:
        """Keep a parcel's requests. To put the same parcel twice is an error."""
        with self._lock:
            for batch in parcel.batches:
                self._batches[batch] = None
                self._bytes += batch.size

    def head(self) -> Batch | None:
        """The request to send now, None when none is due: this process's own first. It stays."""
        now = time.monotonic()
        other: Batch | None = None
        with self._lock:
            for batch in self._batches:
                if batch.due <= now:
                    if batch.parcel.own:
                        return batch
                    other = other or batch
        return other

    def acknowledge(self, batch: Batch) -> None:
        """The collector has it, or a dead-letter file: forget it. Again for the same batch: nothing happens."""
        with self._lock:
            if batch not in self._batches:
                return
            del self._batches[batch]
            self._bytes -= batch.size
        batch.parcel.handled(batch)

    def postpone(self, batch: Batch, seconds: float) -> None:
        """Do not try it before so many seconds, so that a request which the collector cannot take holds up nobody."""
        batch.due = time.monotonic() + seconds

    def forget_others(self) -> None:
        """Leave what was found of dead processes to another process, which finds it where it stands."""
        with self._lock:
            for batch in [batch for batch in self._batches if not batch.parcel.own]:
                del self._batches[batch]
                self._bytes -= batch.size

    def batches(self, own: bool = True) -> tuple[Batch, ...]:
        """What is not acknowledged yet: this process's own, or what it found of others."""
        with self._lock:
            return tuple(batch for batch in self._batches if batch.parcel.own is own)

    def __len__(self) -> int:
        return len(self._batches)
