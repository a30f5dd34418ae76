"""Which points may be there already: a guess, made before they are copied, from what this process has committed.

Most points are later than all others of their stream. What is not is late, or was sent again: it is looked up first,
since a COPY that fails costs as much as one that does not. A wrong guess costs time: a point that is there already is
refused by the unique key, whatever was guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tallymark_collector.model import Point, Stream

MAX_REMEMBERED: Final = 500_000
"""Streams whose latest time is remembered; at the limit all are forgotten."""
MAX_IN_VAIN: Final = 2
"""Transactions in a row that looked late points up and found none: then they are backfill, or a gateway sends out
of order, and late points are taken for new ones until one is not."""


@dataclass(frozen=True, slots=True)
class Guess:
    """Of the points of one transaction, by their positions."""

    late: Sequence[int]
    """May be there already. Of several points with one key, all are in here or none."""
    close: Sequence[int]
    """May repeat each other, and nothing that is there."""
    latest: dict[Stream, int]
    """The latest time of each stream, these points included."""


class Latest:
    """Latest committed times of streams."""

    def __init__(self) -> None:
        self._times: dict[int, int] = {}
        self._in_vain = 0

    @property
    def trusting(self) -> bool:
        """Late points are taken for new ones."""
        return self._in_vain >= MAX_IN_VAIN

    def guess(self, points: Sequence[Point]) -> Guess:
        """What to look up. Changes nothing: the transaction may fail."""
        before: dict[Stream, int] = {}
        latest: dict[Stream, int] = {}
        late: list[int] = []
        crowded: set[Stream] = set()
        for position, point in enumerate(points):
            stream, time_ns = point.stream, point.time_ns
            last = latest.get(stream)
            if last is None:
                last = before[stream] = latest[stream] = self._times.get(stream.id.int, -1)
            if time_ns > last:
                latest[stream] = time_ns
            elif time_ns <= before[stream]:
                late.append(position)
            else:
                crowded.add(stream)
        close: list[int] = []
        if crowded:
            found = ((position, point.stream, point.time_ns) for position, point in enumerate(points))
            close = [position for position, of, time_ns in found if of in crowded and time_ns > before[of]]
        if self.trusting:
            late = []
        return Guess(late, close, latest)

    def committed(self, guess: Guess) -> None:
        """The transaction with these points is committed."""
        if len(self._times) > MAX_REMEMBERED:
            self._times.clear()
        self._times.update((stream.id.int, time_ns) for stream, time_ns in guess.latest.items())

    def looked_up(self, found: bool) -> None:
        """Whether any point that was looked up, or copied as a new one, was there."""
        self._in_vain = 0 if found else self._in_vain + 1
