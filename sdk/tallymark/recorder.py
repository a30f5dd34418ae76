"""Adds up usage in the process: one exact sum for each stream, taken out whole at each cut.

The handler's path is `add`: a tuple, a dictionary and one lock. No clock, no I/O, no OpenTelemetry.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tallymark.dimensions import Dimensions
from tallymark.meters import Meter
from tallymark.quantities import Exact, Wire, add, shortest, to_wire

Stream = tuple[Meter, str | None, str | None, Dimensions]
"""(meter, account, plan, dimensions): what one sum belongs to."""

MAX_STREAMS: Final = 250_000
"""Streams in one interval; past it new ones are counted without their dimensions: resolution is lost, usage never."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What was recorded in (start_ns, time_ns], Unix nanoseconds: one wire value for each stream."""

    start_ns: int
    time_ns: int
    values: tuple[tuple[Stream, Wire], ...]


class Recorder:
    """The sums since the last cut. `add` may be called from any thread, `cut` too.

    `on_first` is called, outside the lock, with the first usage after a cut.
    """

    def __init__(
        self, now_ns: int, on_first: Callable[[], None] = lambda: None, max_streams: int = MAX_STREAMS
    ) -> None:
        self._lock = threading.Lock()
        self._cutting = threading.Lock()
        self._sums: dict[Stream, Exact] = {}
        self._remainders: dict[Stream, Exact] = {}
        self._last_ns = now_ns
        self._on_first = on_first
        self._max_streams = max_streams
        self._refused: Counter[str] = Counter()

    def add(self, stream: Stream, quantity: Exact) -> None:
        """Add a quantity, as `tallymark.quantities.exact` returns it, to a stream's sum."""
        with self._lock:
            sums = self._sums
            total = sums.get(stream)
            if total is not None:
                sums[stream] = total + quantity if type(total) is type(quantity) is int else add(total, quantity)
                return
            if len(sums) >= self._max_streams:
                stream = (*stream[:3], ())
            first = not sums
            sums[stream] = add(sums.get(stream, 0), quantity)
        if first:
            self._on_first()

    def refuse(self, meter: str) -> None:
        """Count a recording that had no usable quantity."""
        with self._lock:
            self._refused[meter] += 1

    def refused(self) -> dict[str, int]:
        """Recordings refused since the process began, by meter."""
        with self._lock:
            return dict(self._refused)

    def cut(self, now_ns: int) -> Cut:
        """Take everything recorded since the last cut, atomically; calling it again takes what came since.

        `time_ns` lies after every earlier cut, also when the wall clock has stepped back. What a value on the wire
        cannot carry exactly stays here and goes out with the next cut.
        """
        with self._cutting:
            with self._lock:
                taken, self._sums = self._sums, {}
                start_ns, time_ns = self._last_ns, max(now_ns, self._last_ns + 1)
                self._last_ns = time_ns
            for stream, remainder in self._remainders.items():
                taken[stream] = add(taken.get(stream, 0), remainder)
            values: list[tuple[Stream, Wire]] = []
            remainders: dict[Stream, Exact] = {}
            for stream, total in taken.items():
                value, remainder = to_wire(total)
                if value:
                    values.append((stream, value))
                if remainder:
                    remainders[stream] = remainder
            self._remainders = remainders
            return Cut(start_ns, time_ns, tuple(values))

    def sums(self) -> dict[Stream, Exact]:
        """A copy of what the next cut would take, remainders included."""
        with self._cutting, self._lock:
            result = dict(self._sums)
            for stream, remainder in self._remainders.items():
                result[stream] = add(result.get(stream, 0), remainder)
            return result

    def take_back(self, cut: Cut) -> None:
        """Undo a cut of which nothing has been sent: its values go out with the next one."""
        with self._cutting:
            for stream, value in cut.values:
                self._remainders[stream] = add(self._remainders.get(stream, 0), shortest(value))

    @property
    def has_remainders(self) -> bool:
        """True while the last cut left something that its values could not carry."""
        return bool(self._remainders)

    def __bool__(self) -> bool:
        """True while something waits for a cut."""
        return bool(self._sums or self._remainders)
