"""`@track_usage`: counts the calls of a function, or what they make, without touching either.

The wrappers are `tallymark.wrapping`'s; what a call's end means to its meter is `tallymark.tallies`' affair.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

from tallymark import runtime
from tallymark.dimensions import Value
from tallymark.errors import DeclarationError
from tallymark.measure import Measure
from tallymark.meters import PLAIN_UNIT, REQUEST_UNIT
from tallymark.tallies import Tally
from tallymark.tracked import TrackedCall
from tallymark.wrapping import wrapped

P = ParamSpec("P")
R = TypeVar("R")

Quantity = int | float | Decimal
Attributes = Mapping[str, Value]


def track_usage(
    meter: str,
    quantity: Quantity | Callable[[Any], Quantity] | Measure = 1,
    *,
    unit: str | None = None,
    attributes: Attributes | Callable[[Any], Attributes] | None = None,
    billable: Callable[[TrackedCall], bool] | None = None,
) -> UsageTracker:
    """Record usage of `meter` each time the decorated function has run, for the account that `identify()` named.

        @app.post("/v1/images")
        @track_usage("images", quantity=lambda result: len(result["images"]), unit="{image}")
        async def create(request: ImageRequest) -> dict: ...

    - `quantity`: a number counts every call, also one that raises or is cancelled, with its status and `error.type`
      as attributes. A function is given the call's result, so it counts successful calls alone. `tallymark.measure`
      has the rest: arguments, durations, bytes, tokens, items, and what the handler says by `usage.add()`.
    - `unit`, in UCUM: left out it is "{request}" for a number, "1" for a function, a measure's own for a measure.
    - `attributes`: further dimensions of the meter, fixed or made from the result. From a request that one of
      `tallymark.integrations` serves, method, route and status come by themselves.
    - `billable`: a function of the call (`.status`, `.error`, `.result`, `.arguments`), which is not counted where it
      returns False. Left out, every call counts, and its status tells what it was.

    Functions, coroutine functions, generators and asynchronous generators may be decorated, methods too. A generator
    counts when it ends, and `error.type` says how: "GeneratorExit" where its consumer went away. Meters may be stacked.
    Calls of one meter inside each other count once, for the outer one. Given to an integration (`track=`), it counts
    every request.

    The function's result, exceptions and signature are unchanged, and nothing here raises when it is called: a
    quantity that cannot be counted is refused with a warning, attributes that cannot be sent are left out.

    Raises DeclarationError, when the module is imported, for a bad meter, unit, quantity or attribute, for a meter
    declared with another unit elsewhere, and for what has no calls to count, as a class.
    """
    if unit is None:
        unit = quantity.unit if isinstance(quantity, Measure) else PLAIN_UNIT if callable(quantity) else REQUEST_UNIT
    return UsageTracker(Tally(runtime.current().meters.declare(meter, unit), quantity, attributes, billable))


class UsageTracker:
    """What `track_usage()` declares: a decorator, or what an integration counts its requests by."""

    __slots__ = ("_tallies", "_tally")

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._tallies: WeakKeyDictionary[Callable[..., object], Tally] = WeakKeyDictionary()

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        called = _called(_countable(function))
        target = getattr(called, "__func__", called)
        tally = self.new_tally(function) if called is function else self._tally_of(target, function)
        counted = wrapped(function, called, tally)
        _evaluate_annotations(counted, function)
        return cast(Callable[P, R], counted)

    def new_tally(self, function: Callable[..., Any] | None = None) -> Tally:
        """One for each thing that is counted: calls of two of them, inside each other, are one."""
        tally = self._tally.for_another(function)
        tally.meter.uses += 1
        return tally

    def _tally_of(self, target: Callable[..., object], function: Callable[..., object]) -> Tally:
        """The one of a function that is reached by a partial or an object: Django decorates a new partial of a method
        for each request. Where the arguments count, a partial's own signature does."""
        if self._tally.needs_function:
            return self.new_tally(function)
        tally = self._tallies.get(target)
        if tally is None:
            tally = self._tallies[target] = self.new_tally(function)
        return tally

    def of_requests(self) -> Tally:
        """For integrations. Raises DeclarationError where only a function's arguments or result tell how much it is."""
        if self._tally.needs_function:
            raise DeclarationError(
                f"meter {self._tally.meter.name!r}: a request has neither arguments nor a result to count; "
                "give a number or a measure of the request"
            )
        return self.new_tally()


def _evaluate_annotations(counted: Callable[..., object], function: Callable[..., object]) -> None:
    """Annotations that are texts (`from __future__ import annotations`) mean names of the function's module. FastAPI
    up to 0.123 at least looks for them in the wrapper's, which is ours, and takes a body for a query parameter."""
    try:
        written = inspect.signature(function)
        if any(isinstance(parameter.annotation, str) for parameter in written.parameters.values()):
            counted.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    except Exception:  # noqa: S110 - a name that is not there yet, or a callable that does not tell: left as written
        pass


def _countable(function: object) -> Callable[..., object]:
    """What is decorated, if it has calls to count. Raises DeclarationError otherwise."""
    name = getattr(function, "__qualname__", type(function).__name__)
    if isinstance(function, (staticmethod, classmethod, property)):
        raise DeclarationError(f"{name}: put @track_usage below @{type(function).__name__}, on the function itself")
    if isinstance(function, type):
        raise DeclarationError(
            f"{name}: @track_usage counts functions and methods, not a class: put it on the class's methods"
        )
    if not callable(function):
        raise DeclarationError(f"{name}: @track_usage counts functions and methods, not a {type(function).__name__}")
    return function


def _called(function: Callable[..., object]) -> Callable[..., object]:
    """The function that runs: an object's `__call__`, the function inside a partial."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function):
        return function
    return cast(Callable[..., object], type(function).__call__)
