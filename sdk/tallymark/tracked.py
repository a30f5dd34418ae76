"""A call that is being counted, from its begin to its end: what measures and predicates may look at.

Calls of one meter that run inside each other are one: a function that is declared to count `requests` and calls another
one so declared counts once, for the outer call. A function that calls itself is counted each time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from decimal import Decimal
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from tallymark.calls import NO_ARGUMENTS, current_call, error_name, status_of
from tallymark.dimensions import Dimensions
from tallymark.quantities import EXACT, Exact

if TYPE_CHECKING:
    from tallymark.tallies import Tally

MAX_AMOUNTS = 1_000
"""Sets of attributes that the amounts set inside one call may have."""


class TrackedCall:
    """One call of a decorated function, or one request that an integration counts.

    `result` is None where the call raised, `error` where it returned. `noted` is what the measure kept of the items of
    a generator. What an integration does not know is None.
    """

    __slots__ = (
        "_kwargs",
        "_stopped_ns",
        "added",
        "args",
        "error",
        "function",
        "items",
        "live",
        "noted",
        "outer",
        "result",
        "started_ns",
        "tally",
    )

    def __init__(
        self,
        tally: Tally,
        function: Callable[..., Any] | None = None,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] = NO_ARGUMENTS,
    ) -> None:
        self.tally = tally
        self.function = function
        self.args = args
        self._kwargs = kwargs
        self.result: object = None
        self.error: BaseException | None = None
        self.items = 0
        """What a generator has yielded so far."""
        self.noted: object = None
        self.added: dict[Dimensions, Exact] = {}
        self.outer: TrackedCall | None = None
        self.live = False
        self._stopped_ns = 0
        self.started_ns = perf_counter_ns()

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The function's arguments by name, with its defaults; empty for a request that an integration counts."""
        if self.function is None:
            return {}
        bound = inspect.signature(self.function).bind(*self.args, **self._kwargs)
        bound.apply_defaults()
        return bound.arguments

    @property
    def keywords(self) -> Mapping[str, object]:
        """The arguments that were given by name."""
        return self._kwargs

    @property
    def duration_s(self) -> Decimal:
        """Seconds from the begin to the end, or to now, exact to the nanosecond of the monotonic clock."""
        return EXACT.scaleb(Decimal(self.duration_ns), -9)

    @property
    def duration_ns(self) -> int:
        """The same in nanoseconds."""
        return (self._stopped_ns or perf_counter_ns()) - self.started_ns

    @property
    def status(self) -> int | None:
        """The status of the answer: the one that the result or the exception names, else what is known of the request;
        None outside a request, and for a call that sent no answer."""
        call = current_call.get()
        if call is None:
            return status_of(self.result if self.error is None else self.error)
        return call.status(self.result, self.error, self._kwargs)

    @property
    def error_type(self) -> str | None:
        """The class of the exception."""
        return error_name(self.error)

    @property
    def request_bytes(self) -> int | None:
        """Bytes of the request's body that have been received."""
        call = current_call.get()
        return None if call is None else call.request_bytes

    @property
    def response_bytes(self) -> int | None:
        """Bytes of the answer's body that have been sent: of all of it where the measure waits for the end."""
        call = current_call.get()
        return None if call is None else call.response_bytes

    def ended(self, result: object = None, error: BaseException | None = None) -> None:
        """Stops the clock and keeps how it ended."""
        self._stopped_ns = perf_counter_ns()
        self.result, self.error = result, error


current_tracked: ContextVar[TrackedCall | None] = ContextVar("tallymark_tracked", default=None)
"""The innermost of the running calls that are looked for from inside."""


def enter(tracked: TrackedCall) -> bool:
    """Makes the call the innermost one. False, and nothing happens, where it is part of a running call of its meter."""
    outer = current_tracked.get()
    while outer is not None and not outer.live:
        outer = outer.outer  # a task that has outlived the call which began it
    around = outer
    while around is not None:
        if around.live and around.tally is not tracked.tally and around.tally.meter is tracked.tally.meter:
            return False
        around = around.outer
    tracked.outer, tracked.live = outer, True
    current_tracked.set(tracked)
    return True


def leave(tracked: TrackedCall) -> None:
    """The call has ended. Again, or without `enter`: nothing happens."""
    if tracked.live:
        tracked.live = False
        current_tracked.set(tracked.outer)


def suspend(tracked: TrackedCall) -> None:
    """A generator has yielded: what runs until it goes on is not inside of it."""
    if tracked.live:
        current_tracked.set(tracked.outer)


def resume(tracked: TrackedCall) -> None:
    """A generator goes on, perhaps for another caller than before."""
    if tracked.live:
        tracked.outer = current_tracked.get()
        current_tracked.set(tracked)
