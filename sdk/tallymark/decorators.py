"""`@track_usage`: counts the calls of a function, or what they return, without touching either."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal
from typing import Any, Final, ParamSpec, TypeVar, cast

from opentelemetry.context import get_current

from tallymark import runtime
from tallymark.calls import current_call, describe
from tallymark.dimensions import Dimensions, Value, from_mapping, of_call
from tallymark.errors import DeclarationError
from tallymark.identity import current_held
from tallymark.meters import PLAIN_UNIT, REQUEST_UNIT, Meter
from tallymark.quantities import Exact, RefusedQuantityError, exact
from tallymark.runtime import Runtime
from tallymark.streams import Series
from tallymark.usage import checked_attributes, count

P = ParamSpec("P")
R = TypeVar("R")

Quantity = int | float | Decimal
Attributes = Mapping[str, Value]

MAX_REMEMBERED: Final = 1_000
"""Sets of dimensions that one decorated function keeps ready; methods, routes and statuses are few."""


def track_usage(
    meter: str,
    quantity: Quantity | Callable[[Any], Quantity] = 1,
    *,
    unit: str | None = None,
    attributes: Attributes | Callable[[Any], Attributes] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Record usage of `meter` each time the decorated function has run, for the account that `identify()` named.

        @app.post("/v1/images")
        @track_usage("images", quantity=lambda result: len(result["images"]), unit="{image}")
        async def create(request: ImageRequest) -> dict: ...

    - `quantity`: a number counts every call, also one that raises or is cancelled, with its status and `error.type`
      as attributes. A function is given the call's result, so it counts successful calls alone.
    - `unit`, in UCUM: left out it is "{request}" for a number and "1" for a function, for only the calls themselves
      are known to be requests.
    - `attributes`: further dimensions of the meter, fixed or made from the result. From a request that
      `UsageMiddleware` serves, method, route and status come by themselves.

    The function's result, exceptions and signature are unchanged, and nothing here raises when it is called: a
    quantity that cannot be counted is refused with a warning, attributes that cannot be sent are left out.

    Raises DeclarationError, when the module is imported, for a bad meter, unit, quantity or attribute, for a meter
    declared with another unit elsewhere, and for what cannot be counted by its return: generators and classes.
    """
    if unit is None:
        unit = PLAIN_UNIT if callable(quantity) else REQUEST_UNIT
    tally = _Tally(runtime.current().meters.declare(meter, unit), quantity, attributes)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if _is_coroutine_function(_countable(function)):
            wrapper: object = _counted_async(cast(Callable[P, Awaitable[Any]], function), tally)
        else:
            wrapper = _counted(function, tally)
        return cast(Callable[P, R], wrapper)

    return decorate


class _Tally:
    """What one declaration counts. `returned` and `failed` never raise."""

    __slots__ = ("_attributes_of", "_meter", "_own", "_quantity_of", "_remembered", "plain", "quantity")

    def __init__(self, meter: Meter, quantity: object, attributes: object) -> None:
        self._meter = meter
        self.quantity: Exact = 0
        self._quantity_of: Callable[[Any], object] | None = None
        self._own: Dimensions = ()
        self._attributes_of: Callable[[Any], object] | None = None
        self._remembered: dict[tuple[object, ...], Series] = {}
        if callable(quantity):
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
        # What a call outside of a request adds to, where everything about it is known from the start.
        self.plain: Series | None = None
        if self._quantity_of is None and self._attributes_of is None and type(self.quantity) is int and self.quantity:
            self.plain = Series(meter, of_call(None, None, None, None, self._own))

    def returned(self, result: object) -> None:
        into = runtime.active
        if not into.enabled:
            return
        plain = self.plain
        if plain is not None and current_call.get() is None:
            # The same as below, without what takes time: this is every call of a service's inner functions.
            try:
                identity = current_held.get().identity
                into.recorder.add((plain, identity.account, identity.plan), self.quantity)
                if get_current():
                    into.evidence.add_to_current_span(self._meter, identity, self.quantity)
            except Exception as error:
                self.report(into, "usage could not be recorded, or not on the span", error)
            return
        quantity: object = self.quantity
        if self._quantity_of is not None:
            try:
                quantity = self._quantity_of(result)
            except BaseException as error:
                _unless_interrupted(error)
                into.recorder.refuse(self._meter.name)
                self.report(into, "the quantity function raised; the call is not billed", error)
                return
        own = self._own
        if self._attributes_of is not None:
            try:
                own = checked_attributes(into, self._meter, self._attributes_of(result))
            except BaseException as error:
                _unless_interrupted(error)
                self.report(into, "the attributes function raised; the call is counted without them", error)
        count(into, self._series(into, result, None, own), quantity)

    def failed(self, error: BaseException) -> None:
        into = runtime.current()
        if into.enabled and self._quantity_of is None:
            count(into, self._series(into, None, error, self._own), self.quantity)

    def _series(self, into: Runtime, result: object, error: BaseException | None, own: Dimensions) -> Series:
        try:
            key = (*describe(current_call.get(), result, error), own)
        except Exception as failure:
            self.report(into, "the call could not be described and is counted without its attributes", failure)
            return into.series.of(self._meter, own)
        known = self._remembered.get(key)
        if known is None:
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.clear()
            known = self._remembered[key] = Series(self._meter, of_call(*key))
        return known

    def report(self, into: Runtime, what: str, error: BaseException) -> None:
        into.reporter.error(
            f"{what}.{self._meter.name}",
            "meter %s: %s: %s",
            self._meter.name,
            what,
            type(error).__name__,
            exc_info=error,
        )


def _counted(function: Callable[P, R], tally: _Tally) -> Callable[P, R]:
    returned, plain, quantity = tally.returned, tally.plain, tally.quantity

    @functools.wraps(function)
    def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            tally.failed(error)
            raise
        into = runtime.active
        if plain is None or not into.enabled or current_call.get() is not None:
            returned(result)
            return result
        try:
            identity = current_held.get().identity
            into.recorder.add((plain, identity.account, identity.plan), quantity)
            if get_current():
                into.evidence.add_to_current_span(plain.meter, identity, quantity)
        except Exception as error:
            tally.report(into, "usage could not be recorded, or not on the span", error)
        return result

    return counted


def _counted_async(function: Callable[P, Awaitable[R]], tally: _Tally) -> Callable[P, Awaitable[R]]:
    @functools.wraps(function)
    async def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = await function(*args, **kwargs)
        except BaseException as error:  # a cancelled call was made too
            tally.failed(error)
            raise
        tally.returned(result)
        return result

    return counted


def _countable(function: object) -> Callable[..., object]:
    """What is decorated, if its return is the end of a call. Raises DeclarationError otherwise."""
    name = getattr(function, "__qualname__", type(function).__name__)
    if isinstance(function, (staticmethod, classmethod, property)):
        raise DeclarationError(f"{name}: put @track_usage below @{type(function).__name__}, on the function itself")
    if not callable(function) or isinstance(function, type):
        raise DeclarationError(f"{name}: @track_usage counts functions and methods, not a {type(function).__name__}")
    target = _called(function)
    if inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        raise DeclarationError(
            f"{name} is a generator: its call returns before anything was used. Call tallymark.record() where it yields"
        )
    return function


def _is_coroutine_function(function: Callable[..., object]) -> bool:
    return inspect.iscoroutinefunction(_called(function))


def _called(function: Callable[..., object]) -> Callable[..., object]:
    """The function that runs: an object's `__call__`, the function inside a partial."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function):
        return function
    return cast(Callable[..., object], type(function).__call__)


def _unless_interrupted(error: BaseException) -> None:
    """Ctrl-C is the user's, whatever it happens to hit."""
    if isinstance(error, KeyboardInterrupt):
        raise error
