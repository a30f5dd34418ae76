"""Which calls run inside which: calls of one meter inside each other are one, and `usage.add()` finds its call.

A call is part of another one if it has another declaration of the same meter, began in it and ended before it. What
only began there, as a task that outlives the call which started it, counts for itself: better an hour of looking at two
numbers than usage that nobody has seen. A function that calls itself is counted each time.

A context carries this from a call to what it calls, and into its tasks and threads. It never carries the call itself,
with its arguments and its result: a task may keep its context for the life of the process.
"""

from __future__ import annotations

import os
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from tallymark.dimensions import Dimensions
from tallymark.quantities import Exact, add

if TYPE_CHECKING:
    from tallymark.tallies import Tally

NO_DIMENSIONS: Final[Dimensions] = ()
MAX_AMOUNTS: Final = 1_000
"""Sets of attributes that the amounts set inside one call may have; past it they lose their attributes."""


class Running:
    """A call that is looked for from inside, by calls of its meter or by `usage.add()`."""

    __slots__ = ("added", "before", "live", "outer", "part_of", "tally")

    def __init__(self, tally: Tally, before: Running | None, outer: Running | None) -> None:
        self.tally = tally
        self.before = before
        """What its context held before it began, or went on."""
        self.outer = outer
        """What it runs inside of, as far as that is looked for."""
        self.live = True
        self.part_of: Running | None = None
        """The call of the same meter that it began in."""
        self.added = Added() if tally.is_inside else None

    @property
    def is_part(self) -> bool:
        """Whether another call counts for it."""
        return self.part_of is not None and self.part_of.live


class Added:
    """What a call has said of itself by `usage.add()`, in any of its threads.

    The lock is re-entrant, and an amount that a signal's handler or a finalizer adds in the midst of another addition
    is added right afterwards.
    """

    __slots__ = ("_adding", "_lock", "_sums", "_taken", "_waiting")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: list[tuple[Dimensions, Exact]] = []
        self._adding = False
        self._sums: dict[Dimensions, Exact] = {}
        self._taken = False

    def add(self, dimensions: Dimensions, amount: Exact) -> bool:
        """False, and nothing is added, where the call has ended."""
        with self._lock:
            if self._taken:
                return False
            self._waiting.append((dimensions, amount))
            if self._adding:
                return True
            self._adding = True
            try:
                while self._waiting:
                    key, more = self._waiting.pop()
                    if key not in self._sums and len(self._sums) >= MAX_AMOUNTS:
                        key = NO_DIMENSIONS
                    self._sums[key] = add(self._sums.get(key, 0), more)
            finally:
                self._adding = False
        return True

    def take(self) -> dict[Dimensions, Exact]:
        """All of it, at the call's end; nothing can be added from here on."""
        with self._lock:
            self._taken = True
            return self._sums


current_running: ContextVar[Running | None] = ContextVar("tallymark_running", default=None)
"""The innermost of the running calls that are looked for from inside; some may have ended."""


def enter(tally: Tally) -> Running:
    """A call begins: it is the innermost one from here on."""
    around = before = current_running.get()
    if around is not None and not around.live:
        around = _first_live(around)
    running = Running(tally, before, around)
    while around is not None:
        if around.tally is not tally and around.tally.meter is tally.meter and around.live and not around.is_part:
            running.part_of = around
            break
        around = around.outer
    current_running.set(running)
    return running


def leave(running: Running) -> None:
    """The call has ended. Again: nothing happens."""
    if not running.live:
        return
    running.live = False
    before, running.before = running.before, None
    # Without those that have ended, or tasks that start each other would make an endless chain.
    if running.outer is not None:
        running.outer = _first_live(running.outer)
    # The end may come in another context than the begin, as that of the garbage collector.
    if current_running.get() is running:
        current_running.set(before if before is None else _first_live(before))


def suspend(running: Running) -> None:
    """A generator has yielded: what runs until it goes on is not inside of it."""
    if current_running.get() is running:
        current_running.set(running.before)


def resume(running: Running) -> None:
    """A generator goes on, perhaps for another caller than before."""
    running.before = current_running.get()
    around = outer = _first_live(running.before)
    while around is not None:
        if around is running:  # it is consumed from inside of itself
            break
        around = around.outer
    else:
        running.outer = outer
    current_running.set(running)


def _first_live(running: Running | None) -> Running | None:
    while running is not None and not running.live:
        running = running.outer
    return running


def _after_fork_in_child() -> None:
    # The calls around the fork go on in the parent. In the child they might never end (a worker of a pool), and
    # everything there would count as part of them.
    current_running.set(None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
