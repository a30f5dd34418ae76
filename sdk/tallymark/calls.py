"""A call that a server is serving: what it is, for as long as it lasts, and what waits for its end.

An integration puts a `Call` into `current_call` while it serves a request, a remote procedure call or a task. What the
call was is asked at the time of recording, because a middleware runs before the router has found the route.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from contextvars import Context, ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from tallymark import conventions
from tallymark.dimensions import Value

if TYPE_CHECKING:
    from tallymark.identity import Held

OTHER_METHOD: Final = "_OTHER"

# RFC 9110, PATCH (RFC 5789) and QUERY: the methods that OpenTelemetry's conventions know.
METHODS: Final = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})

MAX_WAITING: Final = 1_000
"""Recordings that one call may keep until its end; past it they are made at once."""

MAX_LATE: Final = 100_000
"""Calls that are looked at again before their end; recordings of others wait for it."""

Description = tuple[object, ...]
"""What a call was, as a short key; `attributes_of` of the class that made it turns it into attributes."""

NO_ARGUMENTS: Final[Mapping[str, object]] = {}


class IncompleteAnswerError(BaseException):
    """Names how a call ended whose answer did not go out to its end: the client went away, or the server gave up. It is
    never raised; like a cancellation it has no status of its own."""


class _Entry(NamedTuple):
    context: Context
    function: Callable[[], None]
    may_be_early: bool


class LateCalls:
    """Calls in which something waits for their end, since when. In any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._calls: deque[tuple[float, weakref.ref[Call]]] = deque()

    def add(self, call: Call) -> None:
        """From here on the call is waited for."""
        if len(self._calls) < MAX_LATE:
            self._calls.append((self._clock(), weakref.ref(call)))

    def settle(self, after_s: float) -> None:
        """Settles those that have been waited for so long."""
        until = self._clock() - after_s
        while self._calls and self._calls[0][0] <= until:
            try:
                call = self._calls.popleft()[1]()
            except IndexError:
                return
            if call is not None:
                call.settle()


class Call:
    """A call being served. Integrations derive from it."""

    __slots__ = (
        "__weakref__",
        "_counted_once",
        "_ended",
        "_is_listed",
        "_waiting",
        "identified",
        "look_through_at",
        "published",
        "request_bytes",
        "response_bytes",
        "served",
    )

    def __init__(self) -> None:
        # Identities set in the call's worker threads, newest last: see tallymark.identity. A dictionary, for threads
        # may add to it and take from it at once.
        self.published: dict[Held, None] = {}
        self.look_through_at = 0
        """So many of them are looked through for what is over."""
        self.identified: Held | None = None
        """Who was identified last, wherever in the call that was."""
        self.request_bytes: int | None = None
        """Bytes of the request's body that the service has received so far; None where nobody counts them."""
        self.response_bytes: int | None = None
        """Bytes of the answer's body that have been sent so far; None where nobody counts them."""
        self.served: Any = None
        """What an integration keeps from the call's begin to its end."""
        self._waiting: deque[_Entry] = deque()
        self._ended = False
        self._is_listed = False
        self._counted_once: set[Hashable] | None = None

    def describe(
        self, result: object, error: BaseException | None, arguments: Mapping[str, object] = NO_ARGUMENTS
    ) -> Description:
        """What the call was, if it ends so in a handler that was given these keyword arguments."""
        return (error_name(error),)

    def describe_running(self) -> Description:
        """What is known of the call while it runs."""
        return (None,)

    @staticmethod
    def attributes_of(description: Description) -> Mapping[str, Value | None]:
        """The attributes of a description; None where one is not known."""
        (error_type,) = cast("tuple[str | None]", description)
        return {conventions.ERROR_TYPE: error_type}

    def status(
        self, result: object = None, error: BaseException | None = None, arguments: Mapping[str, object] = NO_ARGUMENTS
    ) -> int | None:
        """The status of the answer: the one that was sent, else the one that such an end of the handler would give it;
        None where there is none."""
        return None

    def header(self, name: str) -> str | None:
        """The text of the request's header, or metadata, of this lower-case name; several are joined by commas. None
        where there is none."""
        return None

    def decides_later(self, error: BaseException) -> bool:
        """Whether only the end of the call tells what the answer to this error is."""
        return False

    def at_end(self, function: Callable[[], None], late: LateCalls | None = None) -> bool:
        """Calls `function`, in a copy of this context, when the answer has been sent. False where it cannot wait: the
        call has ended, or too many wait already. In any thread. With `late` it is called before the end if that takes
        too long."""
        if self._ended or len(self._waiting) >= MAX_WAITING:
            return False
        entry = _Entry(copy_context(), function, late is not None)
        self._waiting.append(entry)
        if not self.has_ended:
            if late is not None and not self._is_listed:
                self._is_listed = True
                late.add(self)
            return True
        try:  # it ended meanwhile, in another thread, and may have seen this one or not
            self._waiting.remove(entry)
        except ValueError:
            return True
        return False

    def end(self) -> None:
        """For integrations: the answer has been sent, or never will be. Again: nothing happens."""
        self._ended = True
        while self._waiting:
            try:
                context, function, _ = self._waiting.popleft()
            except IndexError:  # a thread took its own back
                return
            try:
                context.run(function)
            except BaseException:  # Ctrl-C, say, which does not cost the others their usage
                self.end()
                raise

    def settle(self) -> None:
        """Calls what need not wait any longer, with what is known of the call now. In any thread."""
        self._is_listed = False
        kept = []
        try:
            while self._waiting:
                try:
                    entry = self._waiting.popleft()
                except IndexError:  # the call has ended meanwhile
                    break
                if entry.may_be_early:
                    entry.context.run(entry.function)
                else:
                    kept.append(entry)
        finally:
            self._waiting.extend(kept)
            if self._ended:
                self.end()

    @property
    def has_ended(self) -> bool:
        """Whether `end` has been called: nothing waits any more."""
        return self._ended

    def is_first_of(self, thing: Hashable) -> bool:
        """True the first time that it is asked of a thing, as a meter of the answer's bytes, which are there once."""
        if self._counted_once is None:
            self._counted_once = set()
        if thing in self._counted_once:
            return False
        self._counted_once.add(thing)
        return True


_HTTP_ATTRIBUTES: Final = (
    conventions.HTTP_METHOD,
    conventions.HTTP_ROUTE,
    conventions.HTTP_STATUS,
    conventions.ERROR_TYPE,
)


class HttpCall(Call):
    """An HTTP request being served. Each answer may be None where it is not known."""

    __slots__ = ("client_gone", "routed", "sent_status")

    def __init__(self) -> None:
        super().__init__()
        self.sent_status: int | None = None
        """The status that went out, from when it does."""
        self.client_gone = False
        """Whether nothing that is sent from now on reaches anybody."""
        self.routed: Callable[[], str | None] | None = None
        """Tells the route's template, where a framework inside knows it."""

    def method(self) -> str | None:
        """`http.request.method`, `_OTHER` for a method that OpenTelemetry does not know."""
        return None

    def route(self) -> str | None:
        """`http.route`: the template that matched, never the concrete path."""
        return None if self.routed is None else self.routed()

    def default_status(self) -> int:
        """The status of an answer that names none itself."""
        return 200

    def status_of(self, result: object, arguments: Mapping[str, object]) -> int | None:
        """The status that a handler's result, or one of its arguments, gives the answer; None where none does."""
        return status_of(result)

    def status_of_error(self, error: Exception) -> int | None:
        """The status that an exception is sure to give the answer; None where only the answer will tell."""
        return status_of(error)

    def status(
        self, result: object = None, error: BaseException | None = None, arguments: Mapping[str, object] = NO_ARGUMENTS
    ) -> int | None:
        if self.sent_status is not None:
            return self.sent_status
        if error is None:
            return self.status_of(result, arguments) or self.default_status()
        if not isinstance(error, Exception) or self.client_gone:
            return None
        return self.status_of_error(error) or 500

    def decides_later(self, error: BaseException) -> bool:
        """The service may have a handler for exceptions that name no status themselves."""
        return isinstance(error, Exception) and self.sent_status is None and self.status_of_error(error) is None

    def describe(
        self, result: object, error: BaseException | None, arguments: Mapping[str, object] = NO_ARGUMENTS
    ) -> Description:
        """(method, route, status, error type).

        `error.type` is there on failures only: an exception gives its class, unless the answer is a refusal (4xx); a
        result of 500 and above gives its status. What is not an `Exception` (a cancelled task) sent no answer and has
        no status, unless one went out before.
        """
        status = self.status(result, error, arguments)
        if error is None:
            failure = str(status) if status is not None and status >= 500 else None
        else:
            # An answer that had begun as a success and then broke off is a failure; a refusal (4xx) is none.
            failure = None if status is not None and 400 <= status < 500 else error_name(error)
        return self.method(), self.route(), status, failure

    def describe_running(self) -> Description:
        return self.method(), self.route(), None, None

    @staticmethod
    def attributes_of(description: Description) -> Mapping[str, Value | None]:
        return dict(zip(_HTTP_ATTRIBUTES, cast("tuple[str | int | None, ...]", description), strict=True))


current_call: ContextVar[Call | None] = ContextVar("tallymark_call", default=None)


def error_name(error: BaseException | None) -> str | None:
    """`error.type` of an exception."""
    return None if error is None else type(error).__qualname__


def status_of(outcome: object) -> int | None:
    """The HTTP status that a result or an exception names in an int `status_code`, else None."""
    try:
        status = getattr(outcome, "status_code", None)
    except Exception:
        return None
    return int(status) if isinstance(status, int) and 100 <= status <= 599 else None
