"""A request and a websocket of an ASGI server, while they are served."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from tallymark import runtime
from tallymark.calls import METHODS, NO_ARGUMENTS, OTHER_METHOD, HttpCall, IncompleteAnswerError
from tallymark.integrations.answers import is_a, status_of_answer
from tallymark.integrations.asgi_routes import matched_route, route_template
from tallymark.integrations.asgi_types import Message, Receive, Scope, Send
from tallymark.integrations.serving import Served

_UNSET: Final = object()
_BODIES: Final = ("http.response.body", "http.response.pathsend")


class ScopeCall(HttpCall):
    """A call as its scope describes it."""

    __slots__ = ("_endpoint", "_found", "_named", "_scope", "_template")

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self._scope = scope
        # The route that was found last, and by which entries of the scope: it is asked for with each recording.
        self._endpoint: object = _UNSET
        self._named: object = _UNSET
        self._found: object | None = None
        self._template: str | None = None

    def counting(self, served: Served, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """What the application is given in the place of these two."""
        return receive, send

    def incomplete(self) -> IncompleteAnswerError | None:
        """How a call ended whose application has returned, if not well."""
        return None

    def route(self) -> str | None:
        if self.routed is not None:
            return self.routed()
        self.matched()
        return self._template

    def header(self, name: str) -> str | None:
        wanted = name.encode()
        found = b",".join(value for key, value in self._scope["headers"] if key == wanted)
        return found.decode("latin-1") or None

    def matched(self) -> object | None:
        """The route that matched."""
        endpoint, named = self._scope.get("endpoint"), self._scope.get("route")
        if endpoint is self._endpoint and named is self._named and self._found is not None:
            return self._found
        self._found = matched_route(self._scope)
        self._template = None if self._found is None else route_template(self._scope, self._found)
        self._endpoint, self._named = endpoint, named
        return self._found


class AsgiCall(ScopeCall):
    """A request."""

    __slots__ = ("_answered", "_completing", "_method")

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self.request_bytes: int = 0
        self.response_bytes: int = 0
        method = scope.get("method")
        self._method = method if method in METHODS else OTHER_METHOD
        self._answered = False
        self._completing = False
        """Whether the last part of the answer is on its way."""

    def counting(self, served: Served, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """The same two, counting. The call ends with the last part of its answer, before any background task."""

        async def counted_receive() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self.request_bytes += len(message.get("body", b""))
            elif message["type"] == "http.disconnect" and not self._answered and not self._completing:
                self.client_gone = True
            return message

        async def counted_send(message: Message) -> None:
            kind = message["type"]
            # Before it is sent: whoever sends a file may remove it right afterwards.
            file_size = _size_of(message.get("path")) if kind == "http.response.pathsend" else 0
            # A server says http.disconnect after a complete answer too, and may do so before its `send` returns.
            self._completing = kind in _BODIES and not message.get("more_body", False)
            try:
                await send(message)
            finally:
                self._completing = False
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

    def default_status(self) -> int:
        status = getattr(self.matched(), "status_code", None)
        return status if isinstance(status, int) else 200

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


class WebSocketCall(ScopeCall):
    """A websocket, from its handshake until the application returns. It has a route and an account, and no method and
    no status: OpenTelemetry's are of a request and its answer, and what is recorded here is of messages. The handshake,
    a GET or by HTTP/2 a CONNECT, is the server's affair and not in the scope."""

    __slots__ = ()

    def method(self) -> None:
        """None."""

    def status(
        self, result: object = None, error: BaseException | None = None, arguments: Mapping[str, object] = NO_ARGUMENTS
    ) -> None:
        """None."""

    def decides_later(self, error: BaseException) -> bool:
        """No answer will tell more."""
        return False


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
