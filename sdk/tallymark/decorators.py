"""`@track_usage`: counts the calls of a function, or what they make, without touching either.

One wrapper each for functions, coroutine functions, generators and asynchronous generators; what a call's end means to
its meter is `tallymark.tallies`' affair.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextvars import Context, copy_context
from decimal import Decimal
from typing import Any, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

from opentelemetry.context import get_current

from tallymark import runtime
from tallymark.calls import current_call
from tallymark.dimensions import Value
from tallymark.errors import DeclarationError
from tallymark.identity import current_held
from tallymark.measure import Measure
from tallymark.meters import PLAIN_UNIT, REQUEST_UNIT
from tallymark.tallies import Tally
from tallymark.tracked import TrackedCall, resume, suspend

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
        target = _called(_countable(function))
        tally = self.new_tally() if target is function else self._tally_of(getattr(target, "__func__", target))
        if inspect.isasyncgenfunction(target):
            wrapper: object = _counted_async_generator(cast(Callable[P, AsyncGenerator[Any, Any]], function), tally)
        elif inspect.isgeneratorfunction(target):
            wrapper = _counted_generator(cast(Callable[P, Generator[Any, Any, Any]], function), tally)
        elif inspect.iscoroutinefunction(target):
            wrapper = _counted_async(cast(Callable[P, Awaitable[Any]], function), tally)
        elif tally.plain is not None:
            wrapper = _counted_plainly(function, tally)
        else:
            wrapper = _counted(function, tally)
        return cast(Callable[P, R], wrapper)

    def new_tally(self) -> Tally:
        """One for each thing that is counted: calls of two of them, inside each other, are one."""
        self._tally.meter.uses += 1
        return self._tally.for_another()

    def _tally_of(self, target: Callable[..., object]) -> Tally:
        """The one of a function that is reached by a partial or an object: Django decorates a new partial of a method
        for each request."""
        tally = self._tallies.get(target)
        if tally is None:
            tally = self._tallies[target] = self.new_tally()
        return tally

    def of_requests(self) -> Tally:
        """For integrations. Raises DeclarationError where only a function's result tells how much it is."""
        if self._tally.needs_result:
            raise DeclarationError(
                f"meter {self._tally.meter.name!r}: requests have no result to count; give a number or a measure"
            )
        return self.new_tally()


def _counted_plainly(function: Callable[P, R], tally: Tally) -> Callable[P, R]:
    """For numbers with fixed attributes: this is every call of a service's inner functions."""
    meter, plain, quantity = tally.meter, tally.plain, tally.quantity
    assert plain is not None
    in_full = _counted(function, tally)

    @functools.wraps(function)
    def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        if meter.uses > 1:
            return in_full(*args, **kwargs)
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            tally.ended_plainly(None, error, kwargs)
            raise
        into = runtime.active
        if current_call.get() is not None or not into.enabled:
            tally.ended_plainly(result, None, kwargs)
            return result
        try:
            identity = current_held.get().identity
            into.recorder.add((plain, identity.account, identity.plan), quantity)
            if get_current():
                into.evidence.add_to_current_span(meter, identity, quantity)
        except Exception as error:
            tally.report(into, "usage could not be recorded, or not on the span", error)
        return result

    return counted


def _counted(function: Callable[P, R], tally: Tally) -> Callable[P, R]:
    @functools.wraps(function)
    def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        tracked = tally.begin(function, args, kwargs)
        if tracked is None:
            return function(*args, **kwargs)
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            tracked.tally.end(tracked, None, error)
            raise
        tracked.tally.end(tracked, result, None)
        return result

    return counted


def _counted_async(function: Callable[P, Awaitable[R]], tally: Tally) -> Callable[P, Awaitable[R]]:
    @functools.wraps(function)
    async def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        tracked = tally.begin(function, args, kwargs)
        if tracked is None:
            return await function(*args, **kwargs)
        try:
            result = await function(*args, **kwargs)
        except BaseException as error:  # a cancelled call was made too
            tracked.tally.end(tracked, None, error)
            raise
        tracked.tally.end(tracked, result, None)
        return result

    return counted


def _counted_generator(
    function: Callable[P, Generator[Any, Any, Any]], tally: Tally
) -> Callable[P, Generator[Any, Any, Any]]:
    @functools.wraps(function)
    def counted(*args: P.args, **kwargs: P.kwargs) -> Generator[Any, Any, Any]:
        tracked = tally.begin(function, args, kwargs)
        if tracked is None:
            return (yield from function(*args, **kwargs))
        steps = _Steps(tracked)
        try:
            generator = function(*args, **kwargs)
            step: Callable[..., Any] = generator.send
            given: object = None
            while True:
                item = steps.took(step(given))
                try:
                    given = yield item
                    step = generator.send
                except GeneratorExit:
                    resume(tracked)
                    generator.close()
                    raise
                except BaseException as error:
                    step, given = generator.throw, error
                resume(tracked)
        except StopIteration as stopped:
            steps.end(stopped.value, None)
            return stopped.value
        except BaseException as error:
            steps.end(None, error)
            raise

    return counted


def _counted_async_generator(
    function: Callable[P, AsyncGenerator[Any, Any]], tally: Tally
) -> Callable[P, AsyncGenerator[Any, Any]]:
    @functools.wraps(function)
    async def counted(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Any, Any]:
        tracked = tally.begin(function, args, kwargs)
        steps = None if tracked is None else _Steps(tracked)
        try:
            generator = function(*args, **kwargs)
            step: Callable[..., Any] = generator.asend
            given: object = None
            while True:
                item = await step(given)
                if steps is not None:
                    steps.took(item)
                try:
                    given = yield item
                    step = generator.asend
                except GeneratorExit:
                    if tracked is not None:
                        resume(tracked)
                    await generator.aclose()
                    raise
                except BaseException as error:
                    step, given = generator.athrow, error
                if tracked is not None:
                    resume(tracked)
        except StopAsyncIteration:
            if steps is not None:
                steps.end(None, None)
        except BaseException as error:
            if steps is not None:
                steps.end(None, error)
            raise

    return counted


class _Steps:
    """What happens beside the steps of a generator that is counted.

    A consumer that goes away may leave the end to the garbage collector, in whatever context that runs: the usage
    belongs to the context in which the generator yielded last.
    """

    __slots__ = ("_context", "_tracked")

    def __init__(self, tracked: TrackedCall) -> None:
        self._tracked = tracked
        self._context: Context | None = None

    def took(self, item: object) -> object:
        """The generator has yielded."""
        tracked = self._tracked
        suspend(tracked)
        tracked.items += 1
        measure = tracked.tally.measure
        if measure is not None and measure.note is not None:
            try:
                tracked.noted = measure.note(tracked.noted, item)
            except Exception as error:
                tracked.tally.report(runtime.active, "an item could not be looked at", error)
        self._context = copy_context()
        return item

    def end(self, result: object, error: BaseException | None) -> None:
        """The generator has ended."""
        if isinstance(error, GeneratorExit) and self._context is not None:
            self._tracked.live = False
            self._context.run(self._tracked.tally.end, self._tracked, result, error)
        else:
            self._tracked.tally.end(self._tracked, result, error)


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
