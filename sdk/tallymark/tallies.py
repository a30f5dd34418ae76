"""What one declaration counts of a call that has ended: how much, of which attributes, and whether at all."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import Context
from decimal import Decimal
from typing import Any, Final

from tallymark import runtime
from tallymark.assembly import Runtime
from tallymark.calls import NO_ARGUMENTS, Call, Description, current_call
from tallymark.dimensions import Dimensions, from_mapping, joined
from tallymark.errors import DeclarationError, checked_function
from tallymark.measure import Measure, NotGiven, NotMeasuredError
from tallymark.meters import Meter
from tallymark.nesting import Running, enter, leave
from tallymark.quantities import Exact, RefusedQuantityError, exact
from tallymark.recording import checked_attributes, count, dimensions_of
from tallymark.streams import Series
from tallymark.tracked import Arguments, TrackedCall

MAX_REMEMBERED: Final = 1_000
"""Sets of dimensions that one decorated function keeps ready; methods, routes and statuses are few."""

MAX_AMOUNTS: Final = 100_000
"""Amounts that one call may be measured by: an iterable of them may have no end."""

NO_SEVERAL: Final = (int, float, Decimal, str, bytes, bytearray, Mapping)
"""What is one quantity, or none, although some of it can be iterated."""

# From Python 3.14 on an argument of a partial may be left open; then its own signature has to do.
_PLACEHOLDER: Final = id(getattr(functools, "Placeholder", object))

OUTSIDE: Final = Call()
"""Stands in for the request where there is none."""


class Tally:
    """What one decorated function counts, or an integration of its requests (`function` is None, `of_function` False).
    Nothing here raises when it is called, but KeyboardInterrupt."""

    __slots__ = (
        "_attributes_of",
        "_billable",
        "_bound",
        "_first",
        "_own",
        "_quantity_of",
        "_remembered",
        "is_inside",
        "measure",
        "meter",
        "needs_call",
        "of_function",
        "plain",
        "quantity",
        "signature",
    )

    def __init__(
        self,
        meter: Meter,
        quantity: object,
        attributes: object,
        billable: object,
        function: Callable[..., Any] | None = None,
    ) -> None:
        self.meter = meter
        self.quantity: Exact = 0
        self.measure: Measure | None = None
        self._quantity_of: Callable[[Any], object] | None = None
        self._own: Dimensions = ()
        self._attributes_of: Callable[[Any], object] | None = None
        self._remembered: dict[tuple[object, ...], Series] = {}
        where = f"meter {meter.name!r}"
        if isinstance(quantity, Measure):
            self.measure = quantity
        elif callable(quantity):
            self._quantity_of = checked_function(f"{where}: quantity", quantity)
        else:
            try:
                self.quantity = exact(quantity)
            except RefusedQuantityError as error:
                raise DeclarationError(f"{where}: the quantity cannot be counted: {error}") from None
        if callable(attributes):
            self._attributes_of = checked_function(f"{where}: attributes", attributes)
        elif isinstance(attributes, Mapping):
            self._own, problems = from_mapping(attributes)
            if problems:
                raise DeclarationError(f"{where}: " + "; ".join(problems))
        elif attributes is not None:
            raise DeclarationError(f"{where}: attributes must be a mapping or a function of the result")
        self._billable = None if billable is None else checked_function(f"{where}: billable", billable)
        self.is_inside = self.measure is not None and self.measure.is_inside
        self.of_function = function is not None
        # What a partial brings along belongs to the arguments of the function inside.
        self._bound: functools.partial[Any] | None = None
        if isinstance(function, functools.partial) and _PLACEHOLDER not in map(id, function.args):
            self._bound = function
        self.signature = _signature_of(function if self._bound is None else self._bound.func)
        # What the measure takes from the arguments when a call begins.
        self._first: Arguments | None = None
        if function is not None and self.measure is not None and self.measure.of_arguments is not None:
            try:
                self._first = self.measure.of_arguments(self.signature)
            except DeclarationError as error:
                name = getattr(function, "__qualname__", type(function).__name__)
                raise DeclarationError(f"{where} on {name}: {error}") from None
        # Whether a TrackedCall is needed to know what to count; a number with fixed attributes needs none.
        fixed = self.measure is None and self._quantity_of is None
        self.needs_call = not fixed or self._attributes_of is not None or billable is not None
        # What a call outside of a request adds to, where everything about it is known from the start.
        self.plain: Series | None = None
        if not self.needs_call and type(self.quantity) is int and self.quantity:
            self.plain = Series(meter, self._own)

    @property
    def needs_function(self) -> bool:
        """Whether there is nothing to count without a function's arguments or result."""
        of_function = self.measure is not None and self.measure.of_function
        return of_function or self._quantity_of is not None or self._attributes_of is not None

    def for_another(self, function: Callable[..., Any] | None) -> Tally:
        """The same declaration for a function, or for requests. Raises DeclarationError where it does not fit."""
        return Tally(
            self.meter,
            self.measure or self._quantity_of or self.quantity,
            self._attributes_of or {name: value for name, _, value in self._own},
            self._billable,
            function,
        )

    def begin(self, args: tuple[object, ...] = (), kwargs: Mapping[str, object] = NO_ARGUMENTS) -> TrackedCall:
        """A call begins. `end` must follow, also where it turns out to be part of another call of its meter."""
        if self._bound is not None:
            args, kwargs = (*self._bound.args, *args), {**self._bound.keywords, **kwargs}
        looked_for = self.meter.uses > 1 or self.is_inside
        tracked = TrackedCall(self, args, kwargs, enter(self) if looked_for else None)
        if self._first is not None:
            try:
                tracked.noted = self._first(args, kwargs)
            except BaseException as error:
                _unless_interrupted(error)
                tracked.noted = NotGiven(error.with_traceback(None))  # it leads here, and to the arguments
        return tracked

    def end(self, tracked: TrackedCall, result: object, error: BaseException | None) -> None:
        """The call has ended: it is counted, now or when its answer has been sent."""
        try:
            running = tracked.running
            if running is not None:
                leave(running)
                if running.is_part:
                    return
                if running.added is not None:
                    tracked.added = running.added.take()
            tracked.ended(result, error)
            if self.needs_call:
                self._end(tracked, error)
            else:
                self.ended_plainly(result, error, tracked.keywords)
        except BaseException as failure:
            self._refuse(runtime.active, "the call is not counted", failure)

    def end_in(self, context: Context, tracked: TrackedCall, error: BaseException) -> None:
        """The call was closed, perhaps by the garbage collector, which runs in whatever context there is: the usage
        belongs to the request that it began in, else to `context`, where it was last seen running."""
        served = current_call.get()
        if served is not None and context.get(current_call) is served:
            self.end(tracked, None, error)
        else:
            if tracked.running is not None:
                leave(tracked.running)
            context.run(self.end, tracked, None, error)

    def end_plainly(
        self, running: Running, result: object, error: BaseException | None, arguments: Mapping[str, object]
    ) -> None:
        """A call has ended that is looked for from inside, and whose quantity and attributes are fixed."""
        leave(running)
        if not running.is_part:
            self.ended_plainly(result, error, arguments)

    def ended_plainly(self, result: object, error: BaseException | None, arguments: Mapping[str, object]) -> None:
        """A call has ended whose quantity is a number and whose attributes are fixed."""
        into = runtime.active
        if not into.enabled:
            return
        call = current_call.get()
        if call is not None and error is not None and self._decides_later(into, call, error):
            kept = error  # its name is unbound at the end of an `except` block

            def record() -> None:
                self._record(into, call, result, kept, arguments, self._own, self.quantity)

            if self._waits(into, call, record, early=True):
                return
        self._record(into, call, result, error, arguments, self._own, self.quantity)

    def _end(self, tracked: TrackedCall, error: BaseException | None) -> None:
        into = runtime.active
        if not into.enabled:
            return
        call = current_call.get()
        waits = self.measure is not None and self.measure.waits
        if call is not None and (waits or (error is not None and self._decides_later(into, call, error))):
            if self._waits(into, call, lambda: self.count(into, tracked), early=not waits):
                return
            if waits and not call.has_ended:
                self._refuse(into, "too many recordings wait for the answer; the call is not billed", None)
                return
        self.count(into, tracked)

    def _waits(self, into: Runtime, call: Call, record: Callable[[], None], *, early: bool) -> bool:
        """Whether `record` will be called at the call's end; `early`: before it, where that is long in coming, so that
        what has been used does not stay in memory alone."""
        if not call.at_end(record, into.late if early else None):
            return False
        if early:
            into.usage_waits()
        return True

    def _decides_later(self, into: Runtime, call: Call, error: BaseException) -> bool:
        try:
            return call.decides_later(error)
        except BaseException as failure:
            _unless_interrupted(failure)
            self.report(into, "the call could not be asked for its status", failure)
            return False

    def count(self, into: Runtime, tracked: TrackedCall) -> None:
        """Counts a call of which everything is known. Never raises, but for KeyboardInterrupt."""
        try:
            if self._billable is not None and not self._billable(tracked):
                into.recorder.pass_over(self.meter.name)
                return
        except BaseException as error:
            self._refuse(into, "the billable function raised; the call is not billed", error)
            return
        call = current_call.get()
        if call is not None and self.measure is not None and self.measure.waits and not call.is_first_of(self.meter):
            return  # the same bytes, in another function of the same request
        try:
            amounts = self._amounts(tracked)
        except BaseException as error:
            if isinstance(error, NotMeasuredError):
                self._refuse(into, f"the call is not billed: {error}", error)
            else:
                self._refuse(into, "the quantity function raised; the call is not billed", error)
            return
        own = self._own
        if self._attributes_of is not None and tracked.error is None:
            try:
                own = checked_attributes(into, self.meter, self._attributes_of(tracked.result))
            except BaseException as error:
                _unless_interrupted(error)
                self.report(into, "the attributes function raised; the call is counted without them", error)
        for quantity, attributes in amounts:
            dimensions = own
            if attributes is not None:
                dimensions = joined(own, checked_attributes(into, self.meter, attributes))
            self._record(into, call, tracked.result, tracked.error, tracked.keywords, dimensions, quantity)

    def note(self, tracked: TrackedCall, item: object) -> None:
        """A generator has yielded."""
        if self.measure is None or self.measure.note is None:
            return
        try:
            tracked.noted = self.measure.note(tracked.noted, item)
        except BaseException as error:
            self._refuse(runtime.active, "an item could not be looked at, and what it says is not billed", error)

    def report(self, into: Runtime, what: str, error: BaseException | None) -> None:
        """Tells the log, not too often."""
        name = self.meter.name
        kind = "" if error is None else f": {type(error).__name__}"
        into.reporter.error(f"{what}.{name}", "meter %s: %s%s", name, what, kind, exc_info=error)

    def _amounts(self, tracked: TrackedCall) -> list[tuple[object, Mapping[str, Any] | None]]:
        if self._quantity_of is not None:
            return [] if tracked.error is not None else [(self._quantity_of(tracked.result), None)]
        if self.measure is None:
            return [(self.quantity, None)]
        found: Any = self.measure.amounts(tracked)
        return [] if found is None else _listed(found)

    def _record(
        self,
        into: Runtime,
        call: Call | None,
        result: object,
        error: BaseException | None,
        arguments: Mapping[str, object],
        own: Dimensions,
        quantity: object,
    ) -> None:
        about = OUTSIDE if call is None else call
        try:
            description = about.describe(result, error, arguments)
            try:
                known = self._remembered.get((description, own))
            except Exception:  # what tells the route may give anything, also what has no hash
                known = None
            if known is None:
                known = self._series_of(into, about, description, own)
        except BaseException as failure:
            _unless_interrupted(failure)
            self.report(into, "the call could not be described and is counted without its attributes", failure)
            known = into.series.of(self.meter, own)
        count(into, known, quantity)

    def _series_of(self, into: Runtime, about: Call, description: Description, own: Dimensions) -> Series:
        """Kept where all of it can be sent: what cannot is told each time, and may be another each time."""
        dimensions, is_whole = dimensions_of(into, self.meter, about.attributes_of(description), own)
        if not is_whole:
            return into.series.of(self.meter, dimensions)
        if len(self._remembered) >= MAX_REMEMBERED:
            self._remembered.clear()
        series = self._remembered[description, own] = Series(self.meter, dimensions)
        return series

    def _refuse(self, into: Runtime, what: str, error: BaseException | None) -> None:
        _unless_interrupted(error)
        try:
            into.recorder.refuse(self.meter.name)
        except Exception as failure:
            self.report(into, "a refusal could not be counted", failure)
        self.report(into, what, error)


def _listed(found: Any) -> list[tuple[object, Mapping[str, Any] | None]]:
    """One quantity, or several with their attributes. Raises NotMeasuredError for an item that is no such pair, and for
    more than `MAX_AMOUNTS`."""
    # An array without dimensions is a number, too.
    if type(found) is not list and (isinstance(found, NO_SEVERAL) or hasattr(found, "__index__")):
        return [(found, None)]
    try:
        items = iter(found)
    except TypeError:
        return [(found, None)]
    amounts: list[tuple[object, Mapping[str, Any] | None]] = []
    for item in items:
        if len(amounts) == MAX_AMOUNTS:
            raise NotMeasuredError(f"more than {MAX_AMOUNTS:,} amounts of one call")
        try:
            quantity, attributes = item
        except (TypeError, ValueError):
            raise NotMeasuredError(
                f"each of several amounts is a pair (quantity, attributes), not a {type(item).__name__}"
            ) from None
        amounts.append((quantity, attributes))
    return amounts


def _signature_of(function: Callable[..., Any] | None) -> inspect.Signature | None:
    if function is None:
        return None
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return None


def _unless_interrupted(error: BaseException | None) -> None:
    """Ctrl-C is the user's, whatever it happens to hit."""
    if isinstance(error, KeyboardInterrupt):
        raise error
