"""WSGI: method, route, identity and bytes of the requests of any WSGI application; Flask's routes are known by itself.

application = UsageMiddleware(application, identify=lambda environ: {"account": account_of(environ)})
app.wsgi_app = UsageMiddleware(app.wsgi_app)            Flask, and what is built on Werkzeug
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import Context, copy_context
from typing import Any, Final
from wsgiref.util import FileWrapper

from tallymark.calls import METHODS, OTHER_METHOD, HttpCall, IncompleteAnswerError
from tallymark.integrations.answers import status_of_answer
from tallymark.integrations.serving import Requests, Resolver, Served, Track

Environ = dict[str, Any]
Write = Callable[[bytes], object]
StartResponse = Callable[..., Write]
App = Callable[[Environ, StartResponse], Iterable[bytes]]

CALL: Final = "tallymark.call"
"""Where an environ keeps the call that is being served."""


class UsageMiddleware:
    """WSGI middleware. Put it outermost, so that it stands around authentication and routing.

    `identify`, if given, is called with the environ of each request and returns whom it is for: an `Identity`, a
    mapping with any of account, user and plan, or None when that is not known yet. When it raises, the request goes on
    and its usage is recorded without an account. Handlers may call `tallymark.identify()` later.

    `track`: what `track_usage()` made, to count every request by, also one that finds no route or is refused. It
    counts when the server has closed the answer, by the status that went out. `error.type` is "IncompleteAnswerError"
    where the client went away before the end of it.

    `route`: the template (`http.route`) for an environ, from a framework other than Flask or Django; asked at the
    time of recording, None for no route. Never the concrete path.

    Each request has a context (`contextvars`) of its own, a copy of the server's.
    """

    def __init__(
        self,
        app: App,
        identify: Resolver[Environ] | None = None,
        track: Track = (),
        route: Callable[[Environ], str | None] | None = None,
    ) -> None:
        self.app = app
        self._requests = Requests("UsageMiddleware", identify, track)
        self._route = route

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        known = environ.get(CALL)
        if isinstance(known, WsgiCall):  # another one stands around this one
            served = self._requests.begin(known, environ)
            try:
                return self.app(environ, start_response)
            finally:
                served.end()
        context = copy_context()
        return context.run(self._serve, context, environ, start_response)

    def _serve(self, context: Context, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        call = environ[CALL] = WsgiCall(environ, self._route)
        if environ.get("wsgi.input") is not None:
            environ["wsgi.input"] = CountedInput(environ["wsgi.input"], call)
        if "wsgi.file_wrapper" in environ:
            environ["wsgi.file_wrapper"] = FileWrapper  # what the server's own one sends, nobody else sees
        served = self._requests.begin(call, environ)
        try:
            body = self.app(environ, call.starting(start_response))
            answer = _SizedAnswer if hasattr(body, "__len__") else _Answer
            return answer(body, call, served, context, environ)
        except BaseException as error:
            environ.pop(CALL, None)
            served.end(error)
            raise


class WsgiCall(HttpCall):
    """A request as its environ describes it."""

    __slots__ = ("_environ", "_length", "_method", "_route", "_started")

    def __init__(self, environ: Environ, route: Callable[[Environ], str | None] | None = None) -> None:
        super().__init__()
        self.request_bytes = 0
        self.response_bytes: int = 0
        self._environ = environ
        self._route = route
        method = environ.get("REQUEST_METHOD")
        self._method = method if method in METHODS else OTHER_METHOD
        self._started: int | None = None  # the status that goes out with the first part of the answer
        self._length: int | None = None

    def header(self, name: str) -> str | None:
        text = self._environ.get("HTTP_" + name.upper().replace("-", "_"))
        return text or None

    def starting(self, start_response: StartResponse) -> StartResponse:
        """The same, and the status is noted."""

        def started(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Write:
            try:
                write = start_response(status, headers, exc_info) if exc_info else start_response(status, headers)
            finally:
                exc_info = None  # as PEP 3333 asks: no circle through the traceback
            self._started = int(status[:3]) if status[:3].isdigit() else None
            self._keep_route()
            lengths = [value for name, value in headers if name.lower() == "content-length" and value.isdigit()]
            self._length = int(lengths[0]) if lengths else None

            def counted_write(data: bytes) -> object:
                written = write(data)
                self.sent(data)
                return written

            return counted_write

        return started

    def sent(self, data: bytes) -> None:
        """A part of the body has gone to the server; an empty one holds the head back."""
        if data and isinstance(data, (bytes, bytearray)):
            self.sent_status = self._started
            if self._method != "HEAD":  # servers leave its body out
                self.response_bytes += len(data)

    def finished(self) -> None:
        """There is no more to the answer."""
        if self.sent_status is None:
            self.sent_status = self._started

    def is_complete(self) -> bool:
        """Whether a server that asks for no more has all that there is to send."""
        status = self.sent_status or self._started
        return self._method == "HEAD" or status in (204, 304) or self.response_bytes == self._length

    def method(self) -> str | None:
        return self._method

    def route(self) -> str | None:
        if self.routed is not None:
            return self.routed()
        if self._route is not None:
            return self._route(self._environ)
        self._keep_route()
        return None if self.routed is None else self.routed()

    def _keep_route(self) -> None:
        """Flask's, which forgets its request before the answer has gone out. Rules of blueprints have their prefix."""
        if self.routed is None and self._route is None:
            rule = getattr(getattr(self._environ.get("werkzeug.request"), "url_rule", None), "rule", None)
            if isinstance(rule, str):
                self.routed = lambda: rule

    def default_status(self) -> int:
        return self._started or 200

    def status_of(self, result: object, arguments: Mapping[str, object]) -> int | None:
        """A response's; or, as Flask's views may return it, the second of (body, status) or (body, status, headers)."""
        status = status_of_answer(result)
        if status is None and type(result) is tuple and 2 <= len(result) <= 3 and self._is_flasks():
            named = result[1]
            if isinstance(named, str) and named[:3].isdigit():
                named = int(named[:3])
            if _is_body(result[0]) and isinstance(named, int) and 100 <= named <= 599:
                return int(named)
        return status

    def _is_flasks(self) -> bool:
        return hasattr(self._environ.get("werkzeug.request"), "url_rule")

    def status_of_error(self, error: Exception) -> int | None:
        """Any exception may have a handler that makes another answer of it."""
        return None


def _is_body(value: object) -> bool:
    """What Flask makes a response of: a tuple of numbers is the result of something else."""
    return isinstance(value, (str, bytes, bytearray, dict, list, Iterator)) or status_of_answer(value) is not None


class CountedInput:
    """`wsgi.input`, counted."""

    def __init__(self, stream: Any, call: HttpCall) -> None:
        self._stream = stream
        self._call = call

    def _count(self, data: bytes) -> bytes:
        self._add(len(data) if data else 0)
        return data

    def _add(self, size: int) -> None:
        self._call.request_bytes = (self._call.request_bytes or 0) + size

    def read(self, *size: Any) -> bytes:
        return self._count(self._stream.read(*size))

    def readline(self, *size: Any) -> bytes:
        return self._count(self._stream.readline(*size))

    def readlines(self, *hint: Any) -> list[bytes]:
        return [self._count(line) for line in self._stream.readlines(*hint)]

    def __iter__(self) -> Iterator[bytes]:
        return map(self._count, self._stream)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stream, name)
        if name == "read1":
            return lambda *size: self._count(found(*size))
        if name == "readinto":
            return self._readinto
        return found

    def _readinto(self, buffer: Any) -> int:
        size = self._stream.readinto(buffer)
        self._add(size or 0)
        return int(size or 0)


class _Answer:
    """What the application returned, counted while the server takes it, in the request's own context."""

    def __init__(
        self, body: Iterable[bytes], call: WsgiCall, served: Served, context: Context, environ: Environ
    ) -> None:
        self._body = body
        self._parts: Iterator[bytes] | None = None
        self._call = call
        self._served = served
        self._environ = environ
        self._context = context
        self._closed = self._finished = False
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return self._context.run(self._next)

    def _next(self) -> bytes:
        try:
            if self._parts is None:
                self._parts = iter(self._body)
            part = next(self._parts)
        except StopIteration:
            self._finished = True
            self._call.finished()
            if not hasattr(self._body, "close"):
                self._end(None)
            raise
        except BaseException as error:
            self._error = error
            raise
        self._call.sent(part)
        return part

    def close(self) -> None:
        """For the server, however it ended."""
        if not self._closed:
            self._closed = True
            self._context.run(self._close)

    def __del__(self) -> None:
        # Middlewares around this one may take all of the answer and forget to close it.
        if not self._closed:
            self._environ.pop(CALL, None)
            self._served.answered(self._how_it_ended())

    def _how_it_ended(self) -> BaseException | None:
        if self._error is None and not self._finished:
            if not self._call.is_complete():
                return IncompleteAnswerError()
            self._call.finished()
        return self._error

    def _close(self) -> None:
        error = self._how_it_ended()
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        self._environ.pop(CALL, None)
        self._served.end(error)


class _SizedAnswer(_Answer):
    """Servers make a Content-Length of an answer that is known to have one part."""

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]
