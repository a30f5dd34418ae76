"""Adds up usage in the process: one exact sum for each stream, in the segment of the interval that runs.

The handler's path is `add`: a dictionary and one addition in mapped memory. No clock, no system call, no OpenTelemetry,
and no lock where the interpreter has one. Only a stream's first usage in an interval makes a record, and a process's
first usage its files.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from tallymark.dimensions import Dimensions
from tallymark.meters import Meter
from tallymark.quantities import Exact, add, scaled, units_of, unscaled
from tallymark.segment import STREAM, WIDE_PLACES, Contents, Segment, Slot, WideSlot, parse
from tallymark.streams import Described, Series, Stream, decode, encode
from tallymark.yielding import drop

MAX_STREAMS: Final = 250_000
"""Sums in one interval; past it new ones are counted without their dimensions: resolution is lost, usage never."""

MAX_NARROW_PLACES: Final = 24
"""Quantities of more decimal places share one wide sum for each stream, so that a stream has few sums."""

SPARE_NS: Final = 1_000
"""Half of the least length of an interval: room to tell several points of one stream apart by their times, and too
little for a program that flushes all the time to run ahead of the clock."""

MAX_BACKWARD_NS: Final = 60_000_000_000
"""A clock that steps back less is waited for; the collector tolerates ten times as much."""


def _is_indivisible() -> bool:
    """Whether a look-up in a dictionary and an addition in place, in one line, cannot be interrupted.

    CPython with its interpreter lock gives way to another thread, or to a signal's handler, only where Python code is
    called and at the end of a loop's turn, from 3.10 on; the keys' hashes and comparisons are C code, and so is all
    that the line does. The garbage collector, and with it finalizers and callbacks of weak references, runs at the same
    points from 3.12 on, before that where an object is made that it looks after: the line makes none but integers.
    Profilers see no call in it. What could look inside are the events of single instructions (`f_trace_opcodes`,
    `sys.monitoring`'s INSTRUCTION), which no tool turns on for others' code in production.

    Without that lock, in other interpreters and in versions that nobody has looked at, an addition takes a lock of its
    own, which costs about a quarter more. `tests/sdk/test_indivisible.py` looks at the bytecode, and at the work of
    collectors, signals, trace functions and threads.
    """
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    return sys.implementation.name == "cpython" and bool(has_lock) and (3, 10) <= sys.version_info[:2] <= (3, 14)


INDIVISIBLE: Final = _is_indivisible()


class Recorder:
    """The sums since the last cut. `add` may be called from any thread, `cut` too.

    `new_segment(start_ns)` gives the segment of a new interval and never fails: without a disk it gives one in memory.
    `on_first` is called, outside the lock, with the first usage after a cut; `on_spill` when the disk has no room for a
    sum, which is then in memory.
    """

    def __init__(
        self,
        now_ns: int,
        new_segment: Callable[[int], Segment] = lambda start_ns: Segment(None, start_ns, 0),
        on_first: Callable[[], None] = lambda: None,
        on_spill: Callable[[OSError], None] = lambda error: None,
        max_streams: int = MAX_STREAMS,
        indivisible: bool | None = None,
    ) -> None:
        self.add: Callable[[Stream, Exact], None] = (
            self._add_at_once if (INDIVISIBLE if indivisible is None else indivisible) else self._add_locked
        )
        """Add a quantity, as `tallymark.quantities.exact` returns it, to a stream's sum.

        When it returns, the quantity is in the mapped file; killed before that, the process leaves it in whole or not
        at all.
        """
        # Re-entrant, for it knows its owner: see `add`.
        self._lock = threading.RLock()
        self._acquire = self._lock.acquire
        self._release = self._lock.release
        self._cutting = threading.Lock()
        self._new_segment = new_segment
        self._on_first = on_first
        self._on_spill = on_spill
        self._spill_error: OSError | None = None
        self._adding = False
        self._meanwhile: list[tuple[Stream, Exact]] = []
        self._max_streams = max_streams
        self._last_ns = now_ns
        self._segment: Segment | None = None
        # What the disk had no room for: a segment in memory, of the same interval but for its last SPARE_NS.
        self._spill: Segment | None = None
        self._slots: dict[Stream, Slot] = {}
        self._scaled: dict[tuple[Stream, int], Slot | WideSlot] = {}
        self._plain: dict[Meter, Series] = {}
        self._refused: Counter[str] = Counter()
        self.on_cut: Callable[[list[Segment]], None] | None = None
        """Given what each cut takes, before the next one; it must not raise nor ask for a cut."""
        self._not_billed: Counter[str] = Counter()
        self.spilled = 0
        """Sums that went to memory for want of disk space, since the process began."""

    def _add_at_once(self, stream: Stream, quantity: Exact) -> None:
        """`add` where the interpreter's lock makes the addition indivisible: see `_is_indivisible`."""
        try:
            # One line, one statement: at its begin a debugger's or a coverage tool's trace function may run, and with
            # it other threads, one of which may cut: what was looked up before that is another interval's.
            (slot := self._slots[stream])[0][slot[1]] += quantity  # type: ignore[assignment]
        except (KeyError, ValueError, TypeError):  # new, over int64, or a fraction: nothing has been added
            self._add_locked(stream, quantity)

    def _add_locked(self, stream: Stream, quantity: Exact) -> None:
        # Not `with`, which takes as long as all the rest. An exception out of a signal's handler may come in acquire(),
        # without the lock, or right after it; a lock that one does not own cannot be released by mistake.
        try:
            self._acquire()
            try:
                if type(quantity) is int:
                    view, index = self._slots[stream]
                    view[index] += quantity
                    return
            except (KeyError, ValueError):  # the first of this stream, or a sum over int64: nothing has been added
                pass
            if not quantity:
                return
            first = not self
            self._add_new(stream, quantity)
        finally:
            try:  # noqa: SIM105 - suppress() takes as long as `with`
                self._release()
            except RuntimeError:
                pass
        self._tell(first)

    def refuse(self, meter: str) -> None:
        """Count a recording that had no usable quantity."""
        with self._lock:
            self._refused[meter] += 1

    def refused(self) -> dict[str, int]:
        """Recordings refused since the process began, by meter."""
        with self._lock:
            return dict(self._refused)

    def pass_over(self, meter: str) -> None:
        """Count a call that its meter's `billable` does not bill."""
        with self._lock:
            self._not_billed[meter] += 1

    def not_billed(self) -> dict[str, int]:
        """Calls not billed since the process began, by meter."""
        with self._lock:
            return dict(self._not_billed)

    def cut(self, now_ns: int) -> list[Segment]:
        """Take everything recorded since the last cut, atomically, and begin a new interval; nothing when there is
        nothing. The segments are frozen and have an end; each stream's points must come from one alone, or differ in
        their interval: the second, if any, lies in memory and after the first.

        An interval's end lies after every earlier one, also when the wall clock has stepped back a little. Where it was
        set back further, later intervals follow it: dated ahead, they would lie past the skew that a collector allows.
        """
        with self._cutting:
            if not self:
                return []
            end_ns = max(now_ns, self._last_ns + 2 * SPARE_NS)
            if now_ns < self._last_ns - MAX_BACKWARD_NS:
                end_ns = now_ns
            fresh = self._new_segment(end_ns)
            with self._lock:
                taken, spill = self._segment, self._spill
                assert taken is not None
                if spill is not None:
                    spill.begin(end_ns - SPARE_NS)
                    spill.end(end_ns)
                taken.end(end_ns if spill is None else end_ns - SPARE_NS)
                self._segment, self._spill = fresh, None
                slots, scaled = self._slots, self._scaled
                self._slots, self._scaled = {}, {}
                self._last_ns = end_ns
            cut = [taken] if spill is None else [taken, spill]
            # Not while the lock is held, and not all at once.
            drop(slots)
            drop(scaled)
            if self.on_cut is not None:
                self.on_cut(cut)
        return cut

    @property
    def since_ns(self) -> int:
        """When the running interval began: it moves with each cut that took something."""
        return self._last_ns

    @contextmanager
    def between_cuts(self) -> Iterator[list[list[bytes]]]:
        """Copies of what the next cut would take, to be parsed; no cut comes between before the block ends."""
        with self._cutting:
            with self._lock:
                copies = [s.copy() for s in (self._segment, self._spill) if s is not None]
            yield copies

    def beat(self, now_ns: int) -> None:
        """Leave a sign of life in the running interval's file."""
        with self._lock:
            if self._segment is not None:
                self._segment.beat(now_ns)

    def let_go(self) -> tuple[bool, Segment | None]:
        """Give up the running interval's segment if nothing is in it: (True, the segment); the next usage gets a new
        one. (False, None), and nothing happens, when there is usage in it."""
        with self._cutting, self._lock:
            if self:
                return False, None
            segment, self._segment = self._segment, None
            return True, segment

    def carry(self, bases: Iterable[bytes]) -> None:
        """Say in the running interval's segment what had been recorded before it: see `tallymark.totals`."""
        with self._lock:
            if self._segment is not None:
                self._segment.carry(bases)

    def sums(self) -> dict[Described, Exact]:
        """The usage that the next cut would take."""
        with self.between_cuts() as copies:
            pass
        return {stream: amount for stream, amount in total_of(*map(parse, copies)).items() if not stream.evidence}

    def close_inherited(self) -> None:
        """In a forked child: give back the parent's mappings, which nothing may be written to here."""
        for segment in (self._segment, self._spill):
            if segment is not None:
                segment.close()
        self._segment = self._spill = None

    def __bool__(self) -> bool:
        """True while something waits for a cut."""
        return self._spill is not None or (self._segment is not None and not self._segment.empty)

    def _tell(self, first: bool) -> None:
        error, self._spill_error = self._spill_error, None
        if error is not None:
            self._on_spill(error)
        if first:
            self._on_first()

    def _add_new(self, stream: Stream, quantity: Exact) -> None:
        """A record is being made in a thread at most once: a signal's handler that records something in the midst of it
        has its usage added right afterwards."""
        if self._adding:
            self._meanwhile.append((stream, quantity))
            return
        self._adding = True
        try:
            self._add_otherwise(stream, quantity)
            while self._meanwhile:
                self._add_otherwise(*self._meanwhile.pop())
        finally:
            self._adding = False

    def _add_otherwise(self, stream: Stream, quantity: Exact) -> None:
        units, scale = units_of(quantity)
        slot = self._slots.get(stream) if scale == 0 else self._scaled.get((stream, scale))
        if slot is None or isinstance(slot, WideSlot):
            if scale <= MAX_NARROW_PLACES and units < 2**63:
                stream, known = self._within_limit(stream, scale)
                if not known:
                    self._new_slot(stream, scale, units)
                    return
                slot = self._slots[stream] if scale == 0 else self._scaled[stream, scale]
            else:
                self._add_wide(stream, quantity)
                return
        assert isinstance(slot, tuple)
        view, index = slot
        try:
            view[index] += units
        except ValueError:
            self._add_wide(stream, quantity)

    def _add_wide(self, stream: Stream, quantity: Exact) -> None:
        amount = scaled(quantity, WIDE_PLACES)
        stream, known = self._within_limit(stream, WIDE_PLACES)
        if known:
            slot = self._scaled[stream, WIDE_PLACES]
            assert isinstance(slot, WideSlot)
            slot.add(amount)
            return
        body = encode(stream)
        try:
            self._scaled[stream, WIDE_PLACES] = self._running().add_wide(body, amount)
        except OSError as error:
            self._scaled[stream, WIDE_PLACES] = self._spilling(error).add_wide(body, amount)

    def _new_slot(self, stream: Stream, scale: int, units: int) -> None:
        body = encode(stream)
        try:
            slot = self._running().append(STREAM, body, scale, units)
        except OSError as error:
            slot = self._spilling(error).append(STREAM, body, scale, units)
        if scale == 0:
            self._slots[stream] = slot
        else:
            self._scaled[stream, scale] = slot

    def _within_limit(self, stream: Stream, scale: int) -> tuple[Stream, bool]:
        """The stream to count under, and whether it has a sum of this scale."""
        if self._has(stream, scale):
            return stream, True
        if len(self._slots) + len(self._scaled) >= self._max_streams and not stream[0].evidence:
            meter = stream[0].meter
            stream = (self._plain.setdefault(meter, Series(meter, NO_DIMENSIONS)), *stream[1:])
        return stream, self._has(stream, scale)

    def _has(self, stream: Stream, scale: int) -> bool:
        return stream in self._slots if scale == 0 else (stream, scale) in self._scaled

    def _running(self) -> Segment:
        if self._segment is None:
            self._segment = self._new_segment(self._last_ns)
        return self._segment

    def _spilling(self, error: OSError) -> Segment:
        self.spilled += 1
        self._spill_error = error
        if self._spill is None:
            self._spill = Segment(None, self._last_ns, 0)
        return self._spill


NO_DIMENSIONS: Final[Dimensions] = ()


def totals_by_body(*contents: Contents) -> Mapping[bytes, Exact]:
    """The exact sum of each stream in some segments, by the body of its record."""
    if len(contents) == 1 and list(contents[0].sums) == [0]:
        return contents[0].sums[0]
    totals: dict[bytes, Exact] = {}
    for one in contents:
        for scale, sums in sorted(one.sums.items()):
            for body, units in sums.items():
                amount = unscaled(units, scale)
                totals[body] = add(totals[body], amount) if body in totals else amount
    return totals


def total_of(*contents: Contents) -> dict[Described, Exact]:
    """The same by stream."""
    return {decode(body): total for body, total in totals_by_body(*contents).items()}


def by_meter(*contents: Contents) -> dict[str, Exact]:
    """The exact usage of each meter in some segments."""
    totals: dict[str, Exact] = {}
    for stream, amount in total_of(*contents).items():
        if not stream.evidence:
            totals[stream.meter] = add(totals.get(stream.meter, 0), amount)
    return totals
