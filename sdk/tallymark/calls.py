"""What a call was: its HTTP method, route and status, as the framework knows them when usage is recorded.

An integration puts a `Call` into `current_call` for as long as it serves a request. Everything is asked at the time
of recording, because a middleware runs before the router has found the route.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tallymark.identity import Held

OTHER_METHOD: Final = "_OTHER"

# RFC 9110, PATCH (RFC 5789) and QUERY: the methods that OpenTelemetry's conventions know.
METHODS: Final = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})


class Call:
    """A request being served. Integrations derive from it; each answer may be None where it is not known."""

    __slots__ = ("published",)

    def __init__(self) -> None:
        # Identities set in the request's worker threads, newest first: see tallymark.identity.
        self.published: Held | None = None

    def method(self) -> str | None:
        """`http.request.method`, `_OTHER` for a method that OpenTelemetry does not know."""
        return None

    def route(self) -> str | None:
        """`http.route`: the template that matched, never the concrete path."""
        return None

    def status(self) -> int:
        """The status of an answer that names none itself."""
        return 200


current_call: ContextVar[Call | None] = ContextVar("tallymark_call", default=None)


def status_of(outcome: object) -> int | None:
    """The HTTP status that a result or an exception names in an int `status_code`, else None."""
    try:
        status = getattr(outcome, "status_code", None)
    except Exception:
        return None
    return int(status) if isinstance(status, int) and 100 <= status <= 599 else None


def describe(
    call: Call | None, result: object, error: BaseException | None
) -> tuple[str | None, str | None, int | None, str | None]:
    """(method, route, status, error type) of a call that ended with `result`, or with `error`.

    `error.type` is there on failures only: an exception that is not an HTTP answer gives its class, as does one of
    500 and above; a result of 500 and above gives its status. Outside an HTTP call every exception is a failure.
    What is not an `Exception` (a cancelled task) sent no answer and has no status.
    """
    if call is None:
        return None, None, None, None if error is None else type(error).__qualname__
    method, route = call.method(), call.route()
    if error is None:
        status = status_of(result) or call.status()
        return method, route, status, str(status) if status >= 500 else None
    if not isinstance(error, Exception):
        return method, route, None, type(error).__qualname__
    status = status_of(error) or 500
    return method, route, status, type(error).__qualname__ if status >= 500 else None
