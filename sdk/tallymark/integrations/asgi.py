"""ASGI: method, route, identity and bytes of the requests of Starlette, FastAPI, Litestar and other applications.

app.add_middleware(UsageMiddleware, identify=lambda scope: {"account": account_of(scope)})
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from tallymark import runtime
from tallymark.calls import METHODS, OTHER_METHOD, HttpCall, IncompleteAnswerError
from tallymark.integrations.answers import is_a, status_of_answer
from tallymark.integrations.asgi_lifespan import serve_lifespan
from tallymark.integrations.asgi_routes import matched_route, route_template
from tallymark.integrations.asgi_types import App, Message, Receive, Scope, Send
from tallymark.integrations.serving import Requests, Resolver, Served, Track

__all__ = ["CALL", "App", "AsgiCall", "Message", "Receive", "Scope", "Send", "UsageMiddleware"]

CALL: Final = "tallymark.call"
"""Where a scope keeps the call that is being served: also in the copies that frameworks make of it."""

_UNSET: Final = object()


class UsageMiddleware:
    """Pure ASGI middleware. Add it outermost, so that it stands around authentication and routing.

    `identify`, if given, is called with the scope of each HTTP request and returns whom it is for: an `Identity`, a
    mapping with any of account, user and plan, or None when that is not known yet. It must not block. When it raises,
    the request goes on and its usage is recorded without an account. Handlers and dependencies, synchronous ones
    too, may call `tallymark.identify()` later.

    `track`: what `track_usage()` made, to count every request by, also one that finds no route, is refused or fails
    before it reaches a handler. It counts when the answer has been sent, by the status that went out. `error.type` is
    "IncompleteAnswerError" where the client went away before the end of it.

    Another one inside, around a mounted application for instance, adds what it identifies and tracks.

    When the server tells of its end by the lifespan protocol, what is left is delivered before the server goes on, for
    which it waits no longer than the `shutdown_timeout`.
    """

    def __init__(self, app: App, identify: Resolver[Scope] | None = None, track: Track = ()) -> None:
        self.app = app
        self._requests = Requests("UsageMiddleware", identify, track)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await serve_lifespan(self.app, scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        known = scope.get(CALL)
        call = known if isinstance(known, AsgiCall) else AsgiCall(scope)
        first = call is not known
        scope[CALL] = call
        served = self._requests.begin(call, scope)
        if first:
            receive, send = call.counting(served, receive, send)
        try:
            # The scope itself, not a copy: routers write the matched route into it.
            await self.app(scope, receive, send)
        except BaseException as error:
            served.end(error)
            raise
        else:
            served.end(call.incomplete() if first else None)
        finally:
            if first:
                del scope[CALL]  # call and scope would keep each other alive


class AsgiCall(HttpCall):
    """A request as its scope describes it."""

    __slots__ = ("_answered", "_endpoint", "_found", "_method", "_named", "_scope", "_template")

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.request_bytes: int = 0
        self.response_bytes: int = 0
        self._scope = scope
        method = scope.get("method")
        self._method = method if method in METHODS else OTHER_METHOD
        self._answered = False
        # The route that was found last, and by which entries of the scope: it is asked for with each recording.
        self._endpoint: object = _UNSET
        self._named: object = _UNSET
        self._found: object | None = None
        self._template: str | None = None

    def counting(self, served: Served, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """The same two, counting. The call ends with the last part of its answer, before any background task."""

        async def counted_receive() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self.request_bytes += len(message.get("body", b""))
            elif message["type"] == "http.disconnect" and not self._answered:
                self.client_gone = True
            return message

        async def counted_send(message: Message) -> None:
            kind = message["type"]
            # Before it is sent: whoever sends a file may remove it right afterwards.
            file_size = _size_of(message.get("path")) if kind == "http.response.pathsend" else 0
            await send(message)
            if self.client_gone:
                return  # the server has dropped it
            if kind == "http.response.start":
                self.sent_status = message["status"]
                self._answered = self._method == "HEAD"  # servers leave its body out, and clients do not wait for it
                return
            if kind == "http.response.body":
                size, last = len(message.get("body", b"")), not message.get("more_body", False)
            elif kind == "http.response.pathsend":
                size, last = file_size, True
            else:
                return
            if self._method != "HEAD":
                self.response_bytes += size
            if last:
                self._answered = True
                if self.sent_status is None or self.sent_status < 500:  # else the error is still on its way
                    served.answered()

        return counted_receive, counted_send

    def incomplete(self) -> IncompleteAnswerError | None:
        """How a call ended whose application has returned, if not well."""
        if self._answered:
            return None
        if self.sent_status is None and not self.client_gone:
            self.sent_status = 500  # what servers answer for an application that did not
            return None
        return IncompleteAnswerError()

    def method(self) -> str | None:
        return self._method

    def route(self) -> str | None:
        if self.routed is not None:
            return self.routed()
        self._find()
        return self._template

    def default_status(self) -> int:
        self._find()
        status = getattr(self._found, "status_code", None)
        return status if isinstance(status, int) else 200

    def header(self, name: str) -> str | None:
        wanted = name.encode()
        found = b",".join(value for key, value in self._scope["headers"] if key == wanted)
        return found.decode("latin-1") or None

    def status_of(self, result: object, arguments: Mapping[str, object]) -> int | None:
        """A response's, else the one set on the response that FastAPI gave the handler."""
        status = status_of_answer(result)
        if status is None:
            for argument in arguments.values():
                if is_a(argument, "starlette.responses", "Response"):
                    status = status_of_answer(argument)
        return status

    def status_of_error(self, error: Exception) -> int | None:
        """Any exception may have a handler that makes another answer of it."""
        return None

    def _find(self) -> None:
        endpoint, named = self._scope.get("endpoint"), self._scope.get("route")
        if endpoint is self._endpoint and named is self._named and self._found is not None:
            return
        self._found = matched_route(self._scope)
        self._template = None if self._found is None else route_template(self._scope, self._found)
        self._endpoint, self._named = endpoint, named


def _size_of(path: Any) -> int:
    """0 where it cannot be told: the answer goes out all the same."""
    try:
        return os.stat(path).st_size  # noqa: PTH116 - a path as the service gives it
    except (OSError, ValueError, TypeError) as error:
        runtime.current().reporter.warning(
            "pathsend",
            "the size of a file that is sent as an answer cannot be told, its bytes are not counted: %s",
            error,
        )
        return 0
