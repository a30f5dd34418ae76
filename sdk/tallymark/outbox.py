"""Batches on their way to the collector: here from before they are first sent until they are acknowledged.

In memory: what is in it when the process is killed is lost. The four verbs are the seam behind which a durable outbox
stands; nothing else knows where batches are kept.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

from opentelemetry.sdk.metrics.export import MetricsData

from tallymark.quantities import Exact

MAX_POINTS: Final = 100_000
"""Points that the outbox takes before it is full. A single cut may lie over it: it is never split or dropped."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One export request. Sent again it has the same content, so that the collector knows the points again."""

    data: MetricsData
    points: int
    amounts: tuple[tuple[str, Exact], ...]
    """Quantity by meter, for the report of what could not be delivered."""


class Outbox:
    """Batches in the order in which they are to be tried."""

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self._lock = threading.Lock()
        self._batches: deque[Batch] = deque()
        self._points = 0
        self._max_points = max_points

    @property
    def full(self) -> bool:
        """True when no cut should be made: usage then goes on adding up in the recorder, in a longer interval."""
        return self._points >= self._max_points

    def put(self, batch: Batch) -> None:
        """Keep a batch. From here on its usage is the outbox's; to put the same batch twice is an error."""
        with self._lock:
            self._batches.append(batch)
            self._points += batch.points

    def head(self) -> Batch | None:
        """The batch to send now, None when there is none. It stays."""
        with self._lock:
            return self._batches[0] if self._batches else None

    def acknowledge(self, batch: Batch) -> None:
        """The collector has it: forget it. Again for the same batch: nothing happens."""
        with self._lock:
            if batch in self._batches:
                self._batches.remove(batch)
                self._points -= batch.points

    def postpone(self, batch: Batch) -> None:
        """Move it behind all others, so that a batch the collector cannot take holds up nobody. Idempotent."""
        with self._lock:
            if batch in self._batches:
                self._batches.remove(batch)
                self._batches.append(batch)

    def batches(self) -> tuple[Batch, ...]:
        """What is not acknowledged yet."""
        with self._lock:
            return tuple(self._batches)

    def __len__(self) -> int:
        return len(self._batches)
