"""What every integration does around a call that its server serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Generic, TypeVar

from tallymark import runtime
from tallymark.calls import Call, current_call
from tallymark.decorators import UsageTracker
from tallymark.identity import NOBODY, Held, Identity, current_held, current_identity, identify
from tallymark.tallies import Tally
from tallymark.tracked import TrackedCall

T = TypeVar("T")

Found = Identity | Mapping[str, "str | None"] | None
Resolver = Callable[[T], Found]
"""Says whom a request is for: an `Identity`, a mapping with any of account, user and plan, or None: not known yet."""

_FIELDS: Final = ("account", "user", "plan")


class Requests(Generic[T]):
    """The calls that one integration serves. `name` is for messages."""

    def __init__(self, name: str, resolver: Resolver[T] | None, track: Iterable[UsageTracker]) -> None:
        """Raises DeclarationError for a tracker that counts by a function's result."""
        self._name = name
        self._resolver = resolver
        self._tallies: tuple[Tally, ...] = tuple(tracker.of_requests() for tracker in track)

    def begin(self, call: Call, about: T) -> Served:
        """From here on `call` is being served, and nobody is identified but by the resolver, which is given `about`.

        Servers may start a request's task from the one before it on the same connection (uvicorn does, for pipelined
        requests), and a task inherits its maker's context: the other request's account must not come along.
        """
        served = Served(call, current_call.get(), current_held.get())
        current_call.set(call)
        current_held.set(Held(NOBODY))
        if self._resolver is not None:
            self._identify(self._resolver, about)
        served.tracked.extend(tally.begin() for tally in self._tallies)
        return served

    def _identify(self, resolver: Resolver[T], about: T) -> None:
        try:
            found = resolver(about)
            if isinstance(found, Identity):
                identify(found.account, found.user, found.plan)
            elif found is not None:
                identify(**{field: found[field] for field in _FIELDS if field in found})
        except Exception as error:
            identify(None, None, None)
            runtime.current().reporter.error(
                "resolver",
                "%s: the identify function raised; the request is recorded without an account: %s",
                self._name,
                type(error).__name__,
                exc_info=error,
            )


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

    __slots__ = ("_call", "_call_before", "_ended", "_held_before", "tracked")

    def __init__(self, call: Call, call_before: Call | None, held_before: Held) -> None:
        self._call = call
        self._call_before = call_before
        self._held_before = held_before
        self._ended = False
        self.tracked: list[TrackedCall] = []

    def end(self, error: BaseException | None = None) -> None:
        """The answer has been sent, or never will be. Counts what waited for it, then the call itself. Again: nothing
        happens."""
        if self._ended:
            return
        self._ended = True
        self._call.end()
        identified = self._call.identified
        if identified is not None and not identified.ended and current_identity().account is None:
            # A middleware in between ran the handler in a task of its own, whose context does not come back.
            current_held.set(identified)
        while self.tracked:  # emptied: the error's traceback leads here, and would keep itself alive
            tracked = self.tracked.pop()
            tracked.tally.end(tracked, None, error)
            del tracked
        current_held.set(self._held_before)
        current_call.set(self._call_before)
