"""What every integration does around a call that its server serves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from typing import Final, Generic, TypeVar, cast

from tallymark import runtime
from tallymark.baggage import adopt
from tallymark.calls import Call, current_call
from tallymark.decorators import UsageTracker
from tallymark.errors import DeclarationError, checked_function
from tallymark.identity import NOBODY, Held, Identity, current_held, identify, is_in_force
from tallymark.tallies import Tally
from tallymark.tracked import TrackedCall

T = TypeVar("T")

Found = Identity | Mapping[str, "str | None"] | None
Resolver = Callable[[T], Found]
"""Says whom a request is for: an `Identity`, a mapping with any of account, user and plan, or None: not known yet."""

Trackers = UsageTracker | Iterable[UsageTracker]
Track = Trackers | Callable[[], Trackers]
"""What requests are counted by. A function that gives it is called at the first request: its meters must be expected
(`Meters.expect`) before any call of theirs begins."""

ASYNC_WAY: Final = (
    "; where only an await tells whom it is for, call tallymark.identify() in a dependency, in a middleware inside "
    "this one, or in the handler"
)

_FIELDS: Final = ("account", "user", "plan")
_WANTED: Final = "it must return an Identity, a mapping with any of account, user and plan, or None"


class Requests(Generic[T]):
    """The calls that one integration serves. `name` is for messages."""

    def __init__(self, name: str, resolver: Resolver[T] | None, track: Track) -> None:
        """Raises DeclarationError for a resolver that has to be awaited, and for a tracker that counts by a function's
        result."""
        self._name = name
        self._resolver = None if resolver is None else checked_function(f"{name}: identify", resolver, ASYNC_WAY)
        # A tracker can be called, too: it is a decorator.
        later = callable(track) and not isinstance(track, UsageTracker)
        self._track_later = cast("Callable[[], Trackers]", track) if later else None
        self._tallies = () if later else _tallies(name, cast(Trackers, track))

    def begin(self, call: Call, about: T) -> Served:
        """From here on `call` is being served, and nobody is identified but by the resolver, which is given `about`.

        Servers may start a request's task from the one before it on the same connection (uvicorn does, for pipelined
        requests), and a task inherits its maker's context: the other request's account must not come along.

        A call that another integration serves already stays that one's: this resolver may say more about it, and what
        is tracked here is counted at its end.
        """
        served = Served(call)
        current_call.set(call)
        if served.is_first:
            current_held.set(Held(NOBODY))
        if (self._resolver is None or self._identify(self._resolver, about)) and served.is_first:
            adopt(call.header)
        if self._track_later is not None:
            self._declare(self._track_later)
        for tally in self._tallies:
            served.count_at_end(tally.begin())
        served.begun()
        return served

    def _declare(self, track: Callable[[], Trackers]) -> None:
        """Two threads may both do it: either's tallies count a request once."""
        try:
            self._tallies = _tallies(self._name, track())
        except Exception as error:
            runtime.current().reporter.error(
                "track", "%s: requests are not counted: %s", self._name, error, exc_info=error
            )
        self._track_later = None

    def _identify(self, resolver: Resolver[T], about: T) -> bool:
        """False where the resolver raised, or made something that names nobody: the request is nobody's then."""
        try:
            found = resolver(about)
            fields, returned = _fields_of(found)
        except Exception as error:
            identify(None, None, None)
            runtime.current().reporter.error(
                "resolver",
                "%s: the identify function raised; the request is recorded without an account: %s",
                self._name,
                type(error).__name__,
                exc_info=error,
            )
            return False
        if returned is not None:
            outcome = "the request is recorded without an account" if fields is None else "the others are left out"
            runtime.current().reporter.error(
                "resolver.returned",
                "%s: the identify function returned %s; %s; %s",
                self._name,
                returned,
                _WANTED,
                outcome,
            )
        if fields is None:
            identify(None, None, None)
            return False
        if fields:
            identify(**fields)
        return True


def _fields_of(found: object) -> tuple[dict[str, str | None] | None, str | None]:
    """(what a resolver's result says, what is wrong with it), of which either may be None. No value is told, nor a
    mapping's names: they may be credentials."""
    if found is None:
        return {}, None
    if isinstance(found, Identity):
        return {"account": found.account, "user": found.user, "plan": found.plan}, None
    kind = f"a {type(found).__name__}"
    if inspect.iscoroutine(found):
        found.close()  # or Python warns of it as well
        return None, kind + ASYNC_WAY
    if not isinstance(found, Mapping):
        return None, kind
    fields = {field: found[field] for field in _FIELDS if field in found}
    others = sum(name not in _FIELDS for name in found)
    if not others:
        return fields, None
    if not fields:
        return None, f"{kind} with none of the three names"
    return fields, f"{kind} with names beside the three ({others})"


def _tallies(name: str, track: Trackers) -> tuple[Tally, ...]:
    """Raises DeclarationError for what `track_usage()` has not made."""
    is_one = isinstance(track, (UsageTracker, str)) or not isinstance(track, Iterable)
    tallies = []
    for tracker in cast("Iterable[object]", (track,) if is_one else track):
        if not isinstance(tracker, UsageTracker):
            raise DeclarationError(
                f"{name}: track= takes what track_usage() made, one or several, not a {type(tracker).__name__}"
            )
        tallies.append(tracker.of_requests())
    return tuple(tallies)


@contextmanager
def serving(call: Call) -> Iterator[None]:
    """`call` is being served inside, for nobody at its start, and is not counted itself."""
    served = Requests[None]("serving", None, ()).begin(call, None)
    try:
        yield
    except BaseException as error:
        served.end(error)
        raise
    served.end()


class Served:
    """One call, from `Requests.begin` to its end."""

    __slots__ = ("_answered", "_around", "_call", "_call_before", "_context", "_held", "_held_before", "_tracked")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._call_before = current_call.get()
        self._held_before = current_held.get()
        self._around: Served | None = call.served
        self._tracked: list[TrackedCall] = []
        self._answered = False
        if self._around is None:
            call.served = self

    @property
    def is_first(self) -> bool:
        """False where another integration serves the call already."""
        return self._around is None

    def count_at_end(self, tracked: TrackedCall) -> None:
        """The call's end is this one's too."""
        (self._around or self)._tracked.append(tracked)

    def begun(self) -> None:
        """Keeps who was identified at the begin, and the context for an end that comes in another one."""
        self._held = current_held.get()
        self._context = copy_context()

    def answered(self, error: BaseException | None = None) -> None:
        """The answer has been sent, or never will be. Counts what waited for it, then the call itself. In any thread
        and context. Again, or where another integration serves the call: nothing happens."""
        if self._answered or self._around is not None:
            return
        self._answered = True
        self._call.served = None
        if current_call.get() is self._call:
            self._count(error)
        else:
            self._context.run(self._count, error)

    def end(self, error: BaseException | None = None) -> None:
        """The call is over, in the context in which it began: `answered`, and what was before is in force again."""
        if self._around is not None:
            return
        self.answered(error)
        current_held.set(self._held_before)
        current_call.set(self._call_before)

    def _count(self, error: BaseException | None) -> None:
        self._call.end()
        held = current_held.get()
        identified = self._call.identified
        if held is self._held and identified is not None and is_in_force(identified):
            # Who was identified in a task of its own, as a middleware in between may run the handler in: that context
            # does not come back here.
            current_held.set(identified)
        while self._tracked:  # emptied: the error's traceback leads here, and would keep itself alive
            tracked = self._tracked.pop()
            tracked.tally.end(tracked, None, error)
            del tracked
        current_held.set(held)
