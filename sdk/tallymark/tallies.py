"""What one declaration counts of a call that has ended: how much, of which attributes, and whether at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from tallymark import runtime
from tallymark.calls import NO_ARGUMENTS, Call, current_call
from tallymark.dimensions import Dimensions, from_mapping, of_call
from tallymark.errors import DeclarationError
from tallymark.measure import Measure, NotMeasuredError
from tallymark.meters import Meter
from tallymark.quantities import Exact, RefusedQuantityError, exact
from tallymark.recording import checked_attributes, count
from tallymark.runtime import Runtime
from tallymark.streams import Series
from tallymark.tracked import TrackedCall, enter, leave

MAX_REMEMBERED: Final = 1_000
"""Sets of dimensions that one decorated function keeps ready; methods, routes and statuses are few."""

OUTSIDE: Final = Call()
"""Stands in for the request where there is none."""


class Tally:
    """What one decorated function counts. Nothing here raises when it is called, but KeyboardInterrupt."""

    __slots__ = (
        "_attributes_of",
        "_billable",
        "_own",
        "_quantity_of",
        "_remembered",
        "measure",
        "meter",
        "needs_call",
        "plain",
        "quantity",
    )

    def __init__(self, meter: Meter, quantity: object, attributes: object, billable: object) -> None:
        self.meter = meter
        self.quantity: Exact = 0
        self.measure: Measure | None = None
        self._quantity_of: Callable[[Any], object] | None = None
        self._own: Dimensions = ()
        self._attributes_of: Callable[[Any], object] | None = None
        self._remembered: dict[tuple[object, ...], Series] = {}
        if isinstance(quantity, Measure):
            self.measure = quantity
        elif callable(quantity):
            self._quantity_of = quantity
        else:
            try:
                self.quantity = exact(quantity)
            except RefusedQuantityError as error:
                raise DeclarationError(f"meter {meter.name!r}: the quantity cannot be counted: {error}") from None
        if callable(attributes):
            self._attributes_of = attributes
        elif isinstance(attributes, Mapping):
            self._own, problems = from_mapping(attributes)
            if problems:
                raise DeclarationError(f"meter {meter.name!r}: " + "; ".join(problems))
        elif attributes is not None:
            raise DeclarationError(f"meter {meter.name!r}: attributes must be a mapping or a function of the result")
        if billable is not None and not callable(billable):
            raise DeclarationError(f"meter {meter.name!r}: billable must be a function of the call")
        self._billable = billable
        # Whether a TrackedCall is needed to know what to count; a number with fixed attributes needs none.
        fixed = self.measure is None and self._quantity_of is None
        self.needs_call = not fixed or self._attributes_of is not None or billable is not None
        # What a call outside of a request adds to, where everything about it is known from the start.
        self.plain: Series | None = None
        if not self.needs_call and type(self.quantity) is int and self.quantity:
            self.plain = Series(meter, of_call({}, self._own))

    @property
    def needs_result(self) -> bool:
        """Whether there is nothing to count without a function's result."""
        return self._quantity_of is not None or self._attributes_of is not None

    def for_another(self) -> Tally:
        """The same declaration for another function."""
        return Tally(
            self.meter,
            self.measure or self._quantity_of or self.quantity,
            self._attributes_of or {name: value for name, _, value in self._own},
            self._billable,
        )

    def begin(
        self,
        function: Callable[..., Any] | None = None,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] = NO_ARGUMENTS,
    ) -> TrackedCall | None:
        """A call begins. None where it is part of another one of its meter, and is not counted."""
        tracked = TrackedCall(self, function, args, kwargs)
        looked_for = self.meter.uses > 1 or (self.measure is not None and self.measure.is_inside)
        return tracked if not looked_for or enter(tracked) else None

    def end(self, tracked: TrackedCall, result: object, error: BaseException | None) -> None:
        """The call has ended: it is counted, now or when its answer has been sent."""
        leave(tracked)
        tracked.ended(result, error)
        if not self.needs_call:
            self.ended_plainly(result, error, tracked.keywords)
            return
        into = runtime.active
        if not into.enabled:
            return
        call = current_call.get()
        waits = self.measure is not None and self.measure.waits
        later = call is not None and (waits or (error is not None and call.decides_later(error)))
        if call is None or not later or not call.at_end(lambda: self.count(into, tracked)):
            self.count(into, tracked)

    def ended_plainly(self, result: object, error: BaseException | None, arguments: Mapping[str, object]) -> None:
        """A call has ended whose quantity is a number and whose attributes are fixed."""
        into = runtime.active
        if not into.enabled:
            return
        call = current_call.get()

        def record() -> None:
            self._record(into, call, result, error, arguments, self._own, self.quantity)

        later = call is not None and error is not None and call.decides_later(error)
        if call is None or not later or not call.at_end(record):
            record()

    def count(self, into: Runtime, tracked: TrackedCall) -> None:
        """Counts a call of which everything is known. Never raises, but for KeyboardInterrupt."""
        try:
            if self._billable is not None and not self._billable(tracked):
                return
        except BaseException as error:
            self._refuse(into, "the billable function raised; the call is not billed", error)
            return
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
        call = current_call.get()
        for quantity, attributes in amounts:
            dimensions = own
            if attributes:
                dimensions = _joined(own, checked_attributes(into, self.meter, attributes))
            self._record(into, call, tracked.result, tracked.error, tracked.keywords, dimensions, quantity)

    def report(self, into: Runtime, what: str, error: BaseException) -> None:
        """Tells the log, not too often."""
        name = self.meter.name
        into.reporter.error(f"{what}.{name}", "meter %s: %s: %s", name, what, type(error).__name__, exc_info=error)

    def _amounts(self, tracked: TrackedCall) -> list[tuple[object, Mapping[str, Any] | None]]:
        if self._quantity_of is not None:
            return [] if tracked.error is not None else [(self._quantity_of(tracked.result), None)]
        if self.measure is None:
            return [(self.quantity, None)]
        found: Any = self.measure.amounts(tracked)
        if found is None:
            return []
        if isinstance(found, (list, tuple)):
            return [(quantity, attributes) for quantity, attributes in found]
        return [(found, None)]

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
            known = self._remembered.get((description, own))
            if known is None:
                if len(self._remembered) >= MAX_REMEMBERED:
                    self._remembered.clear()
                series = Series(self.meter, of_call(about.attributes_of(description), own))
                known = self._remembered[description, own] = series
        except Exception as failure:
            self.report(into, "the call could not be described and is counted without its attributes", failure)
            known = into.series.of(self.meter, own)
        count(into, known, quantity)

    def _refuse(self, into: Runtime, what: str, error: BaseException) -> None:
        _unless_interrupted(error)
        into.recorder.refuse(self.meter.name)
        self.report(into, what, error)


def _joined(own: Dimensions, more: Dimensions) -> Dimensions:
    return of_call({}, own + more) if own else more


def _unless_interrupted(error: BaseException) -> None:
    """Ctrl-C is the user's, whatever it happens to hit."""
    if isinstance(error, KeyboardInterrupt):
        raise error
