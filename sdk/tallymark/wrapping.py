"""The wrappers around decorated functions: one each for functions, coroutine functions, generators and asynchronous
generators. Callers and consumers see what they would see without one.

An exception's traceback leads to the wrapper's frame. So a wrapper lets go of the call before the exception leaves it:
the call knows its exception, and a circle of the two would keep the handler's variables alive until the garbage
collector comes by.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Mapping
from contextvars import copy_context
from typing import Any, Final, ParamSpec, TypeVar, cast

from opentelemetry.context import get_current

from tallymark import runtime
from tallymark.calls import current_call
from tallymark.identity import current_held
from tallymark.nesting import enter, leave, resume, suspend
from tallymark.streams import Series
from tallymark.tallies import Tally
from tallymark.tracked import TrackedCall

P = ParamSpec("P")
R = TypeVar("R")

Begin = Callable[[tuple[object, ...], Mapping[str, object]], TrackedCall]

FOLLOWED: Final = frozenset({types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType})
"""Results whose end is the call's end."""


def wrapped(function: Callable[..., Any], called: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    """`function`, counted. `called` is what runs in the end: an object's `__call__`, the function inside a partial."""
    if inspect.isasyncgenfunction(called):
        return functools.wraps(function)(_async_generator(function, tally, tally.begin))
    if inspect.isgeneratorfunction(called):
        return functools.wraps(function)(_like(called, _generator(function, tally, tally.begin)))
    if inspect.iscoroutinefunction(called):
        in_full = _coroutine(function, tally, tally.begin)
        return functools.wraps(function)(in_full if tally.plain is None else _plain_coroutine(function, tally, in_full))
    if tally.needs_call:
        return _function(function, tally)
    return _nested(function, tally) if tally.plain is None else _plain(function, tally)


def _plain(function: Callable[P, R], tally: Tally) -> Callable[P, R]:
    """For whole numbers with fixed attributes: this is every call of a service's inner functions."""
    meter, series, quantity = tally.meter, tally.plain, tally.quantity
    assert series is not None
    nested = _nested(function, tally)

    @functools.wraps(function)
    def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        if meter.uses > 1:
            return nested(*args, **kwargs)
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            tally.ended_plainly(None, error, kwargs)
            raise
        if type(result) in FOLLOWED:
            return cast(R, _follow(tally, tally.begin(args, kwargs), result))
        # As `_add` does, without the cost of calling it.
        into = runtime.active
        if current_call.get() is not None or not into.enabled:
            tally.ended_plainly(result, None, kwargs)
            return result
        try:
            identity = current_held.get().identity
            into.recorder.add((series, identity.account, identity.plan), quantity)
            if get_current():
                into.evidence.add_to_current_span(meter, identity, quantity)
        except Exception as error:
            tally.report(into, "usage could not be recorded, or not on the span", error)
        return result

    return counted


def _plain_coroutine(
    function: Callable[..., Awaitable[Any]], tally: Tally, in_full: Callable[..., Coroutine[Any, Any, Any]]
) -> Callable[..., Coroutine[Any, Any, Any]]:
    """The same for coroutine functions."""
    meter, series = tally.meter, tally.plain
    assert series is not None

    async def counted(*args: object, **kwargs: object) -> object:
        if meter.uses > 1:
            return await in_full(*args, **kwargs)
        begun = copy_context()
        try:
            result = await function(*args, **kwargs)
        except GeneratorExit as error:
            tally.end_in(begun, TrackedCall(tally, args, kwargs), error)
            raise
        except BaseException as error:  # a cancelled call was made too
            tally.ended_plainly(None, error, kwargs)
            raise
        if type(result) in FOLLOWED:
            return _follow(tally, tally.begin(args, kwargs), result)
        _add(tally, series, result, kwargs)
        return result

    return counted


def _add(tally: Tally, series: Series, result: object, kwargs: Mapping[str, object]) -> None:
    into = runtime.active
    if current_call.get() is not None or not into.enabled:
        tally.ended_plainly(result, None, kwargs)
        return
    try:
        identity = current_held.get().identity
        into.recorder.add((series, identity.account, identity.plan), tally.quantity)
        if get_current():
            into.evidence.add_to_current_span(tally.meter, identity, tally.quantity)
    except Exception as error:
        tally.report(into, "usage could not be recorded, or not on the span", error)


def _nested(function: Callable[P, R], tally: Tally) -> Callable[P, R]:
    """For numbers with fixed attributes, whose calls may be inside each other."""
    series = tally.plain

    @functools.wraps(function)
    def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        running = enter(tally)
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            tally.end_plainly(running, None, error, kwargs)
            raise
        if type(result) in FOLLOWED:
            return cast(R, _follow(tally, TrackedCall(tally, args, kwargs, running), result))
        if series is None:
            tally.end_plainly(running, result, None, kwargs)
            return result
        leave(running)
        if not running.is_part:
            _add(tally, series, result, kwargs)
        return result

    return counted


def _function(function: Callable[P, R], tally: Tally) -> Callable[P, R]:
    @functools.wraps(function)
    def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        call = tally.begin(args, kwargs)
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            tally.end(call, None, error)
            del call
            raise
        if type(result) in FOLLOWED:
            return cast(R, _follow(tally, call, result))
        tally.end(call, result, None)
        return result

    return counted


def _coroutine(
    function: Callable[..., Awaitable[Any]], tally: Tally, begin: Begin
) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def counted(*args: object, **kwargs: object) -> object:
        call = begin(args, kwargs)
        begun = copy_context()
        try:
            result = await function(*args, **kwargs)
        except GeneratorExit as error:
            tally.end_in(begun, call, error)
            del call
            raise
        except BaseException as error:  # a cancelled call was made too
            tally.end(call, None, error)
            del call
            raise
        if type(result) in FOLLOWED:
            return _follow(tally, call, result)
        tally.end(call, result, None)
        return result

    return counted


def _generator(
    function: Callable[..., Generator[Any, Any, Any]], tally: Tally, begin: Begin
) -> Callable[..., Generator[Any, Any, Any]]:
    def counted(*args: object, **kwargs: object) -> Generator[Any, Any, Any]:
        steps = _Steps(tally, begin(args, kwargs))
        try:
            generator = function(*args, **kwargs)
            while True:
                try:
                    # The item is in no variable here: it lives no longer than its consumer lets it.
                    steps.given = yield steps.took(steps.step(generator.send, generator.throw))
                except BaseException as error:
                    if not steps.suspended:
                        raise
                    steps.thrown = error
                steps.goes_on()
        except StopIteration as stopped:
            result = stopped.value
        except BaseException as error:
            steps.end(None, error)
            raise
        steps.end(result, None)
        return result

    return counted


def _async_generator(
    function: Callable[..., AsyncGenerator[Any, Any]], tally: Tally, begin: Begin
) -> Callable[..., AsyncGenerator[Any, Any]]:
    async def counted(*args: object, **kwargs: object) -> AsyncGenerator[Any, Any]:
        steps = _Steps(tally, begin(args, kwargs))
        try:
            generator = function(*args, **kwargs)
            while True:
                try:
                    steps.given = yield steps.took(await steps.step(generator.asend, generator.athrow))
                except BaseException as error:
                    if not steps.suspended:
                        raise
                    steps.thrown = error
                steps.goes_on()
        except StopAsyncIteration:
            pass
        except BaseException as error:
            steps.end(None, error)
            raise
        steps.end(None, None)

    return counted


class _Steps:
    """What happens beside the steps of a generator that is counted."""

    __slots__ = ("_call", "_context", "_tally", "given", "suspended", "thrown")

    def __init__(self, tally: Tally, call: TrackedCall) -> None:
        self._tally = tally
        self._call: TrackedCall | None = call
        self._context = copy_context()
        call.items = 0
        self.given: object = None
        self.thrown: BaseException | None = None
        self.suspended = False
        """Whether the consumer has the word; what is raised then was thrown in by it."""

    def step(self, send: Callable[[Any], Any], throw: Callable[[BaseException], Any]) -> Any:
        """Hands over what the consumer has given, and keeps nothing of it."""
        given, thrown, self.given, self.thrown = self.given, self.thrown, None, None
        if thrown is None:
            return send(given)
        try:
            return throw(thrown)
        finally:
            del thrown

    def took(self, item: object) -> object:
        """The generator has yielded."""
        call = self._call
        if call is not None and call.items is not None:
            if call.running is not None:
                suspend(call.running)
            call.items += 1
            self._tally.note(call, item)
            self._context = copy_context()
        self.suspended = True
        return item

    def goes_on(self) -> None:
        """The consumer has given the word back, in whatever context."""
        self.suspended = False
        if self._call is not None and self._call.running is not None:
            resume(self._call.running)

    def end(self, result: object, error: BaseException | None) -> None:
        """The generator has ended. Again: nothing happens."""
        call, self._call = self._call, None
        if call is None:
            return
        if isinstance(error, GeneratorExit):
            self._tally.end_in(self._context, call, error)
        else:
            self._tally.end(call, result, error)

    def __del__(self) -> None:
        # A generator that was destroyed without an end of its own: it would not be closed, or could not.
        if self._call is not None:
            self.end(None, GeneratorExit())


def _follow(tally: Tally, call: TrackedCall, result: Any) -> object:
    """The call goes on in its result, a coroutine or a generator, which is counted when that ends; not at all if it
    never begins, like that of a coroutine function or a generator function."""
    if call.running is not None:
        suspend(call.running)

    def begin(args: tuple[object, ...], kwargs: Mapping[str, object]) -> TrackedCall:
        if call.running is not None:
            resume(call.running)
        return call

    def function() -> Any:
        return result

    followed: Any
    if isinstance(result, types.CoroutineType):
        followed = _coroutine(function, tally, begin)()
        # Closed before it began, it closes the one inside, which would complain that nobody has waited for it.
        weakref.finalize(followed, result.close).atexit = False
    elif isinstance(result, types.GeneratorType):
        followed = _like(result, _generator(function, tally, begin))()
    else:
        followed = _async_generator(function, tally, begin)()
    followed.__name__, followed.__qualname__ = result.__name__, result.__qualname__
    return followed


def _like(called: Any, counted: Callable[..., Any]) -> Callable[..., Any]:
    """Awaitable where the generator is: what `types.coroutine` has made."""
    while inspect.ismethod(called):
        called = called.__func__
    code = called.gi_code if isinstance(called, types.GeneratorType) else called.__code__
    return types.coroutine(counted) if code.co_flags & inspect.CO_ITERABLE_COROUTINE else counted
